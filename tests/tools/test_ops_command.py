"""`tensorgraph ops`: its list, its pages, its document, and what it does without hypothesis."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.op import Attr, Op
from tensorgraph.signature import Signature
from tensorgraph.tools.op_markdown import document, prose
from tensorgraph.tools.op_pages import Runs, declared, family_of, first_sentence, runs
from tests.layout import ROOT
from tests.tools.commands import as_json, ok, refused

FAMILIES = ("attention", "elementwise", "norms", "position", "products", "reduce", "rows", "select", "shape")
RMS_NORM = """\
rms_norm(x, weight=None, *, eps)
x[..., D]: real, weight[D]?: real -> y[..., D]: x

`x / sqrt(mean(x^2) + eps) * weight`; a row of zeros with eps = 0 gives NaN.

attribute  type   default   allowed
eps        float  required  at least 0

in place   the result may lie where x does
tolerance  an NMSE of at most 1e-10
laws       unit_root_mean_square
source     arXiv:1910.07467
backends   cpu: yes, cuda: yes, cuda-host: yes, reference: yes
module     tensorgraph.ops.norms.norms
kernels    norms_cpu.py
"""


def separately(code: str) -> str:
    """What Python prints in a process of its own, where no other test has registered anything."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def command_code(*arguments: str) -> str:
    return f"from tensorgraph.tools.cli import application; application()({list(arguments)!r}, standalone_mode=False)\n"


def test_the_document_is_what_is_printed_now() -> None:
    printed = separately(command_code("ops", "--markdown"))
    assert printed == (ROOT / "docs" / "ops.md").read_text(), "renew it with: tensorgraph ops --markdown > docs/ops.md"


def test_the_documents_links_lead_to_its_sections() -> None:
    text = (ROOT / "docs" / "ops.md").read_text()
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^##+ (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) == len(set(links)) == len(anchors) - 1 and set(links) | {"types"} == anchors
    assert {f"family-{family}" for family in FAMILIES} <= anchors


def test_the_list_has_every_op_in_its_family_and_takes_neither_llvmlite_nor_hypothesis() -> None:
    code = "import sys\n" + command_code("ops") + "print([m for m in ('llvmlite', 'hypothesis') if m in sys.modules])"
    *paragraphs, imported = re.split(r"\n\n|\n(?=\[)", separately(code).rstrip())
    assert imported == "[]" and tuple(p.partition("\n")[0] for p in paragraphs) == FAMILIES
    found = {p.partition("\n")[0]: re.findall(r"^  (\w+)\(", p, re.MULTILINE) for p in paragraphs}
    folders = {
        f: sorted(o.name for o in map(registry.ops.get, registry.ops) if o.module.startswith(f"tensorgraph.ops.{f}."))
        for f in FAMILIES
    }
    assert found == folders
    (wide,) = (i for i, line in enumerate(paragraphs[3].splitlines()) if line.startswith("  rope_table("))
    assert paragraphs[3].splitlines()[wide + 1].strip().startswith("cos and sin of the angles by which `rope` turns")


def test_a_family_is_listed_alone() -> None:
    lines = ok("ops", "--family", "reduce").splitlines()
    assert [line.split()[0] for line in lines] == ["reduce", "cumsum(x)", "mean(x)", "sum(x)", "sum_rows(x)"]
    assert lines[-2].endswith("Of all elements.") and lines[-1].endswith("ggml_sum_rows")
    assert [o["name"] for o in as_json("ops", "--family", "reduce")["ops"]] == ["cumsum", "mean", "sum", "sum_rows"]


def test_a_page_says_all_of_its_op() -> None:
    assert ok("ops", "rms_norm") == RMS_NORM
    several = ok("ops", "rms_norm", "neg", "rms_norm")
    assert several.startswith(f"{RMS_NORM}\n\nneg(x)\n") and several.count("rms_norm(x") == 1


def test_a_page_as_json() -> None:
    (page,) = as_json("ops", "index_top_k")["ops"]
    assert page["family"] == "attention" and page["module"] == "tensorgraph.ops.attention.index_top_k"
    assert page["expands_to"] == ["mul_mat", "relu", "mul", "sum_rows", "attn_mask", "add", "top_k"]
    assert page["backends"] == dict.fromkeys(("cpu", "cuda", "cuda-host"), "by expansion") | {"reference": "yes"}
    assert page["tolerance"] == 0
    assert page["attributes"][1] == {"name": "every", "type": "int", "required": False, "default": "1", "allowed": "at least 1"}
    assert page["text"].startswith(page["summary"]) and not page["unknown"]
    assert page["kernels"] == ["index_top_k_cpu.py", "index_top_k_cuda.py"]


def test_every_call_and_signature_can_be_read_back() -> None:
    for op in map(registry.ops.get, registry.ops):
        page = declared(op)
        (call,) = ast.parse(f"def {page.call}: ...").body
        assert isinstance(call, ast.FunctionDef) and call.name == op.name
        given = [a.arg for a in (*call.args.args, *call.args.kwonlyargs)]
        inputs = [a.name for a in op.signature.inputs] if op.signature else given
        assert set(inputs) <= set(given)
        assert (page.signature is None) == (op.signature is None)
        assert page.signature is None or Signature.parse(page.signature) == op.signature
        assert page.summary and (page.text or page.code)


