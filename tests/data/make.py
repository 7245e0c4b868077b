"""Packs the reference data that the tests need: `python tests/data/make.py REFERENCE_FOLDER` fills this folder.

Each file is compressed as it is, or kept as a recipe where another file already holds the same weights (the quantised
GGUFs) or where most of it follows from the rest (lists of BPE merges). Every result is unpacked again and compared.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import lzma
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests import reference  # noqa: E402  (it unpacks; packing shares its reader of strings)

PLAIN_BYTES = 8192  # smaller texts stay readable
ARCHITECTURES = (
    *("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4"),
    *("qwen3", "qwen3moe", "gemma3"),
)
AS_UPSTREAM = "deepseek_v4/upstream_mxfp4"
OWN = ("qwen2", "gpt_oss", "smollm3", "bert")
"""Models that `from_transformers.py` makes."""
PUBLISHED_TOKENIZERS = {"llama": "tokenizer.json", "qwen3": "tokenizer.json", "gemma3": "tokenizer.model"}
QUANTISED = {
    "llama": ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    "deepseek_v3": ("q8_0",),
    "deepseek_v4": ("mxfp4",),
    "qwen3moe": ("q8_0",),
    "gemma3": ("q8_0",),
}
BPE_VOCABULARIES = ("gpt-2", "llama-bpe", "deepseek-llm", "qwen2")
OTHER_VOCABULARIES = ("llama-spm", "bert-bge")
OP_FAMILIES = (
    "unary glu binary norm soft_max rope flash_attn_ext mul_mat mul_mat_id get_rows set_rows sort reduce cpy shape dsv4"
).split()
OP_DTYPES = set("f32 f16 bf16 i32 i64 q8_0 q4_0 q4_1 q5_0 q5_1 mxfp4 nvfp4 q1_0 q2_0".split()) | set(
    "tq1_0 tq2_0 iq4_nl iq4_xs q2_K q3_K q4_K q5_K q6_K".split()
)


def plain_names(root: Path) -> Iterator[str]:
    """Files kept as they are, or compressed as they are."""
    for arch in ARCHITECTURES:
        for name in (f"{arch}-f32.gguf", "reference.npz", "config.json", "config.transformers.json",
                     "tokenizer_ref.json", "report.json"):  # fmt: skip
            yield f"{arch}/{name}"
        if arch in PUBLISHED_TOKENIZERS:
            beside = ("tokenizer_config.json", "generation_config.json")
            yield from (f"{arch}/{name}" for name in (PUBLISHED_TOKENIZERS[arch], *beside))
        if arch in QUANTISED:
            yield f"{arch}/quant_refs.npz"
    yield f"{AS_UPSTREAM}/config.json"
    for folder in ("real_smollm2", "real_gemma3", "real_minilm", "templates"):
        yield from sorted(path.relative_to(root).as_posix() for path in (root / folder).iterdir())
    for name in (*BPE_VOCABULARIES, *OTHER_VOCABULARIES):
        yield f"vocab/ggml-vocab-{name}.gguf.inp"
        yield f"vocab/ggml-vocab-{name}.gguf.out"
    yield from (f"vocab/ggml-vocab-{name}.gguf" for name in OTHER_VOCABULARIES)


def stored_npz(arrays: reference.Arrays) -> bytes:
    """An .npz without compression: xz then sees equal arrays as equal."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def smallest(content: bytes) -> tuple[str, bytes]:
    """The shortest of bz2 and xz with the settings that suit 4-byte numbers and texts."""
    tries = [(".bz2", bz2.compress(content))]
    for lc, lp, pb in ((0, 2, 2), (1, 3, 3), (3, 0, 2)):
        lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": lp, "pb": pb}
        tries.append((".xz", lzma.compress(content, format=lzma.FORMAT_XZ, filters=[lzma2])))
    return min(tries, key=lambda option: len(option[1]))


