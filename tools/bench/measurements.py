"""Measurements beside llama.cpp that are kept in the repository: `python -m tensorgraph.tools.bench.measurements NAME`."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools.bench import report
from tensorgraph.tools.bench.cases import Case
from tensorgraph.tools.bench.command import Pair, Settings, measure_all, thread_counts
from tensorgraph.tools.bench.report import Run
from tensorgraph.tools.cli import Commands
from tensorgraph.tools.options import Filling

OUT = "OUT.gguf"


@dataclass(frozen=True)
class Made:
    """A file that a command of ours writes: its name, and the command's words, `OUT` for the file."""

    name: str
    words: tuple[str, ...]

    def path(self, cache: Path) -> Path:
        """Where it lies: in a folder of its own for these words."""
        return cache / f"{zlib.crc32(' '.join(self.words).encode()):08x}" / f"{self.name}.gguf"

    def make(self, cache: Path) -> str:
        """Its path, after it was written if it was not there."""
        path = self.path(cache)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            words = [str(path) if word == OUT else word for word in self.words]
            subprocess.run([sys.executable, "-m", "tensorgraph.tools.cli", *words], check=True, stdout=subprocess.DEVNULL)
        return str(path)


Source = str | Made


@dataclass(frozen=True)
class Measurement:
    """What is measured, and what is said of it.

    Attributes:
        target: of the Makefile.
        pairs: models, and what the peer is given.
        threads: as `bench --threads` takes them.
        busy: other processes that keep a core busy meanwhile.
        fill: what state the tokens have that are there before, as `bench --fill` takes it.
    """

    target: str
    title: str
    text: str
    pairs: Sequence[tuple[Source, Source]]
    cases: Sequence[Case]
    threads: Sequence[str] = ("1", "2")
    rounds: int = 7
    busy: int = 0
    fill: Filling | None = None


def _sets(**fields: object) -> tuple[str, ...]:
    return tuple(word for name, value in fields.items() for word in ("--set", f"{name}={json.dumps(value)}"))


SMOLLM2_Q4_0 = Made("smollm2-q4_0", ("quantize", "smollm2", OUT, "--type", "blk.*=q4_0"))
TYPES = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "iq4_xs", "q2_k", "mxfp4", "iq2_xxs", "f16", "bf16")
LLAMA = _sets(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8
)
MIXTURE = Made(
    "qwen3-moe-q4_k",
    ("synth", "qwen3-30b-a3b", OUT, "--layers", "4", "--experts", "64", "--type", "q4_k", *_sets(vocab_size=32000)),
)
NARROW = _sets(intermediate_size=256, num_attention_heads=4, num_key_value_heads=1, head_dim=64)


def _head(vocab_size: int, width: int, dtype: str) -> Made:
    sizes = _sets(vocab_size=vocab_size, hidden_size=width)
    words = ("synth", "qwen3-0.6b", OUT, "--layers", "1", "--type", dtype, *sizes, *NARROW)
    return Made(f"head-{vocab_size}x{width}-{dtype}", words)


_SMALL = {
    **{"hidden_size": 1024, "num_attention_heads": 16, "q_lora_rank": 512},
    **{"intermediate_size": 2048, "moe_intermediate_size": 512, "vocab_size": 32000},
}


def _latent(name: str, **more: object) -> Made:
    """Eight layers of a mixture, 1,024 wide, of 16 heads over latents."""
    types = ("--type", "q8_0", "--type", "*exps*=q4_0", "--vocab", "none")
    words = ("synth", name, OUT, "--layers", "3-10", "--experts", "32", *types, *_sets(**_SMALL, **more))
    return Made(f"{name}-small", words)


SPARSE = _latent("deepseek-v3.2", index_n_heads=16, index_topk=512)

_V4 = ("--type", "q8_0", "--type", "*exps*=mxfp4", "--vocab", "none", "--experts", "32")
COMPRESSED = Made(
    "deepseek-v4-small",
    (
        *("synth", "deepseek-v4-flash", OUT, "--layers", "2-9", *_V4),
        *_sets(hidden_size=1024, num_attention_heads=16, q_lora_rank=512, o_lora_rank=512, o_groups=4),
        *_sets(moe_intermediate_size=512, vocab_size=32000, index_n_heads=16),
    ),
)
COMPRESSED_LAYERS = Made("deepseek-v4-layers", ("synth", "deepseek-v4-flash", OUT, "--layers", "2,3,4,5", *_V4))


