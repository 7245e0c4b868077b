"""Folders as published on model hubs: the weights that the peer's conversion gives, parts, and damaged files refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import as_dtype
from tensorgraph.engine import Engine
from tensorgraph.errors import FormatError, InputError, ShapeError, TensorGraphError, UnknownNameError
from tensorgraph.models import load
from tensorgraph.models.architecture import model_from_checkpoint
from tensorgraph.models.text.checkpoint import INDEX, WHOLE, Checkpoint, WeightInfo
from tensorgraph.models.text.gguf import GGUF
from tests.models import tiny
from tests.reference import reference_path

FOLDERS = [*(a for a in tiny.ARCHITECTURES if a not in tiny.FOLDERS), "deepseek_v4/upstream_mxfp4"]


def folder_of(name: str, at: Path, *more: str) -> Path:
    """A copy to be changed."""
    shutil.copytree(tiny.folder(name, *more), at, dirs_exist_ok=True)
    return at


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_those_of_the_gguf_file(name: str) -> None:
    """Which the peer converted; of those in the same type to the bit."""
    architecture = name.partition("/")[0]
    kind = "mxfp4" if "mxfp4" in name else "f32"
    checkpoint = Checkpoint.open(tiny.folder(name))
    model_from_checkpoint(checkpoint)
    with GGUF.open(reference_path(f"{architecture}/{architecture}-{kind}.gguf")) as wanted:
        assert set(checkpoint.tensors) == set(wanted.tensors) and checkpoint.unused == []
        for weight, info in wanted.tensors.items():
            got, want = checkpoint.data(weight), wanted.data(weight)
            assert checkpoint.tensors[weight].shape == tuple(info.shape), weight
            np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=weight)
    checkpoint.close()
    with pytest.raises(InputError, match="is closed"):
        checkpoint.data("token_embd.weight")


@tiny.on_every_backend
@pytest.mark.parametrize("name", FOLDERS)
def test_logits(backend: str, name: str) -> None:
    architecture = name.partition("/")[0]
    model = model_from_checkpoint(Checkpoint.open(tiny.folder(name)))
    engine = Engine(model, backend, kv_dtype="f32", options=CompileOptions(exact=True))
    found = tiny.nmse(tiny.whole(engine, tiny.tokens(architecture)), tiny.reference(architecture)["logits"])
    assert found <= tiny.bound(architecture), f"NMSE {found:.1e}"


def split(folder: Path, n: int) -> dict[str, str]:
    """Its weights in n parts, and an index of them."""
    with safe_open(folder / WHOLE, framework="numpy") as whole:
        tensors = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118 (no mapping)
    (folder / WHOLE).unlink()
    parts = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name in tensors if parts[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": parts}))
    return parts


def test_parts(tmp_path: Path) -> None:
    whole = Checkpoint.open(tiny.folder("qwen3moe"))
    split(folder_of("qwen3moe", tmp_path / "parts"), 3)
    parts = Checkpoint.open(tmp_path / "parts")
    assert len({tensor.file for tensor in parts.stored.values()}) == 3
    for checkpoint in (whole, parts):
        model_from_checkpoint(checkpoint)
    assert whole.tensors == parts.tensors
    for name in whole.tensors:
        np.testing.assert_array_equal(whole.data(name), parts.data(name))


def test_experts_in_mxfp4_as_gpt_oss_publishes_them(tmp_path: Path) -> None:
    """A byte holds elements 2j (its low half) and 2j + 1; 2**(scale - 127) times one of sixteen numbers."""
    rng, folder, name = np.random.default_rng(5), folder_of("gpt_oss", tmp_path), "model.layers.1.mlp.experts.gate_up_proj"
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    blocks = rng.integers(0, 256, (6, 128, 3, 16), dtype=np.uint8)  # [E, 2 F, D / 32, 16]
    scales = rng.integers(120, 130, (6, 128, 3), dtype=np.uint8)
    want = np.stack([numbers[blocks & 15], numbers[blocks >> 4]], -1).reshape(6, 128, 3, 32) * np.exp2(scales - 127.0)[..., None]

    def packed(held: dict[str, Any]) -> None:
        del held[name]
        held[f"{name}_blocks"], held[f"{name}_scales"] = blocks, scales

    tensors(packed)(folder)
    checkpoint = Checkpoint.open(folder)
    model_from_checkpoint(checkpoint)
    for which, first in (("gate", 0), ("up", 1)):
        weight = f"blk.1.ffn_{which}_exps.weight"
        assert checkpoint.tensors[weight] == WeightInfo((6, 64, 96), as_dtype("mxfp4"))
        got = registry.decoders.get("mxfp4")(checkpoint.data(weight))
        np.testing.assert_array_equal(got, want.reshape(6, 128, 96)[:, first::2])
    assert checkpoint.tensors["blk.0.ffn_gate_exps.weight"].dtype.name == "bf16" and checkpoint.unused == []


def test_text_of_a_folder(tmp_path: Path) -> None:
    """Tokenizer, template and special tokens come from the files beside the weights."""
    folder = folder_of("qwen3", tmp_path, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    with load(folder) as model:
        cases = json.loads(reference_path("qwen3/tokenizer_ref.json").read_text())["cases"]
        for case in cases:
            assert model.tokenizer.encode(case["text"], add_special=False) == case["ids"]
        with pytest.raises(FormatError, match="chat_template.jinja in .*, or text as chat_template .*; got NoneType"):
            model.encode_chat([{"role": "user", "content": "a"}])
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for given in (template, [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": given}))
        with load(folder) as model:
            text = model.chat_template.render([{"role": "user", "content": "a"}])
            assert text == f"{config['bos_token']}[user]a"
    (folder / "chat_template.jinja").write_text("own")
    with load(folder) as model, model.session(context=64) as session:
        assert model.chat_template.render([]) == "own"
        prompt = model.tokenizer.encode("hello")
        list(session.generate("hello", max_tokens=3))
        assert session.ids[: len(prompt)] == prompt and session.length > len(prompt)


Damage = Callable[[Path], Any]


def index_says(part: str) -> Damage:
    def damage(folder: Path) -> None:
        parts = split(folder, 2)
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: part for name in parts}}))

    return damage


def without(key: str) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def says(key: str, value: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    return damage


def cut(folder: Path) -> None:
    content = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(content[:-10])


def tensors(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        with safe_open(folder / WHOLE, framework="numpy") as whole:
            held = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118 (no mapping)
        change(held)
        save_file(held, folder / WHOLE)

    return damage


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
DAMAGED: dict[str, tuple[Damage, type[TensorGraphError], str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), InputError, "no file .*config.json"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), FormatError, "JSON object in .*; got list"),
    "configuration is cut": (lambda f: (f / "config.json").write_text('{"a'), FormatError, "is not JSON"),
    "no architecture": (without("architectures"), FormatError, "a list of names as 'architectures'"),
    "no hidden size": (without("hidden_size"), FormatError, "no 'hidden_size'"),
    "no weights": (lambda f: (f / WHOLE).unlink(), InputError, "no file .*model.safetensors"),
    "weights are cut": (cut, FormatError, "no whole safetensors file"),
    "weights are text": (lambda f: (f / WHOLE).write_text("weights"), FormatError, "no whole safetensors file"),
    "a part is missing": (index_says("model-9.safetensors"), InputError, "no file .*model-9.safetensors"),
    "a part is elsewhere": (index_says("../other.safetensors"), FormatError, "names of files beside .*; got '../other"),
    "a part is a number": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), FormatError, "weight_map of file names"),
    "a tensor is in another part": (index_says("model-00001-of-00002.safetensors"), FormatError, "no tensor .*, which .*index"),
    "a tensor is missing": (tensors(lambda t: t.pop("model.norm.weight")), UnknownNameError, "output_norm.weight is missing"),
    "an expert is missing": (tensors(lambda t: t.pop(EXPERT)), UnknownNameError, "ffn_up_exps.weight is missing"),
    "an expert is larger": (
        tensors(lambda t: t.update({EXPERT: np.zeros((2, 2), np.float32)})), FormatError, "differ in shape or type",
    ),
    "a number of experts without end": (says("num_experts", 2**31 - 1), FormatError, "num_experts must be from 1 to 4096"),
    "experts that are vectors": (
        tensors(lambda t: t.update({n: np.zeros(4, np.float32) for n in t if ".experts." in n})), ShapeError, "ffn_gate_exps",
    ),
    "weights of bools": (
        tensors(lambda t: t.update({"model.norm.weight": np.zeros(96, np.bool_)})), FormatError, "norm.weight is of type BOOL",
    ),
}  # fmt: skip


def changed(end: str, change: Callable[[Any], Any]) -> Damage:
    """Tensors whose names end so."""
    return tensors(lambda held: held.update({n: np.ascontiguousarray(change(a)) for n, a in held.items() if n.endswith(end)}))


def few_scales(held: dict[str, Any]) -> None:
    held[f"{EXPERTS}_blocks"], held[f"{EXPERTS}_scales"] = np.zeros((6, 128, 3, 16), np.uint8), np.zeros((6, 128, 2), np.uint8)


EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
MISFITS: dict[str, tuple[str, Damage, str]] = {
    "rows of no whole heads": ("deepseek_v3", changed("kv_b_proj.weight", lambda a: a[:-1]), "attn_k_b"),
    "latents of one axis": ("deepseek_v3", changed("kv_b_proj.weight", lambda a: a[0]), "attn_k_b"),
    "experts of two axes": ("gpt_oss", changed("gate_up_proj", lambda a: a[0]), "ffn_gate_exps"),
    "fewer scales than codes": ("gpt_oss", tensors(few_scales), "ffn_gate_exps"),
    "layers of too few types": ("gpt_oss", says("layer_types", ["full_attention"]), "layer_types must have one for each layer"),
    "a layer of another type": ("gpt_oss", says("layer_types", ["chunked_attention"] * 4), "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    folder, damage, message = MISFITS[name]
    damage(folder_of(folder, tmp_path))
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGED[name]
    damage(folder_of("qwen3moe", tmp_path))
    with pytest.raises(error, match=message):
        load(tmp_path).session(context=32)
