"""`tensorgraph lowerings`, and the option by which other commands name a form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.backends.cpu.measured import all_kept, keep, kept
from tensorgraph.backends.cpu.target import TARGETS, host
from tensorgraph.compiler import CompileOptions
from tensorgraph.ops.attention import row_costs_cpu as row_costs
from tensorgraph.ops.attention.candidates_cpu import FORMS, SCALE, RowCosts
from tensorgraph.tools import lowerings
from tests.tools.commands import arrays, as_json, gguf, ok, refused


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(row_costs, "ROUNDS", 1)
    monkeypatch.setattr(row_costs, "_KNOWN", {})
    return tmp_path


def test_costs_are_measured_once_and_kept() -> None:
    assert kept(row_costs.NAME, host(), RowCosts._fields, row_costs.MOST) is None
    found = as_json("lowerings")
    assert found["scale"] == SCALE and set(found["costs"]) == set(RowCosts._fields)
    assert kept(row_costs.NAME, host(), RowCosts._fields, row_costs.MOST) == found["costs"]
    keep(row_costs.NAME, host(), {"listed": 123, "next": 45})
    row_costs._KNOWN.clear()
    assert "as 1.2 queries do with it where it is listed, 0.5 where it lies behind the last" in ok("lowerings")
    assert as_json("lowerings", "--measure")["costs"] != {"listed": 123, "next": 45}
    assert row_costs.row_costs(host())._asdict() != {"listed": 123, "next": 45}


def test_what_is_kept_may_be_anything(folder: Path) -> None:
    keep(row_costs.NAME, host(), {"listed": 7, "next": 8})
    (place,) = (folder / "tensorgraph" / "measured").iterdir()
    before = all_kept(host())
    wrong = ["", "[1]", '{"listed": 1}', '{"listed": "x", "next": 2}', "\0", '{"listed": Infinity, "next": 2}', "[" * 100000]
    wrong += ['{"listed": -1, "next": 2}', '{"listed": 1e9, "next": 2}']
    for content in (*(text.encode() for text in wrong), b"\xff\xfe\x00\x80"):
        place.write_bytes(content)
        assert kept(row_costs.NAME, host(), RowCosts._fields, row_costs.MOST) is None
        assert all_kept(host()) != before
    assert all_kept(TARGETS["baseline"]) == ""


def test_a_target_that_does_not_run_here_is_not_measured() -> None:
    (other,) = [target for target in TARGETS.values() if target.family != host().family][:1]
    assert row_costs.row_costs(other) == row_costs.USUAL


def test_without_a_folder_costs_hold_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert row_costs.measure_again(host()) == row_costs.row_costs(host())


def test_times_on_which_costs_are_based() -> None:
    """A query takes what each of 36 more of them adds; a row the rest."""
    query_s, copy_s = 3e-6, 20e-6
    few, many = (copy_s + n * query_s for n in (row_costs.FEW_HEADS, row_costs.MANY_HEADS))
    assert row_costs.cost(few, many) == round(100 * copy_s / query_s)
    assert row_costs.cost(1.0, 1.0) <= row_costs.MOST  # a clock that stood still
    assert row_costs.cost(1e-9, 1.0) == 0


def test_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "TOKENS", (1, 6))
    monkeypatch.setattr(lowerings, "ROWS", (1.5, 4))
    found = as_json("lowerings", "--grid", "--heads", 5, "--listed", 20, "-r", 1)["grid"]
    assert [(one["tokens"], one["rows"]) for one in found] == [(1, 30), (1, 80), (6, 30), (6, 80)]
    for one in found:
        assert set(one["ms"]) == {*FORMS, "chosen"} and one["best"] == min(FORMS, key=one["ms"].__getitem__)
        assert one["ratio"] == one["ms"]["chosen"] / one["ms"][one["best"]]  # of one round
    table = ok("lowerings", "--grid", "--heads", 5, "--listed", 20, "-r", 1)
    assert "5 heads, 20 rows listed, 0% of them by all tokens" in table and len(table.splitlines()) == 8


def test_forms_by_name(tmp_path: Path) -> None:
    """Logits of a model in the forms of its attention; and a name that there is not."""
    (tmp_path / "ids.json").write_text(json.dumps([(7 * i) % 200 for i in range(60)]))
    common = ("logits", gguf("deepseek_v32"), "--ids", tmp_path / "ids.json", "--kv-type", "f32", "--exact")
    found = {}
    for form in FORMS:
        ok(*common, "--lowering", form, "--lowering", "selected rows", "--out", tmp_path / form)
        found[form] = arrays(tmp_path / form)["logits"]
    for form in FORMS:
        np.testing.assert_allclose(found[form], found["gather"], rtol=0, atol=2e-5)
    assert len({logits.tobytes() for logits in found.values()}) > 1  # sums in another order
    line = refused(*common, "--lowering", "scatter", "--out", tmp_path / "no")
    assert "[lowering] there is no form 'scatter'; the model's: " in line and "gather, union, masked" in line
    assert "every row" in line and not (tmp_path / "no").exists()
    assert CompileOptions(lowerings=("gather",)).key != CompileOptions().key


def test_models_without_forms_say_so() -> None:
    assert "the model's: gather, union, masked" in refused("run", gguf("llama"), "-p", "a", "--lowering", "naive")
