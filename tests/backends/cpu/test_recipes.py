"""Code found by what it was written from: the same for the same source, and never for what another package has a hand in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.backends.cpu import device, kernel, recipes
from tensorgraph.backends.cpu.code_cache import CodeCache
from tensorgraph.backends.cpu.device import Code
from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.program import OperandKey, Recipe
from tensorgraph.backends.cpu.target import host
from tensorgraph.backends.cpu.weights import FORMS, interleaved, read_units, write_units
from tensorgraph.dtypes import BY_NAME, as_dtype
from tensorgraph.op import Op
from tensorgraph.ops.rows.get_rows_cpu import emit_get_rows

KEYS = (
    OperandKey("source", "u8", "dense", (None,) * 3, (None, None, 1), False),
    OperandKey("to", "u8", "dense", (1,), (1,), False),
)
RECIPE = Recipe(write_units, ("source", "to"), KEYS, (("dtype", "q8_0"),))
OTHERS = [
    RECIPE._replace(emit=read_units),
    RECIPE._replace(names=("source", "at")),
    RECIPE._replace(keys=(KEYS[0]._replace(offset=True), KEYS[1])),
    RECIPE._replace(keys=(None, KEYS[1])),
    RECIPE._replace(attrs=(("dtype", "q4_1"),)),
    RECIPE._replace(attrs=(("dtype", 1),)),
    RECIPE._replace(attrs=(("dtype", 1.0),)),
    RECIPE._replace(attrs=(("dtype", True),)),
    RECIPE._replace(attrs=(("dtype", as_dtype("q8_0")),)),
    RECIPE._replace(attrs=(("dtype", partial(write_units, dtype="q8_0")),)),
]


@pytest.fixture(autouse=True)
def whole_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With all kernels, so that what these tests do not bring themselves is this package's; and no file just edited."""
    monkeypatch.setattr(recipes, "_last_change_s", lambda: 0.0)
    interleaved(as_dtype("f32"))
    for name in registry.ops:
        registry.ops.get(name).kernel("cpu")
    yield


def test_keys_differ_where_texts_may() -> None:
    keys = [key_of(recipe) for recipe in (RECIPE, *OTHERS)]
    assert None not in keys and len({*keys, key_of(RECIPE, "another compiler")}) == len(keys) + 1
    assert key_of(RECIPE._replace()) == keys[0]


def key_of(recipe: Recipe, compiler: str = "a compiler") -> str | None:
    return recipes.keys_of([recipe], compiler).get(recipe)


def test_another_layout_of_a_type_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(RECIPE)
    monkeypatch.setitem(BY_NAME, "q8_0", replace(as_dtype("q8_0"), block_bytes=36))
    assert None is not key_of(RECIPE) != before


def test_no_keys_where_source_has_changed_or_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(RECIPE) is not None
    monkeypatch.setattr(recipes, "_last_change_s", time.time)
    assert key_of(RECIPE) is None
    monkeypatch.setattr(recipes, "_last_change_s", lambda: 0.0)
    monkeypatch.setattr(recipes, "_digest", lambda: None)
    assert key_of(RECIPE) is None


def test_the_last_change_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "a.py").write_text("")
    monkeypatch.setattr(recipes, "_all_files", lambda: (str(tmp_path / "a.py"),))
    os.utime(tmp_path / "a.py", (0, 0))  # as an installer would
    assert abs(recipes._last_change_s() - time.time()) < 60
    monkeypatch.setattr(recipes, "_all_files", lambda: (str(tmp_path / "b.py"),))
    assert recipes._last_change_s() > time.time()


@pytest.mark.parametrize("value", [object(), lambda k: None, np.float32(1), np.add, print, test_keys_differ_where_texts_may])
def test_what_cannot_be_described_has_no_key(value: Any) -> None:
    assert key_of(RECIPE._replace(attrs=(("f", value),))) is None
    inner = partial(write_units, value)
    assert key_of(RECIPE._replace(attrs=(("f", (1, inner)),))) is None