@pytest.mark.parametrize(
    ("name", "call", "short"),
    [
        ("concat", "concat(*xs, axis=-1)", "concat(*xs, ...)"),
        ("fill", "fill(*, shape, value, dtype=f32)", "fill(*, shape, value, ...)"),
        ("set_rows", "set_rows(a, b, ids)", "set_rows(a, b, ids)"),
        (
            "flash_attn",
            "flash_attn(q, *segments, scale, softcap=0.0, sinks=None, pos=None, seq=None, d_v=None)",
            "flash_attn(q, *segments, scale, sinks=None, pos=None, seq=None, ...)",
        ),
        (
            "block_pool",  # an input that may be absent, but stands before others
            "block_pool(x, bias, row_pos, row_seq, blocks, block_seq, *, every, overlap=False)",
            "block_pool(x, bias, row_pos, row_seq, blocks, block_seq, *, every, ...)",
        ),
        (
            "rotate",
            'rotate(x, table, *, layout="interleaved", offset=0, n_dims)',
            "rotate(x, table, *, n_dims, ...)",
        ),
    ],
)
def test_calls(name: str, call: str, short: str) -> None:
    page = declared(registry.ops.get(name))
    assert (page.call, page.short) == (call, short)


def test_attributes_have_types_defaults_and_ranges() -> None:
    op = Op(
        "test_ranges",
        "x[N]: real -> y[N]: x",
        attrs={
            "a": Attr(float, 0.5, low=0.0, high=1.0),
            "b": Attr(int, high=3),
            "c": Attr(str, "one", choices=("one", "two")),
            "d": Attr(tuple, None),
        },
    )
    try:
        found = declared(op).attributes
    finally:
        registry.ops.remove("test_ranges")
    assert [(a.name, a.type, a.default_text, a.allowed) for a in found] == [
        ("a", "float", "0.5", "0 to 1"),
        ("b", "int", "required", "at most 3"),
        ("c", "str", '"one"', '"one", "two"'),
        ("d", "tuple", "None", ""),
    ]
    (block,) = declared(registry.ops.get("set_rows")).attributes
    assert (block.type, block.default_text) == ("dtype", "follows from the call")


def test_an_op_that_a_function_made_shows_its_declaration() -> None:
    assert declared(registry.ops.get("sin")).code == 'sin = _unary("sin", np.sin, odd)'
    assert declared(registry.ops.get("sin")).summary == "ggml_sin"
    silu = declared(registry.ops.get("silu"))
    assert silu.code.startswith('silu = _unary("silu", lambda x: x * _sigmoid(x), gated_identity)\n\n\ndef _sigmoid(')
    assert silu.laws == {"gated_identity": "f(x) - f(-x) = x, as for every x * s(x) with s(x) + s(-x) = 1."}
    rounded = declared(registry.ops.get("round"))
    assert rounded.text.startswith("Nearest whole number;") and rounded.code.startswith("round = _unary(")
    assert declared(registry.ops.get("mul_mat")).code == ""


def test_an_op_without_readable_source_has_a_page() -> None:
    code = "@op.reference\ndef meaning(x):\n    '''Of x, nothing.'''\n    return x\n"
    op = Op("test_sourceless", "x[N]: real -> y[N]: x")
    op.module = "nowhere"
    try:
        assert (declared(op).summary, declared(op).family) == ("", "nowhere")
        exec(code, {"op": op})
        page, where = declared(op), runs(op, ["reference"])
    finally:
        registry.ops.remove("test_sourceless")
    assert (page.summary, page.text, page.code) == ("Of x, nothing.", "Of x, nothing.", "")
    assert where == Runs({"reference": "yes"}, (), ())


def test_without_hypothesis_only_backends_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    text = ok("ops", "swiglu")
    assert re.search(r"^backends .*wanted the package hypothesis", text, re.MULTILINE) and "expands to  unknown" in text
    assert "kernels     glu_cpu.py" in text
    assert "wanted the package hypothesis" in refused("ops", "swiglu", "--markdown")
    assert len(json.loads(ok("ops", "--json"))["ops"]) == len(list(registry.ops))


def test_an_op_of_which_nothing_can_be_drawn_has_a_page() -> None:
    op = Op("test_unsaid")
    try:
        text = ok("ops", "test_unsaid")
    finally:
        registry.ops.remove("test_unsaid")
    assert text.startswith("test_unsaid()\n\ntolerance") and "wanted a signature or `cases`" in text
    assert family_of(op) == "tools"


def test_what_is_unknown_is_said() -> None:
    assert "there is no 'rms_nrom'; did you mean 'rms_norm'?" in refused("ops", "add", "rms_nrom")
    assert "there is no 'norm'; did you mean 'norms'? Known: attention, " in refused("ops", "--family", "norm")
    assert "wanted names or a family; got add and --family norms" in refused("ops", "add", "--family", "norms")
    assert "wanted --markdown or --json; got both" in refused("ops", "--markdown", "--json")


def test_markdown_shows_the_same_characters() -> None:
    assert prose("x [*A, K] * `y * z` <b> \\") == "x [\\*A, K] \\* `y * z` \\<b> \\\\"
    page = declared(registry.ops.get("mul_mat"))
    text = document([(page, Runs({"cpu": "yes"}, (), ("mul_mat_cpu.py",)))], ("cpu", "other"))
    assert "| [mul_mat](#mul_mat) | `b @ a.T`, with a the weights. | yes | unknown |\n" in text
    assert "\n\n**Shapes:** a [\\*A, M, K], b [\\*B, N, K] -> [\\*B, N, M]. Batch axes" in text
    assert "- Module: `tensorgraph.ops.products.mul_mat`, kernels in `mul_mat_cpu.py`\n" in text


@pytest.mark.parametrize(
    ("text", "first"), [("One.\nTwo.", "One."), ("One\nand two.\n\nThree.", "One and two."), ("", ""), ("One", "One")]
)
def test_the_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first
