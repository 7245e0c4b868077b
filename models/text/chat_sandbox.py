"""The environment that chat templates run in: jinja2's immutable sandbox in which every step is accounted for.

The template's syntax tree is rewritten before it is compiled: what a loop runs over, literal text, lists, comparisons
and `~` go through functions that no template can name, and these spend from the rendering's budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tensorgraph.errors import FormatError, InputError
from tensorgraph.models.text.chat_budget import Budget, RenderLimits

_TEXT_FILTERS = (
    "capitalize", "e", "escape", "indent", "lower", "replace", "safe", "string", "title", "trim", "truncate", "upper",
    "wordcount",
)  # fmt: skip
_ORDERING_FILTERS = ("dictsort", "groupby", "join", "max", "min", "sort", "unique")
_OTHER_FILTERS = (
    "abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map",
    "reject", "rejectattr", "reverse", "round", "select", "selectattr",
)  # fmt: skip
_GLOBALS = ("cycler", "dict", "joiner", "range")
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
            "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
            "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
            "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines",
            "startswith", "strip", "swapcase", "title", "upper", "zfill",
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    bytes: frozenset(),
    int: frozenset(),
    float: frozenset(("is_integer",)),
}  # fmt: skip
_LARGEST_ARGUMENT = 1000


class _Context(Context):
    """A rendering's variables, with its budget."""

    environment: Sandbox
    budget: Budget

    def __init__(self, environment: Sandbox, *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, *args, **kwargs)
        self.budget = Budget(environment.limits)

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        assert isinstance(context, _Context)
        context.budget = self.budget
        return context


class _Namespace(Namespace):
    """A namespace that does not print what it holds: nested ones would print without end."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, which matters for training only: its body as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """`for x in a` -> `for x in each(a)`; `a ~ b` -> `concat(a, b)`; text -> `literal(text)`; `[a]` -> `built([a])`;
    `a == b` -> `a == built(b)`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _metered(node.iter, "each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node.nodes[0], "concat", node.nodes[1:])

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return _metered(nodes.Const(node.data, lineno=node.lineno), "literal")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, "built")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, "built")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _metered(node, "built")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _metered(operand.expr, "built")
        return node


def _metered(node: nodes.Node, step: str, arguments: list[nodes.Expr] | None = None) -> nodes.Filter:
    # The space keeps the name out of reach: no template can spell it.
    return nodes.Filter(node, f"metered {step}", arguments or [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with a budget for every rendering.

    Filters are those that chat templates use, and of the methods of texts, lists and numbers those that cannot make
    much out of little.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    context_class = _Context

    def __init__(self, limits: RenderLimits) -> None:
        """Set up filters and global functions as transformers offers them to chat templates."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=_finalize
        )
        self.limits = limits
        plain = dict(self.filters)
        self.filters = {"tojson": _to_json, "from_json": _from_json}
        for name in (*_TEXT_FILTERS, *_ORDERING_FILTERS, *_OTHER_FILTERS):
            self.filters[f"plain {name}"] = plain[name]
            self.filters[name] = _metered_filter(name)
        self.filters |= {
            "metered each": _each, "metered concat": _concat, "metered literal": _literal, "metered built": _built,
        }  # fmt: skip
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Metering().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, its result accounted for before it is computed."""
        _budget(context).binary(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, B902
        """A call, refused where the method may make much out of little."""
        budget = _budget(__context)
        budget.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner = getattr(method, "__self__", None)
        for kind, names in _METHODS.items():
            if isinstance(owner, kind) and method.__name__ not in names:
                raise SecurityError(f"{kind.__name__}.{method.__name__} is not for templates")
        if isinstance(owner, str):
            args = _checked_arguments(budget, owner, method.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _budget(context: Context) -> Budget:
    assert isinstance(context, _Context)
    return context.budget


def _checked_arguments(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    if name == "format":
        budget.formatted(text, (args, kwargs))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.replaced(text, args[0], args[1])
    elif name == "join" and args:
        args = (list(args[0]), *args[1:])
        budget.joined(text, args[0])
    elif name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        budget.reserve(args[0])
    budget.reserve(len(text))
    return args


def _metered_filter(name: str) -> Callable[..., Any]:
    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.tick()
        for number in (*args, *kwargs.values()):
            if name in ("indent", "round") and isinstance(number, int) and abs(number) > _LARGEST_ARGUMENT:
                raise FormatError(f"[chat template] wanted at most {_LARGEST_ARGUMENT} for {name}; got {number}")
        if name in _TEXT_FILTERS and not isinstance(value, str):
            value = budget.text(value)
        if name in _ORDERING_FILTERS:
            value = value if isinstance(value, str | dict) else list(value)
            budget.reserve(budget.weigh(value))
        if name == "join":
            separator = args[0] if args else kwargs.get("d", "")
            budget.reserve(len(value) * budget.weigh(separator))
        elif name == "replace" and len(args) > 1:
            budget.replaced(value, budget.text(args[0]), budget.text(args[1]))
        elif name == "indent":
            width = args[0] if args else kwargs.get("width", 4)
            n_columns = len(width) if isinstance(width, str) else int(width)
            budget.reserve(len(value) + (value.count("\n") + 1) * n_columns)
        result = context.environment.call_filter(f"plain {name}", value, args, kwargs, context=context)
        if isinstance(result, str):
            budget.reserve(len(result))
        return result

    return metered


@pass_context
def _finalize(context: Context, value: Any) -> str:
    return _budget(context).text(value)


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for item in items:
        budget.tick()
        yield item


@pass_context
def _concat(context: Context, *parts: Any) -> str:
    budget = _budget(context)
    budget.reserve(sum(budget.weigh(part) for part in parts))
    return "".join([part if isinstance(part, str) else str(part) for part in parts])


@pass_context
def _literal(context: Context, text: str) -> str:
    return text


@pass_context
def _built(context: Context, value: Any) -> Any:
    budget = _budget(context)
    budget.reserve(budget.weigh(value))
    return value


@pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: keys in their order, nothing escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise FormatError(f"[chat template] wanted an indent of at most 16 for tojson; got {indent}")
    budget = _budget(context)
    budget.reserve(budget.weigh(value) + sum(budget.weigh(separator) for separator in separators or ()))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.reserve(len(text))
    return text


@pass_context
def _from_json(context: Context, text: str) -> Any:
    _budget(context).reserve(len(text))
    return json.loads(text)


def _raise(message: str) -> None:
    raise InputError(f"[chat template] {message}")


def _strftime_now(format: str) -> str:
    if len(format) > 200 or any(character.isdigit() for character in format):
        raise FormatError(f"[chat template] wanted a short time format without widths; got {format[:80]!r}")
    return datetime.now().strftime(format)