@pytest.mark.parametrize("part", ["write", "row_values"])
def test_another_packages_form_of_weights_switches_it_off(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes.only_ours()
    theirs: Any = {part: lambda k, *rest: None}
    monkeypatch.setitem(FORMS, "test_type", replace(FORMS["q4_1"], **theirs))
    assert not recipes.only_ours()


@pytest.mark.parametrize("change", [{"centre": 7}, {"table": (3, 1)}, {"unit": 0.5}, {"has_min": False}, {"factors": "i8"}])
def test_other_codes_of_a_type_are_another_key(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before, codes = key_of(RECIPE), FORMS["q4_k"].codes
    assert codes is not None
    monkeypatch.setitem(FORMS, "q4_k", replace(FORMS["q4_k"], codes=replace(codes, **change)))
    assert None is not key_of(RECIPE) != before


def test_another_packages_op_switches_it_off() -> None:
    Op("test_recipe_op", "x[...]: real -> y[...]: x")
    try:
        assert not recipes.only_ours()
    finally:
        registry.ops.remove("test_recipe_op")
    assert recipes.only_ours()


def test_another_packages_formula_for_an_op_of_ours_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.ops.get("add")
    monkeypatch.setattr(op, "kernels", dict(op.kernels))
    cpu_formula(op)(lambda k, a, b: a + b)
    assert not recipes.only_ours()


def test_code_is_found_without_writing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = code(tmp_path), code(tmp_path)
    first.kernels([RECIPE, RECIPE])
    assert first.jit.stats.compiled > 0
    monkeypatch.setattr(device, "write_kernel", refuse)
    compiled = second.jit.stats.compiled
    assert second.kernels([RECIPE])[0] > 0 and second.jit.stats.compiled == compiled
    with pytest.raises(AssertionError, match="written"):
        second.kernels([RECIPE._replace(attrs=(("dtype", "q4_1"),))])


@pytest.mark.parametrize("how", ["no object", "another's", "no text", "no entry", "null"])
def test_a_wrong_entry_is_written_again(how: str, tmp_path: Path) -> None:
    first, second = code(tmp_path), code(tmp_path)
    first.kernels([RECIPE])
    (key,) = {p.name for p in tmp_path.iterdir()} & {key_of(RECIPE, first.jit.key_of(""))}
    cache = CodeCache(tmp_path)
    kept = cache.get(key)
    assert kept is not None
    entry = recipes.read_entry(kept)
    assert entry is not None
    if how == "no object":
        (tmp_path / entry.object_key).unlink()
    else:
        cache.put(key, {"another's": b'["0000", []]', "no text": b"\xff", "no entry": b'["0000", [1]]', "null": b"null"}[how])
    compiled = second.jit.stats.compiled
    assert second.kernels([RECIPE])[0] > 0
    assert second.jit.stats.compiled == compiled + (how == "no object") and CodeCache(tmp_path).get(key) == kept


def test_refusals_are_still_worded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel refuses is said by a process, too, that has not written it."""
    shapes = {"a": ("f32", 4, 8), "ids": ("i32", 3), "y": ("f32", 3, 8)}
    keys = tuple(OperandKey(n, d, "dense", tuple(s), (*s[1:], 1), False) for n, (d, *s) in shapes.items())
    recipe = Recipe(emit_get_rows, tuple(shapes), keys)
    code(tmp_path).kernels([recipe])
    said = dict(kernel.MESSAGES)
    monkeypatch.setattr(kernel, "MESSAGES", {})
    monkeypatch.setattr(device, "write_kernel", refuse)
    code(tmp_path).kernels([recipe])
    assert kernel.MESSAGES and kernel.MESSAGES.items() <= said.items()


def code(folder: Path) -> Code:
    made = Code(host())
    made.jit.cache = CodeCache(folder)
    return made


def refuse(*_: Any) -> str:
    raise AssertionError("written")


def test_the_digest_is_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.py", "deep/b.py"):
        (tmp_path / name).write_text("x = 1\n")
    seen = [recipes.digest_of([str(tmp_path)])]
    for name, text in (("a.py", "x = 2\n"), ("deep/b.py", "x = 2\n"), ("c.py", "")):
        (tmp_path / name).write_text(text)
        seen.append(recipes.digest_of([str(tmp_path)]))
    (tmp_path / "c.py").rename(tmp_path / "d.py")
    seen.append(recipes.digest_of([str(tmp_path)]))
    (tmp_path / "notes.txt").write_text("no source")
    assert len(set(seen)) == 5 and recipes.digest_of([str(tmp_path)]) == seen[-1]
    for place in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=place):
            recipes.digest_of([str(tmp_path), str(tmp_path / place)])
