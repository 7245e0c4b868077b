"""`tensorgraph tokenize`: text to token ids and back."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options


def tokenize(
    model: options.Model,
    text: Annotated[str | None, typer.Argument(help="The text; stdin where it is - or not given.", show_default=False)] = None,
    decode: Annotated[bool, typer.Option("--decode", help="The text is ids: print what they stand for.")] = False,
    special: Annotated[bool, typer.Option("--special", help="Read the spelling of a control token as that token.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Do not add the tokens that begin and end a sequence.")] = False,
    as_json: options.Json = False,
) -> None:
    """Print the token ids of a text, one a line with the bytes it stands for; or with --decode the text of ids.

    \b
    tensorgraph tokenize smollm2 "Hello world"
    tensorgraph tokenize smollm2 --special "<|im_start|>user" --json
    tensorgraph tokenize smollm2 --decode "19556 905"
    """
    from tensorgraph.models.text.model import load_tokenizer

    given = options.stdin_text("tokenize") if text in (None, "-") else text or ""
    with options.working("reading the vocabulary"):
        tokenizer = load_tokenizer(model)
    if decode:
        ids = parse_ids(given)
        decoded = tokenizer.decode(ids)
        typer.echo(json.dumps({"ids": ids, "text": decoded}) if as_json else decoded)
        return
    ids = tokenizer.encode(given, add_special=not bare, parse_special=special)
    pieces = [tokenizer.piece(i, after_special=False)[0] for i in ids]
    if as_json:
        typer.echo(json.dumps({"ids": ids, "pieces": [piece.decode(errors="replace") for piece in pieces]}))
        return
    for i, piece in zip(ids, pieces, strict=True):
        typer.echo(f"{i}\t{_shown(piece)}")


def parse_ids(text: str) -> list[int]:
    """Numbers between spaces, commas or brackets.

    Raises:
        InputError: something else stands there.
    """
    words = text.translate(str.maketrans("[],", "   ")).split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise InputError(f"[tokenize] --decode wants token ids; got {word[:40]!r}")
    return [int(word) for word in words]


def _shown(piece: bytes) -> str:
    """Bytes as text in quotes where they are text, else as a bytes literal."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
