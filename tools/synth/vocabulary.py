"""Vocabularies that stand for a model's own: every text can be written in them, and none of their words means anything."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import Any

from tensorgraph.errors import InputError
from tensorgraph.models.text.byte_level import BYTE_OF_CHARACTER
from tensorgraph.models.text.sentencepiece import SPACE
from tensorgraph.models.text.vocabulary import Kind
from tensorgraph.models.text.wordpiece import NAMED

BYTES = 256
LETTERS = "etaoinshrdlcumwfgypbvk"


def vocabulary(kind: str, n_tokens: int, *, encodes: bool = False) -> dict[str, Any]:
    """A vocabulary as GGUF metadata.

    Args:
        kind: `gpt2`, byte-level BPE; `llama`, as SentencePiece makes them; `bert`, WordPiece; `none`; or `auto`: `bert` for
            encoders, `gpt2` for others, and where that takes more tokens `none`.
        encodes: whether the model is an encoder.

    Raises: InputError: there are fewer tokens than it takes.
    """
    if kind == "auto":
        kind = "bert" if encodes else "gpt2"
        kind = kind if n_tokens >= KINDS[kind][0] else "none"
    if kind == "none":
        return {"tokenizer.ggml.model": "no_vocab"}
    if kind not in KINDS:
        raise InputError(f"[synth] wanted --vocab auto, {', '.join(KINDS)} or none; got {kind!r}")
    least, make = KINDS[kind]
    if n_tokens < least:
        raise InputError(f"[synth] a vocabulary like {kind}'s takes at least {least} tokens; got {n_tokens}")
    return {f"tokenizer.ggml.{key}": value for key, value in ({"model": kind} | make(n_tokens)).items()}


def _byte_level(n_tokens: int) -> dict[str, Any]:
    """All bytes, and the tokens that their pairs and then three of them make; the last two end texts and begin them."""
    alphabet = sorted(BYTE_OF_CHARACTER, key=lambda character: (LETTERS + "Ġ").find(character) % BYTES)
    merges = list(islice(_merges(alphabet), n_tokens - BYTES - 2))
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>", "<|startoftext|>"]
    return {
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [Kind.NORMAL.value] * (n_tokens - 2) + [Kind.CONTROL.value] * 2,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": n_tokens - 1,
        "eos_token_id": n_tokens - 2,
        "add_bos_token": False,
    }


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    pairs = ["".join(pair) for pair in product(alphabet, repeat=2)]
    yield from product(alphabet, repeat=2)
    yield from product(pairs, alphabet)


def _sentencepiece(n_tokens: int) -> dict[str, Any]:
    """Unknown, begin and end; all bytes; a space, letters, and what they make, longer ones with lower scores."""
    letters = [SPACE, *LETTERS]
    pieces = list(islice(("".join(each) for n in range(1, 9) for each in product(letters, repeat=n)), n_tokens - BYTES - 3))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTES)), *pieces]
    first = [Kind.UNKNOWN.value, *[Kind.CONTROL.value] * 2, *[Kind.BYTE.value] * BYTES]
    return {
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * len(first) + [-float(i) for i in range(len(pieces))],
        "token_type": first + [Kind.NORMAL.value] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
    }


def _word_pieces(n_tokens: int) -> dict[str, Any]:
    """The named tokens, then letters and what they make, each as a word's beginning and as what goes on."""
    spelled = ("".join(each) for n in range(1, 9) for each in product(LETTERS, repeat=n))
    pieces = list(islice((piece for text in spelled for piece in (SPACE + text, text)), n_tokens - len(NAMED)))
    named = list(NAMED.values())
    return {
        "tokens": [*named, *pieces],
        "token_type": [Kind.CONTROL.value] * len(named) + [Kind.NORMAL.value] * len(pieces),
        **{f"{GGUF_NAMES.get(name, name)}_token_id": i for i, name in enumerate(NAMED)},
        "bos_token_id": named.index(NAMED["cls"]),
        "eos_token_id": named.index(NAMED["sep"]),
    }


GGUF_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""What keys call tokens, where that is something else."""
KINDS = {
    "gpt2": (BYTES + 2, _byte_level),
    "llama": (BYTES + 4, _sentencepiece),
    "bert": (len(NAMED) + 1, _word_pieces),
}
"""The least number of tokens, and what makes that many."""