def _same(*sources: Source) -> tuple[tuple[Source, Source], ...]:
    return tuple((source, source) for source in sources)


MEASUREMENTS = {
    "smollm2": Measurement(
        "bench",
        "SmolLM2-135M in Q4_1 beside llama.cpp",
        "llama.cpp has no interleaved kernels for Q4_1 on x86, so it is measured with the same weights in its best type too: the "
        "layers' matrices rounded to Q4_0 (`tensorgraph quantize`), which it interleaves as it loads them.",
        (*_same("smollm2"), ("smollm2", SMOLLM2_Q4_0)),
        (Case("pp", 512), Case("tg", 128), Case("tg", 128, 1024)),
    ),
    "types": Measurement(
        "bench-types",
        "Weight types beside llama.cpp",
        "One Llama shape (8 layers, 2,048 wide, 8,192 in the middle, 32 heads and 8 of keys and values, a vocabulary of 32,000: "
        "618 million parameters) with random weights, all matrices of one type (`tensorgraph synth`); and a mixture of the shape "
        "of Qwen3-30B-A3B, with 4 layers and 8 of 64 experts.",
        _same(*(Made(f"llama-{name}", ("synth", "llama-3.1-8b", OUT, "--type", name, *LLAMA)) for name in TYPES), MIXTURE),
        (Case("pp", 128), Case("tg", 12)),
    ),
    "heads": Measurement(
        "bench-heads",
        "Large vocabularies beside llama.cpp",
        "A decode step of one layer that is so narrow (attention of 4 heads of 64, 256 in the middle) that the matrix of the "
        "vocabulary has 98 to 99 hundredths of the weights that are read.",
        _same(_head(262144, 640, "q8_0"), _head(128256, 2048, "q6_k")),
        (Case("tg", 32),),
    ),
    "sparse": Measurement(
        "bench-sparse",
        "DeepSeek V3.2's sparse attention beside llama.cpp",
        "Eight layers of V3.2's kind with random weights: 1,024 wide, 16 heads over latents of 512 + 64, an indexer of 16 heads "
        "of 128 that selects 512 rows, 32 experts in Q4_0 and all else in Q8_0. What comes before rounds has random state here, "
        "and there the state of 128 tokens, repeated.",
        _same(SPARSE),
        (Case("pp", 512), Case("tg", 16), Case("tg", 16, 32768)),
        rounds=5,
        fill="random",
    ),
    "sparse-prompt": Measurement(
        "bench-sparse-prompt",
        "A prompt behind 32,768 tokens beside llama.cpp",
        "The model of `sparse.md`. A round of llama.cpp takes one and a half minutes on 2 threads, so there is one.",
        _same(SPARSE),
        (Case("pp", 512, 32768),),
        rounds=1,
        fill="random",
    ),
    "latent": Measurement(
        "bench-latent",
        "DeepSeek V3's latent attention beside llama.cpp",
        "The same as for V3.2 (`sparse.md`) without the indexer: each token attends to all rows.",
        _same(_latent("deepseek-v3")),
        (Case("pp", 512), Case("tg", 16), Case("tg", 16, 8192)),
        rounds=5,
        fill="random",
    ),
    "compressed": Measurement(
        "bench-compressed",
        "DeepSeek V4's compressed attention beside llama.cpp",
        "Eight layers of V4's kinds (four that select of blocks of 4 tokens, four that read all blocks of 128), random weights: "
        "1,024 wide in 4 streams, 16 heads of 512, an indexer of 16 heads of 128 that selects 512 rows, 32 experts in MXFP4 and "
        "all else in Q8_0. What comes before rounds has random state here, and there the state of 128 tokens, repeated.",
        _same(COMPRESSED),
        (Case("pp", 512), Case("tg", 16), Case("tg", 16, 32768)),
        rounds=3,
        fill="random",
    ),
    "compressed-layers": Measurement(
        "bench-compressed-layers",
        "Full-size layers of DeepSeek V4 beside llama.cpp",
        "Layers 2 to 5 of V4-Flash (two of each kind, the first routed by hash) with 32 experts and the whole vocabulary: MXFP4 "
        "experts, all else in Q8_0; random weights. What comes before as in `compressed.md`.",
        _same(COMPRESSED_LAYERS),
        (Case("pp", 512), Case("tg", 16), Case("tg", 16, 32768)),
        rounds=3,
        fill="random",
    ),
    "busy": Measurement(
        "bench-busy",
        "Beside a busy process",
        "SmolLM2-135M in Q4_1 while another process, a loop of arithmetic in a session of its own, keeps a core busy. With auto "
        "threads the peer has as many as there are cores; few tokens a round, since it then decodes few a second.",
        _same("smollm2"),
        (Case("pp", 64), Case("tg", 32)),
        threads=("1", "2", "auto"),
        rounds=5,
        busy=1,
    ),
}


