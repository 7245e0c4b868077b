"""Quick, sharp checks of the models for `planting`: each passes on sound source and fails on the mistakes it is named for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions, PlanCache, compile, run_op
from tensorgraph.dtypes import f16, f32
from tensorgraph.engine import Engine
from tensorgraph.errors import FormatError, StateError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, Node, input
from tensorgraph.models import deepseek_v4
from tensorgraph.models.architecture import Model
from tensorgraph.models.builder import Builder, FileWeights
from tensorgraph.models.experts import route
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.tokenizer import Tokenizer
from tensorgraph.session import Session
from tensorgraph.state import StateSpec, StreamClass
from tensorgraph.state_store import StateStore
from tests.models import tiny
from tests.reference import reference_path

Array = np.ndarray[Any, Any]


def follows(
    architecture: str, n: int, *, layers: int | None = None, step: int = 31, ahead: int = 17, selections: bool = True
) -> None:
    """A sequence in ragged steps against the reference: hidden states, selections, logits.

    A sequence of another text, of which nothing is compared, stands before it in every batch and takes other numbers of
    tokens: with the same text, rows taken from the wrong sequence would be the right ones. With `layers` the model is cut
    off after so many, and has no logits to compare.
    """
    stored, model = tiny.reference(architecture), tiny.model(architecture)
    if layers is not None:
        config = dataclasses.replace(model.config, num_hidden_layers=layers)
        model = Model(model.architecture, config, model.catalog, model.file)
    last = model.config.num_hidden_layers - 1
    chosen = list(tiny.selections(stored, getattr(model.config, "compress_ratios", ())))
    chosen = [(tap, ids, every) for tap, ids, every in chosen if selections and int(tap.split(".")[1]) <= last]
    outputs = [f"blk.{last}.out", *(tap for tap, _, _ in chosen), *(["logits"] if layers is None else [])]
    parts: list[dict[str, Array]] = []
    session = Session(Engine(model, kv_dtype="f32"), step_tokens=step + ahead)
    other, ids = session.sibling(), stored["input_ids"]
    while session.length < n:
        texts = [(other, (ids[other.length :][:ahead] * 7 + 3) % 512), (session, ids[session.length : n][:step])]
        taps = Session.batch(texts, outputs=outputs, all_logits=True)[1]
        for tap, _, every in chosen:  # a batch numbers the rows of its sequences one after another
            taps[tap] = np.where(taps[tap] < 0, -1, taps[tap] - (other.length // every if every else 0))
        parts.append(taps)
    joined = {name: np.concatenate([taps[name] for taps in parts]) for name in outputs}
    compare(architecture, joined, session.length, chosen, last)


def compare(architecture: str, taps: dict[str, Array], n: int, chosen: Sequence[tuple[str, Array, int]], last: int) -> None:
    """Of the first n tokens."""
    stored = tiny.reference(architecture)
    limit = tiny.bound(architecture)
    at = stored["hidden_pos"][stored["hidden_pos"] < n]
    found = tiny.nmse(taps[f"blk.{last}.out"][at], stored[f"hidden_layer{last}"][: len(at)])
    assert found <= limit, f"hidden state {found:.1e}"
    for tap, ids, every in chosen:
        assert tiny.same_sets(taps[tap], ids[:n], every), f"other rows in {tap}"
    if "logits" in taps:
        found = tiny.nmse(taps["logits"], stored["logits"][:n])
        assert found <= limit, f"logits {found:.1e}"


# Against the references.


def llama() -> None:
    follows("llama", 96)


def qwen2() -> None:
    follows("qwen2", 96)


def gpt_oss() -> None:
    follows("gpt_oss", 96)


def qwen3() -> None:
    follows("qwen3", 96)


def qwen3moe() -> None:
    follows("qwen3moe", 96)


def gemma3() -> None:
    """Past the window, on six layers that see it and one that sees all."""
    follows("gemma3", 96)


def scale_of_gemma() -> None:
    """The published configuration's own, which need not be the size of a head."""
    config = dataclasses.replace(tiny.model("gemma3").config, query_pre_attn_scalar=100)
    assert config.scale == 0.1


def v2() -> None:
    follows("deepseek_v2", 96, layers=3)


def v3() -> None:
    """Steps on latents, and one on expanded keys."""
    follows("deepseek_v3", 96)
    expanded("deepseek_v3")


def v32() -> None:
    follows("deepseek_v32", 96)
    expanded("deepseek_v32", "naive")


def glm() -> None:
    follows("glm_moe_dsa", 96)


