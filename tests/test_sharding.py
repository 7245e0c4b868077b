"""The deep tests' rotation: every test is in exactly one part, nonsense is refused, what cannot run is said."""

from __future__ import annotations

import pytest

from tensorgraph.models.text.packaged import PACKAGED, Packaged
from tests.conftest import OPTIONAL, in_shard, shard
from tests.layout import ROOT


def test_every_test_is_in_exactly_one_part() -> None:
    names = [f"tests/test_x.py::test_{i}" for i in range(400)]
    parts = [sum(in_shard(name, part, 12) for part in range(12)) for name in names]
    assert parts == [1] * 400
    sizes = [sum(in_shard(name, part, 12) for name in names) for part in range(12)]
    assert min(sizes) > 15


@pytest.mark.parametrize(("text", "found"), [("3/12", (3, 12)), ("12", (5, 12)), ("0/1", (0, 1)), ("1", (0, 1))])
def test_the_day_picks_a_part_unless_one_is_given(text: str, found: tuple[int, int]) -> None:
    assert shard(text, day_of_year=125) == found


@pytest.mark.parametrize("text", ["12/12", "0", "a/3", "3/", "-1/4", ""])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="K/N"):
        shard(text, day_of_year=1)


def test_deep_tests_run_only_in_their_part(pytester: pytest.Pytester) -> None:
    with open(__file__.replace("test_sharding", "conftest")) as source:
        pytester.makeconftest(source.read())
    pytester.makeini("[pytest]\nmarkers = deep: long\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.deep
        @pytest.mark.parametrize("i", range(24))
        def test_long(i): assert i >= 0

        def test_short(): assert True
        """
    )
    pytester.runpytest().assert_outcomes(passed=1, deselected=24)
    pytester.runpytest("--deep-shard", "0/1").assert_outcomes(passed=25)
    counts = [pytester.runpytest("--deep-shard", f"{part}/3").parseoutcomes()["passed"] - 1 for part in range(3)]
    assert sum(counts) == 24 and max(counts) < 24


@pytest.mark.parametrize("installed", [True, False])
def test_a_file_runs_where_its_model_is_installed_and_is_named_where_not(
    installed: bool, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((file, model),) = OPTIONAL.items()
    assert (ROOT / "tests" / file).is_file()
    monkeypatch.setitem(PACKAGED, model, Packaged(("jinja2==3" if installed else "that-nobody-has==1",), "*", "its terms"))
    with open(__file__.replace("test_sharding", "conftest")) as source:
        pytester.makeconftest(source.read())
    pytester.makepyfile(test_short="def test_short(): assert True")
    (pytester.path / file).parent.mkdir()
    (pytester.path / file).write_text("def test_real(): assert True")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1 + installed)
    said = f"tests/{file} did not run: {model} is not installed; make test-deep installs it"
    assert (said in result.outlines) is not installed
