"""An op of a user's own with its kernel, in one folder: imported, it computes, conforms and is listed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.compiler import compile
from tensorgraph.dims import Dim
from tensorgraph.graph import Graph, constant, input
from tensorgraph.op import Op
from tensorgraph.ops import mul_mat, rms_norm
from tensorgraph.tools.conformance import check
from tests.tools.commands import as_json, ok, tg

DECLARED = '''
"""Each element's share of its row."""

import numpy as np

from tensorgraph.op import Attr, Op

share = Op("user_share", "x[..., D]: float, w[D]?: real -> y[..., D]: x", attrs={"a": Attr(float, low=0.5)}, source="its author")


@share.reference
def reference(x, w, *, a):
    y = x / (a + np.sum(np.abs(x), -1, keepdims=True))
    return y if w is None else y * w


@share.law
def is_at_most_one(run, x, w, *, a):
    assert not np.any(np.abs(run(x, None, a=a)) > 1)
'''

KERNEL = '''
"""Shares on the CPU, in f64."""

from tensorgraph.backends.cpu.ir import F64
from tensorgraph.backends.cpu.kernel import cpu_kernel
from user_family.share import share


@cpu_kernel(share)
def emit_share(k, x, w, y, *, a):
    width, lanes = y.shape[-1], k.lanes
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def add(i, mask, sums):
            return [sums[0] + k.unary("fabs", k.convert(row.load(i, lanes, mask), F64))]

        (sums,) = k.sweep(width, add, [k.zero(F64.x(lanes))])
        total = k.sum(sums) + a

        def write(i, mask, _):
            v = k.convert(row.load(i, lanes, mask), F64) / total
            if w is not None:
                v = v * k.convert(w.row([]).load(i, lanes, mask), F64)
            out.store(i, k.convert(v, y.type), mask)

        k.sweep(width, write)
'''


Import = Callable[..., Op]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a folder of these files, which is all there is of the op, and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "user_family"

    def declare(kernel: str | None = KERNEL) -> Op:
        folder.mkdir()
        (folder / "__init__.py").write_text("from user_family.share import share\n")
        (folder / "share.py").write_text(DECLARED)
        if kernel is not None:
            (folder / "share_cpu.py").write_text(kernel)
        importlib.invalidate_caches()
        found: Op = importlib.import_module("user_family").share
        return found

    yield declare
    registry.ops.remove("user_share")
    for name in [n for n in sys.modules if n.partition(".")[0] == "user_family"]:
        del sys.modules[name]


@pytest.fixture
def share(imported: Import) -> Op:
    return imported()


def test_it_computes_among_others(share: Op) -> None:
    """Between a norm and a product, for every length of one plan, on a view of rows that are not adjacent."""
    rng = np.random.default_rng(0)
    up, w = rng.standard_normal((24, 20)).astype(np.float32), rng.standard_normal(20).astype(np.float32)
    x = input("x", (Dim("T", 40), 2, 20))
    y = mul_mat(constant("up", up), share(rms_norm(x[:, 1], eps=1e-6), constant("w", w), a=0.75))
    step = compile(Graph(y=y), "cpu").bind()
    for n in (1, 7, 40):
        given = rng.standard_normal((n, 2, 20)).astype(np.float32)
        v = given[:, 1].astype(np.float64)
        v /= np.sqrt(np.mean(v * v, -1, keepdims=True) + 1e-6)
        want = v * w / (0.75 + np.abs(v).sum(-1, keepdims=True)) @ up.T.astype(np.float64)
        np.testing.assert_allclose(step.run({"x": given})["y"], want, rtol=2e-5, atol=2e-6)


def test_it_conforms(share: Op) -> None:
    report = check("user_share", "cpu", examples=60, seed=3)
    assert report.ok and report.cases == 60 and report.unsupported == 0, str(report)


def test_a_mistake_in_its_kernel_is_found(imported: Import) -> None:
    imported(KERNEL.replace("if w is not None:", "if w is not None and x.ndim < 3:"))
    report = check("user_share", "cpu", examples=60, seed=3)
    assert report.failure is not None and report.failure.part == "reference", str(report)


def test_without_its_kernel_it_has_none_on_the_cpu(imported: Import) -> None:
    imported(None)
    assert check("user_share", "cpu", examples=5, seed=3).unsupported == 5
    told = tg("test-ops", "--coverage", "--op", "user_share", "--json")
    coverage = json.loads(told.stdout)["coverage"]["user_share"]
    assert told.exit_code == 1 and (coverage["cpu"]["how"], coverage["reference"]["how"]) == ("no", "yes")


def test_it_is_listed_and_covered(share: Op) -> None:
    (listed,) = as_json("test-ops", "--list", "--op", "user_share")["ops"]
    assert listed == {"op": "user_share", "signature": str(share.signature), "source": "its author"}
    assert any(line.startswith("user_share") for line in ok("test-ops", "--list").splitlines())
    coverage = as_json("test-ops", "--coverage", "--op", "user_share")["coverage"]["user_share"]
    assert (coverage["cpu"]["how"], coverage["reference"]["how"]) == ("yes", "yes")
    (result,) = as_json("test-ops", "--op", "user_share", "--backend", "cpu", "--examples", 10)["results"]
    assert result["ok"] and result["cases"] == 10


def test_it_has_a_page(share: Op) -> None:
    (page,) = as_json("ops", "user_share")["ops"]
    assert (page["family"], page["module"], page["call"]) == ("user_family", "user_family.share", "user_share(x, w=None, *, a)")
    assert page["signature"] == "x[..., D]: float, w[D]?: real -> y[..., D]: x" and page["summary"] == "its author"
    assert page["code"].startswith("@share.reference\ndef reference(") and page["laws"] == {"is_at_most_one": ""}
    assert page["backends"] == dict.fromkeys(("cpu", "cuda", "cuda-host", "reference"), "yes")  # described once, for both
    assert page["kernels"] == ["share_cpu.py"]
    assert "\nuser_family\n  user_share(x, w=None, *, a) " in ok("ops")
    assert "### user_share\n" in ok("ops", "--markdown", "user_share")
