"""`tensorgraph synth`: a GGUF file with random weights in any shape, for measuring where no weights can be had."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.tools import gguf_output, options
from tensorgraph.tools.inspect import totals

if TYPE_CHECKING:
    from tensorgraph.tools.synth.shape import Shape

TYPE = "Type of all matrices, or GLOB=TYPE of those whose names match; the last match wins. TYPE/TYPE: where rows do not fit."
LAYERS = "Keep some layers: N, the first N, or numbers and ranges such as 0,2-5."
SET = "Change a field of the configuration, spelled as in config.json; repeated."
VOCAB = "auto, gpt2 (byte-level BPE), llama (SentencePiece-style), bert (WordPiece) or none; auto: gpt2, or bert for encoders."


def synth(
    model: Annotated[str, typer.Argument(metavar="MODEL|CONFIG.json|NAME", help=options.DESCRIBED, show_default=False)],
    out: gguf_output.Out,
    types: Annotated[list[str] | None, typer.Option("--type", help=TYPE, metavar="[GLOB=]TYPE", show_default="f16")] = None,
    layers: Annotated[str | None, typer.Option(help=LAYERS, metavar="LIST", show_default="all")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Keep so many experts.", show_default="all")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help=SET, metavar="NAME=VALUE")] = None,
    vocab: Annotated[str, typer.Option(help=VOCAB, metavar="KIND")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    force: gguf_output.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a GGUF file with random weights in a model's shape, to measure shapes and types without the model.

    Norms and other vectors stay f32, and so do routers unless a rule names them.

    \b
    tensorgraph synth deepseek-v3 out.gguf --layers 2-4 --experts 16 --type q4_k/q8_0 --type 'output*=q6_k'
    tensorgraph synth llama-3.1-8b out.gguf --type q4_0/f16 --set hidden_size=2048 --set num_hidden_layers=8
    tensorgraph synth model.gguf out.gguf --type bf16 --vocab none
    """
    from tensorgraph.tools.model_argument import described_model
    from tensorgraph.tools.synth.rules import TypeRules
    from tensorgraph.tools.synth.shape import shape_of
    from tensorgraph.tools.synth.vocabulary import vocabulary

    gguf_output.check("synth", out, force)
    rules = TypeRules(["f16", *(types or ())])
    with described_model(model) as described:
        with options.working("planning"):
            shape = shape_of(described, rules, layers=layers, experts=experts, changes=changes or ())
        words = vocabulary(vocab, shape.model.vocab_size, encodes=described.encodes)
    began = time.perf_counter()
    size_bytes = _write(out, shape, words, seed)
    tensors = [{"dtype": str(t.dtype), "shape": list(t.shape), "size_bytes": t.size_bytes} for t in shape.tensors]
    report = {
        "file": str(out),
        "architecture": shape.model.architecture.name,
        "vocab": words["tokenizer.ggml.model"],
        "size_bytes": size_bytes,
        "write_s": time.perf_counter() - began,
        "totals": totals(tensors),
    }
    typer.echo(json.dumps(report) if as_json else _report_text(report))


def _write(out: Path, shape: Shape, words: dict[str, Any], seed: int) -> int:
    from tensorgraph.models.text.gguf_writer import NewTensor
    from tensorgraph.tools.synth.values import contents

    n_experts = next((v for k, v in shape.metadata.items() if k.endswith(".expert_count")), 0)

    def content(tensor: NewTensor) -> Iterable[memoryview]:
        return [shape.given[tensor.name].data] if tensor.name in shape.given else contents(tensor, seed, n_experts)

    return gguf_output.write_file("synth", out, {**shape.metadata, **words}, shape.tensors, content)


def _report_text(report: dict[str, Any]) -> str:
    written = f"{options.size_text(report['size_bytes'])} in {report['write_s']:.1f} s"
    head = f"{report['file']} ({report['architecture']}, vocabulary {report['vocab']}): {written}"
    return f"{head}\n\n{gguf_output.totals_table(report['totals'])}"
