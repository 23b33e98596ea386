"""What each token adds to a text, as bytes: joined, they are the text, in any runtime and without its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_export.errors import blamed_on
from vlm_export.files import read_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # of SentencePiece


def pieces_of(path: Path, count: int) -> list[bytes] | None:
    """`pieces` of a file.

    Raises:
        InputError: it is missing, or holds no tokenizer.
    """
    with blamed_on(f"{path}: holds no tokenizer"):
        return pieces(read_json(path), count)


def pieces(tokenizer: Mapping[str, Any], count: int) -> list[bytes] | None:
    """By id, the bytes of each of `count` tokens of a `tokenizer.json`; special tokens have none.

    None where a text is more than its tokens' bytes behind each other, as of WordPiece.
    """
    kinds = _kinds(tokenizer.get("decoder") or {})
    if "ByteLevel" in kinds:
        as_bytes = _bytes_of_letters
    elif kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        as_bytes = _bytes_of_sentence_piece
    else:
        return None
    model = tokenizer["model"]["vocab"]
    ids = model.items() if isinstance(model, Mapping) else ((piece, place) for place, (piece, _) in enumerate(model))
    found = {place: as_bytes(piece) for piece, place in ids}
    for added in tokenizer.get("added_tokens") or ():
        found[added["id"]] = b"" if added["special"] else added["content"].encode()
    return [found.get(place, b"") for place in range(count)]


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """The types of a decoder's steps."""
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return {str(step["type"]) for step in steps or () if "type" in step}


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level BPE stands for: `bytes_to_unicode` of GPT-2's encoder."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _letters()


def _bytes_of_letters(piece: str) -> bytes:
    known = all(letter in _BYTES for letter in piece)
    return bytes(_BYTES[letter] for letter in piece) if known else piece.encode()


def _bytes_of_sentence_piece(piece: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPACE, " ").encode()
