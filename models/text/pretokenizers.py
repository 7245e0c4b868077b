"""How each byte-level BPE vocabulary cuts text before merging: the regular expressions of its pre-tokenizer.

The expressions are those that the models' authors publish in `tokenizer.json`. Each one isolates its matches; several
are applied one after the other, every later one to the pieces that the earlier ones left.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from tensorgraph.errors import UnknownNameError


@dataclass(frozen=True)
class PreTokenizer:
    """The way one family of vocabularies cuts text.

    Attributes:
        expressions: applied in order; each isolates what it matches.
        ignore_merges: a whole piece that stands in the vocabulary is taken as it is, without merging.
        add_bos: whether BOS is added where the metadata does not say.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer of the `tokenizers` library that does this."""
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in self.expressions]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _word_and_digits(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(contractions: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


# The letters that DeepSeek's first vocabularies call words: letters with case, as of Unicode 11 and without Georgian
# and Armenian small letters. Code points, because editors normalise some of these characters.
_CASED_LETTERS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 3a3-3f5
3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15
1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3
1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139
213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787
a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2
118a0-118df 1e900-1e943
"""


def _character_class(ranges: str) -> str:
    ends = (item.split("-") for item in ranges.split())
    return "[" + "".join("-".join(chr(int(end, 16)) for end in pair) for pair in ends) + "]"


_CJK = _character_class("4e00-9fa5 800-4e00 ac00-d7ff")
_HAN_AND_KANA = _character_class("4e00-9fa5 3040-309f 30a0-30ff")
_DEEPSEEK_PUNCTUATION = r"[!-/:-~" + _character_class("ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")[1:]
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_ONE_DIGIT = r"\p{N}"
_DEEPSEEK_V3_WORDS = (
    rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_DIGITS_THEN_GPT2 = PreTokenizer((_ONE_DIGIT, _GPT2))
_LLAMA3 = PreTokenizer((_word_and_digits(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_THREE_DIGITS = PreTokenizer((_word_and_digits(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_word_and_digits(_ONE_DIGIT),))
_GPT_4O = PreTokenizer((_cased_words(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_V3_WORDS))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _THREE_DIGITS,
    "smaug-bpe": _THREE_DIGITS,
    "glm4": _THREE_DIGITS,
    "chatglm-bpe": _THREE_DIGITS,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT_4O,
    "llama4": _GPT_4O,
    "tekken": PreTokenizer((_cased_words("", _ONE_DIGIT),), ignore_merges=True, add_bos=True),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_character_class(_CASED_LETTERS)}+",
            rf"\s?{_DEEPSEEK_PUNCTUATION}+",
            r"\s+$",
            f"{_CJK}+",
            _ONE_DIGIT,
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_CJK}+", _ONE_DIGIT)),
    "deepseek-v3": _DEEPSEEK_V3,
}


def pre_tokenizer(name: object) -> PreTokenizer:
    """The pre-tokenizer that `tokenizer.ggml.pre` calls `name`.

    Raises: UnknownNameError, listing the names that are there.
    """
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnknownNameError(f'[tokenizer] wanted one of {known} in "tokenizer.ggml.pre"; got {name!r}')
    return PRE_TOKENIZERS[name]
