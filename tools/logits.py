"""`tensorgraph logits`: the logits of given tokens, to a file."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    import numpy as np

    from tensorgraph.models.text.model import TextModel


def logits(
    model: options.Model,
    ids: Annotated[
        list[str],
        typer.Option(
            help="Token ids: a JSON list, or an array of an .npz file (input_ids, or its only one, unless named). "
            "Given several times: several sequences in one ragged batch a step.",
            metavar="FILE.json|FILE.npz[:ARRAY]",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="OUT.npz", show_default=False)],
    prefill: Annotated[
        int | None, typer.Option(min=0, help="Feed so many in chunks, others one by one.", show_default="all")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens in a chunk.", show_default="one chunk")] = None,
    dump: Annotated[list[str] | None, typer.Option(help="Also write this named node; may be repeated.", metavar="NAME")] = None,
    threads: options.Threads = options.AUTO,
    backend: options.Backend = options.BACKEND,
    kv_type: options.KvType = "f16",
    exact: options.Exact = False,
    lowering: options.Lowering = None,
    packed_cache: options.PackedCache = False,
    gpu_layers: options.GpuLayers = options.AUTO,
    cpu_experts: options.CpuExperts = False,
    as_json: options.Json = False,
) -> None:
    """Write the logits [T, V] (f32) that follow each of T tokens, and named nodes, a row a token.

    OUT.npz holds `logits` and each dumped NAME; for several sequences `logits_0`, `logits_1`, ..., `NAME_0`, ....

    \b
    tensorgraph logits model.gguf --ids ids.json --prefill 128 --out logits.npz
    tensorgraph logits model.gguf --ids a.npz:ids --ids b.npz:ids --chunk 7 --kv-type f32 --exact --out both.npz
    tensorgraph logits model.gguf --ids ids.json --dump blk.0.attn_out --dump blk.3.out --out taps.npz
    """
    count = options.thread_count(threads)
    options.limit_threads(count)
    import numpy as np

    from tensorgraph.compiler import CompileOptions
    from tensorgraph.models.text.model import load
    from tensorgraph.tools.lowerings import checked

    sequences = [read_ids(name) for name in ids]
    if not out.parent.is_dir() or out.is_dir():  # said before the work is done
        raise InputError(f"[logits] wanted --out as a file in a folder that is there; got {str(out)!r}")
    with options.working("loading"):
        chosen = CompileOptions(exact=exact, lowerings=tuple(lowering or ()))
        longest = max(map(len, sequences), default=1)
        how = options.placed(backend, gpu_layers, cpu_experts, longest, chunk or longest)
        loaded = load(model, kv_type=kv_type, options=chosen, threads=count, packed_cache=packed_cache, **how)
    with checked(loaded):
        results = evaluate(loaded, sequences, prefill, chunk, ("logits", *(dump or [])))
    arrays: dict[str, Any] = {}
    for i, values in enumerate(results):
        arrays |= {name if len(results) == 1 else f"{name}_{i}": value for name, value in values.items()}
    with out.open("wb") as file:  # a name without .npz stays as it is
        np.savez(file, **arrays)
    if as_json:
        written = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()}
        typer.echo(json.dumps({"out": str(out), "arrays": written}))


def read_ids(name: str) -> np.ndarray:
    """The token ids that FILE.json or FILE.npz[:ARRAY] holds.

    Raises:
        InputError: there is no such file or array, or it holds something else.
    """
    import numpy as np

    match = re.fullmatch(r"(.+\.npz)(?::(.+))?", name)
    path = Path(match[1] if match else name)
    try:
        if match:
            if path.is_file() and not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
                raise InputError(f"[ids] {path} holds no token ids: it is no .npz file")
            with np.load(path) as arrays:
                wanted = match[2] or ("input_ids" if "input_ids" in arrays.files else arrays.files[0])
                if wanted not in arrays.files or (match[2] is None and wanted != "input_ids" and len(arrays.files) > 1):
                    given = ", ".join(arrays.files[:20])
                    raise InputError(f"[ids] wanted {path}:ARRAY with one of its arrays {given}; got {name!r}")
                found = arrays[wanted]
        else:
            found = np.asarray(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"[ids] there is no file {str(path)!r}") from None
    except InputError:
        raise
    except (ValueError, OSError, IndexError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise InputError(f"[ids] {path} holds no token ids: {error}") from error
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise InputError(f"[ids] wanted a list of whole numbers in {name}; got {found.dtype}{list(found.shape)}")
    return np.asarray(found)


def evaluate(
    model: TextModel, sequences: Sequence[np.ndarray], prefill: int | None, chunk: int | None, outputs: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """Outputs of each sequence by name, rows by token; a sequence that is at its end takes no part in later steps."""
    import numpy as np

    plans = [list(cuts(len(ids), prefill, chunk)) for ids in sequences]
    steps = [[(i, plan[k]) for i, plan in enumerate(plans) if k < len(plan)] for k in range(max(map(len, plans)))]
    largest = max(sum(stop - start for _, (start, stop) in step) for step in steps)
    first = model.session(step_tokens=largest)
    sessions = [first, *(first.sibling() for _ in sequences[1:])]
    for session, ids in zip(sessions, sequences, strict=True):
        session._check(ids)  # all of them before the first step
    parts: list[list[dict[str, Any]]] = [[] for _ in sequences]
    for step in options.shown(steps, len(steps), "evaluating"):
        work = [(sessions[i], sequences[i][start:stop]) for i, (start, stop) in step]
        for (i, _), values in zip(step, first.batch(work, outputs=outputs, all_logits=True), strict=True):
            parts[i].append(values)
    joined = []
    for part in parts:
        for name in outputs:
            shapes = {values[name].shape[1:] for values in part}
            if len(shapes) > 1:
                raise InputError(f"[dump] the rows of {name} have another length in each step; use one chunk for all tokens")
        joined.append({name: np.concatenate([values[name] for values in part]) for name in outputs})
    return joined


def cuts(length: int, prefill: int | None, chunk: int | None) -> Iterator[tuple[int, int]]:
    """From where to where each step goes: chunks of the first `prefill` tokens, then one by one."""
    first = length if prefill is None else min(prefill, length)
    for start in range(0, first, chunk or max(first, 1)):
        yield start, min(start + (chunk or first), first)
    for start in range(first, length):
        yield start, start + 1