def quantised_recipe(root: Path, source: str, name: str) -> reference.Arrays:
    """How to make GGUF `name` from GGUF `source`, which holds the same tensors in F32."""
    from gguf import GGUFReader

    starts = {tensor.name: tensor.data_offset for tensor in GGUFReader(root / source).tensors}
    reader = GGUFReader(root / name)
    tensors = []
    for tensor in reader.tensors:
        columns = int(tensor.shape[0])
        rows = int(tensor.n_elements) // columns
        tensors.append((tensor.data_offset, int(tensor.tensor_type), starts[tensor.name], rows, columns))
    content = (root / name).read_bytes()
    head = np.frombuffer(content[: reader.data_offset], np.uint8)
    numbers = np.array(tensors, np.int64)
    return {"head": head, "tensors": numbers, "source": np.array(source), "size": np.array(len(content))}


def merges_recipe(path: Path) -> reference.Arrays:
    """A BPE vocabulary with each merge as the step to the token that it spells and the length of its left half."""
    from gguf import GGUFReader

    content, fields = path.read_bytes(), GGUFReader(path).fields

    def array(key: str) -> tuple[int, list[bytes]]:
        field = fields[key]
        start = field.offset + 8 + len(key) + 4 + 4 + 8  # the key's string, two types, the count
        (count,) = struct.unpack_from("<Q", content, start - 8)
        return start, reference.strings(content, start, count)

    tokens_at, tokens = array("tokenizer.ggml.tokens")
    merges_at, merges = array("tokenizer.ggml.merges")
    index = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(b" ") for merge in merges]
    ids = np.array([index[left + right] for left, right in pairs])
    end = merges_at + sum(8 + len(merge) for merge in merges)
    return {
        "head": np.frombuffer(content[:merges_at], np.uint8),
        "tail": np.frombuffer(content[end:], np.uint8),
        "tokens_at": np.array(tokens_at),
        "n_tokens": np.array(len(tokens)),
        "steps": np.diff(ids, prepend=0).astype(np.int32),
        "splits": np.array([len(left) for left, _ in pairs], np.uint16),
    }


