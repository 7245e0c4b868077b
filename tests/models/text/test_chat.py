"""Chat templates: what plain jinja2 renders, and what a hostile template is kept from."""

from __future__ import annotations

import datetime
import json
import threading
import time
from typing import Any

import jinja2
import pytest

from tensorgraph.errors import FormatError, InputError
from tensorgraph.models.text.chat import ChatTemplate
from tensorgraph.models.text.chat_budget import RenderLimits
from tests.reference import reference_path

TEMPLATES = (
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-V4",
)
SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "<b>it's & ü</b>", "parameters": {"z": 1, "a": [True, None]}},
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": 'Hi <there> & "you" 😀'}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "turns": [
        {"role": "system", "content": "A."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."},
        {"role": "user", "content": "Two?\n\n"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "It follows."},
        {"role": "user", "content": "Three?"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ],
}
CONVERSATIONS["answered"] = [*CONVERSATIONS["tools"], {"role": "assistant", "content": "Both."}]


def plain(source: str, variables: dict[str, Any]) -> str:
    """The same by an ordinary jinja2 environment, set up as transformers does."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.filters["from_json"] = json.loads
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_render_as_in_plain_jinja2(name: str, conversation: str) -> None:
    source = reference_path(f"templates/{name}.jinja").read_text()
    template = ChatTemplate(source, special_tokens=SPECIAL)
    messages = CONVERSATIONS[conversation]
    for prompt in (True, False):
        for tools in (None, TOOLS):
            for extra in ({}, {"thinking": True}, {"enable_thinking": False}):
                variables = {**SPECIAL, "messages": messages, "add_generation_prompt": prompt, "tools": tools, **extra}
                text = template.render(messages, add_generation_prompt=prompt, tools=tools, **extra)
                assert messages[0]["content"] in text
                assert text == plain(source, variables)


def test_qwen3_text_in_full() -> None:
    template = ChatTemplate(reference_path("templates/Qwen-Qwen3-0.6B.jinja").read_text())
    assert template.render(CONVERSATIONS["system"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_special_tokens_and_chatml_come_from_the_metadata() -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": SMOLLM2,
    }
    question = [{"role": "user", "content": "2+2?"}]
    turn = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert ChatTemplate.from_gguf(metadata).render(question) == f"<|im_start|>system\n{system}<|im_end|>\n{turn}"
    named = metadata | {"tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"}
    assert ChatTemplate.from_gguf(named).render([]) == "<|im_start|>|<|im_end|>|<|endoftext|>|"
    del metadata["tokenizer.chat_template"]
    assert ChatTemplate.from_gguf(metadata).render(question) == turn
    metadata["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    with pytest.raises(FormatError, match="tokenizer.chat_template"):
        ChatTemplate.from_gguf(metadata)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "023"),
        ("{{ {'b': '<&ü>', 'a': 1}|tojson }}", '{"b": "<&ü>", "a": 1}'),
        ("{{ [1]|tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for x in [5, 6, 7] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.revindex0 }} {% endfor %}",
         "1/3False2 2/3False1 3/3True0 "),
        ("{% for k, v in {'a': 1}.items() if v %}{{ k ~ v ~ none }}{% else %}no{% endfor %}", "a1None"),
        ("{% for x in nothing %}x{% else %}none{% endfor %}", "none"),
        ("{% set ns = namespace(n=1) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}!{% endcall %}", "12!"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% filter replace('b', 'c') %}abb{% endfilter %}", "A1acc"),
        ("{% generation %}said {{ 1 }}{% endgeneration %}.", "said 1."),
        ("{{ '%s-%03d' % ('a', 7) }} {{ '{}:{:>3}'.format('b', 1) }} {{ 'x'.center(3, '.') }}", "a-007 b:  1 .x."),
        ("{{ ' a '.strip().replace('a', 'bb').split('b')|length }} {{ ','.join(['x', 'y']) }}", "3 x,y"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('+') }}", "one+two"),
        ("{{ (messages + [{'role': 'tool'}])|length }} {{ messages[-1].role in ['user', 'tool'] }}", "4 True"),
        ("{{ 'a\nb'|indent(2) }} {{ '<'|e }} {{ [3, 1]|sort }} {{ 2 ** 10 * 3 % 7 }} {{ undefined_thing|trim }}",
         "a\n  b &lt; [1, 3] 6 "),
    ],
)  # fmt: skip
def test_what_templates_do(source: str, text: str) -> None:
    said = (("user", "one"), ("assistant", "-"), ("user", "two"))
    messages = [{"role": role, "content": content} for role, content in said]
    assert ChatTemplate(source).render(messages) == text


def test_time_now() -> None:
    before = datetime.date.today().isoformat()
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([])
    assert text in (before, datetime.date.today().isoformat())


def test_a_template_that_refuses_messages_says_why() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    template = ChatTemplate(source)
    with pytest.raises(InputError, match="roles must alternate"):
        template.render([{"role": "tool"}])
    with pytest.raises(InputError, match="has no element 0"):
        template.render([])
    with pytest.raises(InputError, match="cannot render these messages: TypeError"):
        ChatTemplate("{{ 'a' + messages[0].content }}").render([{"content": None}])


TIGHT = RenderLimits(output_chars=300_000, time_s=0.3)
NEST = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(s=START) %}{% for i in range(90) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
HOSTILE = {
    "long loops": "{% set r = range(99999) %}{% for a in range(3000) %}{% for b in r %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f(n) %}{% if n %}{% set x = f(n-1) + f(n-1) %}{% endif %}{% endmacro %}{{ f(90) }}",
    "deep recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "block of itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "long output": NEST.replace("BODY", "xxxxxxxxxxxxxxxx"),
    "captured output": "{% set x %}" + NEST.replace("BODY", "xxxxxxxxxxxxxxxx") + "{% endset %}",
    "captured text": "{% set x %}{% for a in range(9999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "work in scoped blocks": (
        "{% for i in range(9) %}{% block b scoped %}{% for j in range(30) %}{% set x = 'a' * 299999 %}{% endfor %}"
        "{% endblock %}{% endfor %}"
    ),
    "filtered output": "{% filter upper %}" + NEST.replace("BODY", "{{ a }}") + "{% endfilter %}",
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat a list": "{{ (10**9 * [1])|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "double with ~": GROW.replace("START", "'a'").replace("STEP", "ns.s ~ ns.s"),
    "double with +": GROW.replace("START", "'a'").replace("STEP", "ns.s + ns.s"),
    "double a list": GROW.replace("START", "[1]").replace("STEP", "ns.s + ns.s"),
    "nest lists": GROW.replace("START", "[1]").replace("STEP", "[ns.s, ns.s]"),
    "nest mappings": GROW.replace("START", "1").replace("STEP", "{'a': ns.s, 'b': ns.s}"),
    "nest by call": GROW.replace("START", "1").replace("STEP", "dict(a=ns.s, b=ns.s)"),
    "nest tuples": GROW.replace("START", "1").replace("STEP", "(ns.s, ns.s)"),
    "many parts": "{% set s = 'a' * 99999 %}{{ " + "~".join(["s"] * 3000) + " }}",
    "%": "{{ '%999999999d' % 1 }}",
    "% with *": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "long format": "{{ ('{0}' * 9999).format('a' * 9999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "to_bytes": "{{ (5).to_bytes(999999999, 'big') }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "replace filter": "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "join": "{{ ('a' * 9999).join(range(9999)|map('string')) }}",
    "join filter": "{{ range(9999)|join('a' * 9999) }}",
    "indent": "{{ 'a\n'|indent(999999999) }}",
    "indent by text": "{{ ('a\n' * 9999)|indent('b' * 9999) }}",
    "round": "{{ 1.5|round(999999999, 'floor') }}",
    "tojson": "{{ [1]|tojson(indent=999999999) }}",
    "tojson separators": "{{ range(9999)|list|tojson(separators=['a' * 9999, '']) }}",
    "compare": "{% set s = 'a' * 99999 %}{% set l = [s] + [s] + [s] %}{{ 'b' in l + l }}",
    "sort": "{% set s = 'a' * 99999 %}{% set l = [s] + [s] + [s] %}{{ (l + l)|sort }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class of a function": "{{ raise_exception.__globals__.x }}",
    "change messages": "{{ messages.append(1) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep loops": "{% for x in range(2) %}" * 30 + "{% endfor %}" * 30,
    "long source": "a" * 1_000_001,
    "no template": "{% if %}",
    "unknown filter": "{{ 1|nosuch }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_stop_at_the_limits(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError) as caught:
        ChatTemplate(HOSTILE[name], limits=TIGHT).render([])
    assert "MemoryError" not in str(caught.value)
    assert time.monotonic() - started < 3


def test_limits_hold_in_any_thread_and_for_each_rendering_anew() -> None:
    source = "{% for i in range(n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}ok"
    template = ChatTemplate(source, limits=TIGHT)
    results: dict[int, str] = {}

    def render(n: int) -> None:
        try:
            results[n] = template.render([], n=n)
        except FormatError as error:
            results[n] = str(error)

    for n in (0, 99999):
        thread = threading.Thread(target=render, args=(n,))
        thread.start()
        thread.join(timeout=10)
    assert results == {0: "ok", 99999: "[chat template] wanted it rendered within 0.3 s; it goes on"}
    assert template.render([], n=0) == "ok"


def test_output_limit_is_exact() -> None:
    template = ChatTemplate("{{ a }}{{ b }}", limits=RenderLimits(output_chars=10))
    assert template.render([], a="12345", b="67890") == "1234567890"
    with pytest.raises(FormatError, match="at most 10 characters"):
        template.render([], a="123456", b="67890")


def test_a_long_conversation_is_within_the_limits() -> None:
    template = ChatTemplate(reference_path("templates/Qwen-Qwen3-0.6B.jinja").read_text())
    messages = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    assert template.render(messages).count("<|im_start|>") == 1001