def v4() -> None:
    """A window, a compressed sparse and a heavily compressed layer, past the end of the first block of 128."""
    follows("deepseek_v4", 150, layers=3)


def glm_hidden() -> None:
    """Without taps of selections, which a mistake may have taken out of the graph."""
    follows("glm_moe_dsa", 96, selections=False)


def v4_hidden() -> None:
    follows("deepseek_v4", 150, layers=3, selections=False)


def v4_head() -> None:
    follows("deepseek_v4", 40)


def expanded(architecture: str, *forms: str) -> None:
    """All tokens in one step, which takes the naive form, or that of these names."""
    engine = tiny.engine(architecture)
    if forms:
        options = dataclasses.replace(engine.options, lowerings=forms)
        engine = Engine(engine.model, "reference", kv_dtype="f32", options=options)
    found = tiny.nmse(tiny.whole(engine, tiny.tokens(architecture)), tiny.reference(architecture)["logits"])
    assert found <= tiny.bound(architecture), f"naive {found:.1e}"


# What the references do not show.


def last_token() -> None:
    """Without `all_logits`: the last token of each sequence."""
    stored = tiny.reference("llama")
    first = Session(tiny.engine("llama"))
    second = first.sibling()
    got = Session.batch([(first, stored["input_ids"][:50]), (second, stored["input_ids"][:20])])
    for logits, n in zip(got, (50, 20), strict=True):
        assert tiny.nmse(logits, stored["logits"][n - 1]) <= 1e-9


def last_token_alone() -> None:
    """The same of one sequence."""
    stored = tiny.reference("llama")
    logits = Session(tiny.engine("llama")).eval(stored["input_ids"][:50])
    assert tiny.nmse(logits, stored["logits"][49]) <= 1e-9


def tied_head() -> None:
    """A file without output weights uses the embeddings."""
    model = tiny.model("llama")
    assert isinstance(model.catalog, FileWeights) and model.file is not None
    catalog = FileWeights({name: found for name, found in model.catalog.tensors.items() if name != "output.weight"})
    got = tiny.whole(Engine(Model(model.architecture, model.config, catalog, model.file), kv_dtype="f32"), tiny.tokens("llama"))
    want = tiny.reference("llama")["hidden_norm"].astype(np.float64) @ model.weight("token_embd.weight").astype(np.float64).T
    assert tiny.nmse(got, want) <= 1e-9


def epsilons() -> None:
    """Every norm takes the configuration's epsilon; the indexer's key norm has its own, as published."""
    for architecture in tiny.ARCHITECTURES:
        model = tiny.model(architecture)
        config = dataclasses.replace(model.config, rms_norm_eps=0.125)
        graph = Model(model.architecture, config, model.catalog, model.file).graph(Extents(), f32)
        found = {node.attrs["eps"] for node in graph if node.op == "rms_norm"}
        assert found == {0.125}, f"{architecture}: {found}"
        assert {node.attrs["eps"] for node in graph if node.op == "norm"} <= {1e-6}


def norms() -> None:
    """With an epsilon that counts."""
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((5, 8)), rng.standard_normal(8), rng.standard_normal(8)
    x, w, b = x.astype(np.float32), w.astype(np.float32), b.astype(np.float32)
    close(run_op("rms_norm", x, w, eps=0.5), w * x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.5))
    centred = x - x.mean(-1, keepdims=True)
    close(run_op("norm", x, w, b, eps=0.5), w * centred / np.sqrt(x.var(-1, keepdims=True) + 0.5) + b)