def rows_recipe(root: Path, source: str, name: str) -> reference.Arrays:
    """How to make safetensors file `name` from the rows and columns of GGUF `source`, which holds the same numbers in F32."""
    from gguf import GGMLQuantizationType, GGUFReader

    content = (root / source).read_bytes()
    floats = np.frombuffer(content[: len(content) // 4 * 4], "<u4")
    places: dict[bytes, tuple[int, int]] = {}
    for tensor in GGUFReader(root / source).tensors:
        if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.I32):
            begin, columns = int(tensor.data_offset) // 4, int(tensor.shape[0])
            rows = int(tensor.shape[1]) if len(tensor.shape) > 1 else 1
            for at in range(begin, begin + int(tensor.n_elements), rows * columns):
                for row in range(rows):
                    start = at + row * columns
                    places.setdefault(floats[start : start + columns].tobytes(), (start, 1))
                for column in range(columns if rows > 1 else 0):
                    places.setdefault(floats[at + column : at + rows * columns : columns].tobytes(), (at + column, columns))
    published = (root / name).read_bytes()
    (length,) = struct.unpack_from("<Q", published)
    described = json.loads(published[8 : 8 + length])
    described.pop("__metadata__", None)
    starts, steps, counts, sizes, kept = [], [], [], [], []
    for tensor in sorted(described.values(), key=lambda tensor: tensor["data_offsets"][0]):
        begin, end = (8 + length + offset for offset in tensor["data_offsets"])
        size = {"BF16": 2, "F32": 4}.get(tensor["dtype"], 0)
        columns = tensor["shape"][-1] if tensor["shape"] and size else 0
        width = columns * size or max(end - begin, 1)
        for at in range(begin, end, width):
            row = published[at : at + width]
            wide = (np.frombuffer(row, "<u2").astype("<u4") << 16).tobytes() if size == 2 else row
            start, step = places.get(wide, (-1, 0))
            starts.append(start)
            steps.append(step)
            counts.append(columns if start >= 0 else width)
            sizes.append(size)
            if start < 0:
                kept.append(row)
    return {
        "head": np.frombuffer(published[: 8 + length], np.uint8),
        "kept": np.frombuffer(b"".join(kept), np.uint8),
        "source": np.array(source),
        "starts": np.array(starts, np.int64),
        "steps": np.array(steps, np.int32),
        "counts": np.array(counts, np.int32),
        "sizes": np.array(sizes, np.uint8),
    }


def op_cases(root: Path) -> dict[str, bytes]:
    """`ops/` without the families and element types that nothing here computes."""
    index: dict[str, Any] = json.loads((root / "ops/index.json").read_text())
    wanted = [
        case
        for case in index["cases"]
        if case["family"] == "get_rows"  # the exact decode of every block type
        or case["family"] in OP_FAMILIES
        and {part["dtype"] for part in (*case["srcs"], case["out"])} <= OP_DTYPES
    ]
    index["cases"], index["n_cases"] = wanted, len(wanted)
    files = {"ops/index.json": json.dumps(index, indent=1).encode()}
    for family in OP_FAMILIES:
        with np.load(root / f"ops/{family}.npz") as stored:
            prefixes = tuple(f"{case['id']}." for case in wanted if case["family"] == family)
            files[f"ops/{family}.npz"] = stored_npz({key: stored[key] for key in stored if key.startswith(prefixes)})
    return files


def main(root: Path, own: Path) -> None:
    """Packs what is not packed already, writes `manifest.json`, unpacks everything again.

    Args:
        root: the reference data. own: a folder for each of `OWN`, as `from_transformers.py` made it.
    """
    entries: dict[str, dict[str, Any]] = {}
    before = reference.manifest() if (HERE / "manifest.json").is_file() else {}
    wanted: set[Path] = set()

    def keep(name: str, content: bytes, recipe: reference.Arrays | None = None) -> None:
        target, digest = HERE / name, hashlib.sha256(content).hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        if recipe is None and len(content) < PLAIN_BYTES and not name.endswith((".npz", ".gguf")):
            target.write_bytes(content)
            wanted.add(target)
            return
        old = before.get(name)
        if old is not None and old["sha256"] == digest and (HERE / old["packed"]).is_file():  # packing takes long
            entries[name] = old
            wanted.add(HERE / old["packed"])
            return
        suffix, packed = smallest(content if recipe is None else stored_npz(recipe))
        holder = f"{name}{'' if recipe is None else '.recipe'}{suffix}"
        (HERE / holder).write_bytes(packed)
        wanted.add(HERE / holder)
        entries[name] = {"packed": holder, "size_bytes": len(content), "sha256": digest}

    for name in plain_names(root):
        content = (root / name).read_bytes()
        if name.endswith(".npz"):
            with np.load(root / name) as stored:
                content = stored_npz(dict(stored))
        keep(name, content)
    for name, content in op_cases(root).items():
        keep(name, content)
    for arch, kinds in QUANTISED.items():
        for kind in kinds:
            name = f"{arch}/{arch}-{kind}.gguf"
            keep(name, (root / name).read_bytes(), quantised_recipe(root, f"{arch}/{arch}-f32.gguf", name))
    for folder in (*ARCHITECTURES, AS_UPSTREAM):
        name, arch = f"{folder}/model.safetensors", folder.partition("/")[0]
        keep(name, (root / name).read_bytes(), rows_recipe(root, f"{arch}/{arch}-f32.gguf", name))
    for vocabulary in BPE_VOCABULARIES:
        name = f"vocab/ggml-vocab-{vocabulary}.gguf"
        keep(name, (root / name).read_bytes(), merges_recipe(root / name))

    for name in OWN:
        for file in ("config.json", "report.json", "model.safetensors", "reference.npz"):
            content = (own / name / file).read_bytes()
            if file.endswith(".npz"):
                with np.load(own / name / file) as stored:
                    content = stored_npz(dict(stored))
            keep(f"{name}/{file}", content)
    for left in HERE.rglob("*"):
        if left.is_file() and left.parent != HERE and left not in wanted:
            left.unlink()
    (HERE / "manifest.json").write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    reference.manifest.cache_clear()
    reference.cache_folder.cache_clear()
    for name in entries:
        reference.reference_path(name)
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{len(entries)} packed files, {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/data/make.py REFERENCE_FOLDER OWN_FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
