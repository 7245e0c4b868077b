"""Models whose tokens list rows, in every form in which attention goes through these, against their references."""

from __future__ import annotations

import dataclasses

import pytest

from tensorgraph.engine import Engine
from tensorgraph.ops.attention.candidates_cpu import FORMS
from tensorgraph.session import Session
from tests.models import tiny


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["deepseek_v32", "glm_moe_dsa", "deepseek_v4"])
@pytest.mark.parametrize("n", [130, 48, 3])
def test_each_form(architecture: str, form: str, n: int) -> None:
    forms = (form, "absorbed", "selected rows")
    options = dataclasses.replace(tiny.engine(architecture, backend="cpu").options, lowerings=forms)
    engine = Engine(tiny.model(architecture), "cpu", kv_dtype="f32", options=options)
    with Session(engine, step_tokens=n) as session:
        logits = session.eval(tiny.tokens(architecture), all_logits=True)
    found = tiny.nmse(logits, tiny.reference(architecture)["logits"])
    assert found <= tiny.bound(architecture), f"NMSE {found:.1e}"