def measure(
    name: Annotated[str, typer.Argument(metavar="|".join(MEASUREMENTS))],
    peer: Annotated[str, typer.Option(help="An interpreter that has llama-cpp-python.", metavar="PYTHON")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds that count.", show_default="the measurement's")] = None,
    record: Annotated[Path, typer.Option(help="The folder for NAME.md and NAME.json.")] = Path("docs/measurements"),
    cache: Annotated[Path, typer.Option(help="The folder for models, which are made once.")] = Path(".cache/measurements"),
) -> None:
    """Measure beside llama.cpp, print the table, and write it with its machine, date and rounds to NAME.md and NAME.json."""
    if name not in MEASUREMENTS:
        raise InputError(f"[measurements] wanted {', '.join(MEASUREMENTS)}; got {name}")
    wanted = MEASUREMENTS[name]
    settings = Settings(list(wanted.cases), rounds or wanted.rounds, python=peer, busy=wanted.busy, fill=wanted.fill)
    made = {source: source if isinstance(source, str) else source.make(cache) for pair in wanted.pairs for source in pair}
    pairs = [Pair(made[ours], made[theirs]) for ours, theirs in wanted.pairs]
    runs, about = measure_all(settings, [(pair, count) for pair in pairs for count in thread_counts(wanted.threads)], say)
    if sys.stdout.isatty():
        report.show(runs, about)
    else:
        typer.echo(report.as_text(runs, about))
    if settings.errors:
        raise typer.Exit(1)
    record.mkdir(parents=True, exist_ok=True)
    (record / f"{name}.md").write_text(document(wanted, runs, about))
    found = {"name": name, "command": command(wanted), **report.as_object(runs, about, [])}
    (record / f"{name}.json").write_text(by_lines(found))
    typer.echo(f"\nwritten: {record / name}.md, {record / name}.json")


def say(run: Run) -> None:
    """Its rows on stderr, where no terminal shows how far it is."""
    if not sys.stderr.isatty():
        for row in report.table_rows([run])[1:]:
            typer.echo("  ".join(row), err=True)


def command(wanted: Measurement) -> str:
    """How to measure this again."""
    return f"make {wanted.target} PEER=python-with-llama-cpp-python"


def document(wanted: Measurement, runs: Sequence[Run], about: Mapping[str, Any]) -> str:
    """The page that is kept."""
    text = textwrap.fill(wanted.text, 130)
    head = f"# {wanted.title}\n\n{text}\n\n    {command(wanted)}\n\nMeasured {about['date']}."
    return f"{head}\n\n{report.as_text(runs, about, markdown=True)}\n"


def by_lines(found: Mapping[str, Any]) -> str:
    """JSON with a line for each field and each run."""
    runs = ",\n".join(map(json.dumps, found["runs"]))
    fields = {name: f"[\n{runs}\n]" if name == "runs" else json.dumps(value) for name, value in found.items()}
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "\n}\n"


def main() -> None:
    """The program."""
    app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(measure)
    app.callback()(lambda: None)
    app(["measure", *sys.argv[1:]])


if __name__ == "__main__":
    main()
