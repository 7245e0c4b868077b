"""Chat templates: messages to the text that a model was trained to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from tensorgraph.errors import FormatError, InputError, TensorGraphError
from tensorgraph.models.text.chat_budget import RenderLimits
from tensorgraph.models.text.chat_sandbox import Sandbox
from tensorgraph.models.text.json_file import read_object
from tensorgraph.models.text.vocabulary import strings

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LONGEST_SOURCE = 1_000_000
_SPECIAL = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask")
_SHORT = {"unknown": "unk", "padding": "pad", "seperator": "sep"}


class ChatTemplate:
    """A compiled chat template.

    It runs in jinja2's immutable sandbox, in whichever thread calls, with what transformers offers to templates:
    `raise_exception`, `strftime_now`, `tojson`, loop controls, trimmed blocks. Every iteration, call, filter, operator
    and output looks at the clock and accounts for the text it makes before making it, so a hostile template stops
    at the limits. What the clock does not see is one step on values within the limits (sorting one list, comparing
    two texts), which takes well under a second, and nested tuples used as keys, which may take longer.
    """

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, limits: RenderLimits | None = None
    ) -> None:
        """Compile a template; `special_tokens` are variables such as `bos_token`.

        Raises: FormatError where the source is no template.
        """
        if len(source) > _LONGEST_SOURCE:
            raise FormatError(f"[chat template] wanted at most {_LONGEST_SOURCE} characters; got {len(source)}")
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._limits = limits or RenderLimits()
        try:
            self._template = Sandbox(self._limits).from_string(source)
        except TemplateSyntaxError as error:
            raise FormatError(f"[chat template] wanted a jinja2 template; line {error.lineno}: {error}") from None
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise FormatError(f"[chat template] wanted a template that compiles; {_reason(error)}") from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, limits: RenderLimits | None = None) -> ChatTemplate:
        """The template that a GGUF file carries; ChatML where it has none but a vocabulary with `<|im_start|>`.

        Raises: FormatError where there is neither, or the template is no template.
        """
        tokens = strings(metadata, "tokenizer.ggml.tokens")
        special_tokens = {}
        for name in _SPECIAL:
            token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                special_tokens[f"{_SHORT.get(name, name)}_token"] = tokens[token_id]
        source = metadata.get("tokenizer.chat_template")
        if source is None and "<|im_start|>" in tokens:
            source = CHATML
        if not isinstance(source, str):
            wanted = 'text in "tokenizer.chat_template", or <|im_start|> in the vocabulary for ChatML'
            raise FormatError(f"[chat template] wanted {wanted}; got {type(source).__name__}")
        return cls(source, special_tokens=special_tokens, limits=limits)

    @classmethod
    def from_folder(cls, folder: Path, *, limits: RenderLimits | None = None) -> ChatTemplate:
        """The template that a published folder carries: chat_template.jinja, or an entry of tokenizer_config.json.

        Raises: InputError where there is no tokenizer_config.json; FormatError where neither has one, or it is no template.
        """
        config, own = read_object(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
        source = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            wanted = f"chat_template.jinja in {folder}, or text as chat_template in its tokenizer_config.json"
            raise FormatError(f"[chat template] wanted {wanted}; got {type(source).__name__}")
        special_tokens = {}
        for key in (f"{_SHORT.get(name, name)}_token" for name in _SPECIAL):
            token = config.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                special_tokens[key] = text
        return cls(source, special_tokens=special_tokens, limits=limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation; other keyword arguments become variables of the template.

        Raises: InputError where the template refuses the messages or cannot render them; FormatError where it does
        something forbidden or goes over a limit.
        """
        variables = {
            **self._special_tokens,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else list(tools),
            "documents": None,
            **kwargs,
        }
        pieces: list[str] = []
        n_chars = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                n_chars += len(piece)
                if n_chars > self._limits.output_chars:
                    limit = self._limits.output_chars
                    raise FormatError(f"[chat template] wanted an output of at most {limit} characters; it is longer")
        except TensorGraphError:
            raise
        except (SecurityError, RecursionError, MemoryError) as error:
            raise FormatError(f"[chat template] wanted a harmless template; {_reason(error)}") from None
        except Exception as error:
            raise InputError(f"[chat template] cannot render these messages: {_reason(error)}") from error
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