def close(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def group_router() -> None:
    """Biased, grouped selection against its definition, for V3's group score and for V2's."""
    rng = np.random.default_rng(1)
    for top in (1, 2):
        scores, bias = rng.random((40, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
        ids = route(input("s", (40, 12)), input("b", (12,)), 3, n_group=4, topk_group=2, group_top=top)
        got = compile(Graph(y=ids)).bind().run({"s": scores, "b": bias})["y"]
        for row, mine in zip(scores + bias, got, strict=True):
            groups = row.reshape(4, 3)
            best = np.argsort(-np.sort(groups, -1)[:, -top:].sum(-1))[:2]
            able = [(-row[e], e) for e in range(12) if e // 3 in best]
            assert [e for _, e in sorted(able)[:3]] == mine.tolist()
    v2_config = dataclasses.replace(tiny.model("deepseek_v2").config, n_group=2, topk_group=1)
    for model, config, want in (("deepseek_v2", v2_config, 1), ("deepseek_v3", tiny.model("deepseek_v3").config, 2)):
        given = tiny.model(model)
        graph = Model(given.architecture, config, given.catalog, given.file).graph(Extents(), f32)
        assert {node.attrs["k"] for node in graph if node.op == "top_k" and node.ndim == 3} == {want}


def hyper_connections() -> None:
    """Mixing with an epsilon that counts, and few iterations, against loops."""
    n, width, eps, rng = 4, 6, 0.125, np.random.default_rng(2)
    config = dataclasses.replace(tiny.model("deepseek_v4").config, hidden_size=width, hc_mult=n, hc_eps=eps, hc_sinkhorn_iters=3)
    shapes = {"hc_fn.weight": (24, 24), "hc_scale.weight": (3,), "hc_base.weight": (24,)}
    shapes |= {"output_hc_fn.weight": (4, 24), "output_hc_scale.weight": (1,), "output_hc_base.weight": (4,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    g = Builder.begin(FileWeights({name: (shape, f32) for name, shape in shapes.items()}), Extents(), f32, {})
    streams = input("x", (3, n, width))
    x, post, comb = deepseek_v4.connect(g, "hc", streams, config)
    outputs: dict[str, Node] = {"x": x, "post": post, "comb": comb, "head": deepseek_v4.head_weights(g, streams, config)}
    given = rng.standard_normal((3, n, width)).astype(np.float32)
    got = compile(Graph(outputs)).bind(weights).run({"x": given})
    flat = given.reshape(3, -1).astype(np.float64)
    flat = flat / np.sqrt((flat * flat).mean(-1, keepdims=True) + config.rms_norm_eps)
    mix, scale, base = flat @ weights["hc_fn.weight"].T, weights["hc_scale.weight"], weights["hc_base.weight"]
    pre = 1 / (1 + np.exp(-(mix[:, :4] * scale[0] + base[:4]))) + eps
    close(got["x"], (pre[:, :, None] * given).sum(1))
    close(got["post"], 2 / (1 + np.exp(-(mix[:, 4:8] * scale[1] + base[4:8]))))
    m = np.exp((mix[:, 8:] * scale[2] + base[8:]).reshape(3, n, n))  # [T, src, dst]
    m = m / m.sum(2, keepdims=True) + eps
    m = m / (m.sum(1, keepdims=True) + eps)
    for _ in range(2):
        m = m / (m.sum(2, keepdims=True) + eps)
        m = m / (m.sum(1, keepdims=True) + eps)
    close(got["comb"], m)
    head = flat @ weights["output_hc_fn.weight"].T * weights["output_hc_scale.weight"] + weights["output_hc_base.weight"]
    close(got["head"], 1 / (1 + np.exp(-head)) + eps)


def ties() -> None:
    """At equal scores the lower row, in short rows and in long ones."""
    for n in (9, 3000):
        x = np.zeros((2, n), np.float32)
        x[0, 5], x[1, 7] = 1.0, -np.inf
        assert run_op("top_k", x, k=8).tolist() == [[5, 0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6, 8]]
    least = np.full((1, 20), -np.inf, np.float32)
    least[0, 3] = 0
    assert run_op("top_k", least, k=3).tolist() == [[3, -1, -1]]


def large_second_segment() -> None:
    """The largest logit counts in whichever segment it stands."""
    from tensorgraph.ops.attention import flash_attn

    slots = {"q": np.array([[[1e4]]]), "k0": np.array([[[0.1]]]), "k1": np.array([[[1.0]]])}
    attrs = flash_attn.check_attrs({"scale": 1.0, "segments": ((1, None, True),) * 2})
    assert flash_attn.compute(slots, attrs).tolist() == [[[1.0]]]


def declared_state() -> None:
    """Row shape, dtype, every and keep of each stream of V4, and what a token of the others takes."""
    declared = {name: spec.key(f16) for name, spec in tiny.model("deepseek_v4").states().items()}
    window = {f"blk.{i}.window": "64:f16:1w32" for i in range(6)}
    csa = {"parts": "2x128:f32:1w8", "rows": "64:f16:4", "index_parts": "2x128:f32:1w8", "index_rows": "64:f16:4"}
    hca = {"parts": "2x64:f32:1w128", "rows": "64:f16:128"}
    compressed = {f"blk.{i}.{name}": key for i in range(1, 5) for name, key in (csa if i % 2 else hca).items()}
    assert declared == window | compressed
    wanted = {"llama": (4, {"2x32:f16:1"}), "deepseek_v3": (3, {"80:f16:1"}), "deepseek_v32": (6, {"80:f16:1", "64:f16:1"})}
    wanted |= {"glm_moe_dsa": (5, {"80:f16:1", "64:f16:1"})}
    for name, (n, keys) in wanted.items():
        found = [spec.key(f16) for spec in tiny.model(name).states().values()]
        assert (len(found), set(found)) == (n, keys), name


def rows_of_streams() -> None:
    """What a class of streams says of its rows, from what its readers look at."""
    for cls in (StreamClass(every, keep) for every in (1, 3, 4) for keep in (None, 1, 5)):
        looks = [range((p + 1) // cls.every)[-(cls.keep or 1 << 30) :] for p in range(60)]
        for length in range(40):
            assert cls.n_rows(length) == len(range(cls.every - 1, length, cls.every))
            assert cls.first_read(length) == min((look.start for look in looks[length:] if look), default=0)
        for first in range(1, 6) if cls.keep else ():
            assert cls.earliest(first) == next(n for n in range(60) if cls.first_read(n) >= first)


def plans_do_not_mix() -> None:
    """Models, sizes of step and options that differ have plans that differ, and equal ones have one."""
    cache = PlanCache()
    ids = tiny.tokens("llama")[:60]
    for architecture, forms in (("llama", ()), ("deepseek_v3", ()), ("deepseek_v3", ("absorbed",)), ("llama", ())):
        options = CompileOptions(lowerings=forms)
        engine = Engine(tiny.model(architecture), kv_dtype="f32", options=options, cache=cache)
        for step_tokens in (8, 64):
            with Session(engine, step_tokens=step_tokens) as session:
                logits = session.eval(tiny.tokens(architecture)[: len(ids)], all_logits=True)
            assert tiny.nmse(logits, tiny.reference(architecture)["logits"][: len(ids)]) <= 1e-9
    assert len(cache) == cache.misses == 6


def beginning_of_text() -> None:
    """BOS comes first where the vocabulary asks for it, and only there."""
    metadata = dict(GGUF.open(reference_path("llama/llama-f32.gguf")).metadata)
    for asked in (True, False):
        tokenizer = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_bos_token": asked})
        ids = tokenizer.encode("two words")
        assert (ids[0] == tokenizer.bos_id) == asked
        assert tokenizer.encode("two words", add_special=False) == ids[asked:]


def window_of_llama() -> None:
    from tests.models.test_sessions import test_a_window_forgets_what_is_beyond_it

    test_a_window_forgets_what_is_beyond_it("reference")


def repeated_matrices() -> None:
    """Neighbouring batches share one matrix."""
    a, b = (np.arange(12.0, dtype=np.float32).reshape(shape) for shape in ((2, 2, 3), (4, 1, 3)))
    want = np.stack([b[i] @ a[i // 2].T for i in range(4)])
    np.testing.assert_array_equal(run_op("mul_mat", a, b), want)


def session_of_llama() -> Session:
    session = Session(tiny.engine("llama"))
    session.eval(tiny.tokens("llama")[:77])
    return session


def full_pages_are_shared() -> None:
    """A fork that writes on from the end of a page copies none."""
    store = StateStore({"k": StateSpec((2,))}, kv_dtype=f16, page_rows=4)
    seq = store.new()
    rows = np.arange(16.0).reshape(8, 2)
    for given in (rows, rows[:1]):
        with store.begin([(seq, len(given))]) as step:
            step.append("k", given)
            step.commit()
        store.fork(seq)
    assert list(store.used_pages.values()) == [3]


def saved() -> None:
    """What is loaded goes on as what was saved, also from one of its earlier tokens: every row stands in its place."""
    session = session_of_llama()
    with TemporaryDirectory() as folder:
        session.save(f"{folder}/state")
        loaded = session.sibling()
        loaded.load(f"{folder}/state")
    for each in (loaded, session):
        each.trim(40)
    more = tiny.tokens("llama")[40:]
    np.testing.assert_array_equal(loaded.eval(more, all_logits=True), session.eval(more, all_logits=True))
    assert loaded.ids == session.ids


def damaged_file() -> None:
    """A changed row is told, not taken."""
    session = session_of_llama()
    with TemporaryDirectory() as folder:
        session.save(f"{folder}/state")
        content = bytearray(Path(f"{folder}/state").read_bytes())
        content[-40] ^= 1
        Path(f"{folder}/state").write_bytes(content)
        with pytest.raises(FormatError):
            session.load(f"{folder}/state")


def another_models_file() -> None:
    """Streams of the same names and other shapes are refused."""
    session = session_of_llama()
    other = Session(Engine(tiny.model("llama"), kv_dtype="f16"))
    with TemporaryDirectory() as folder:
        session.save(f"{folder}/state")
        with pytest.raises(StateError):
            other.load(f"{folder}/state")
