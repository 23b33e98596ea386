"""Ids become UTF-8 in a graph as Python decodes the bytes of their tokens."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from vlm_export.graph import texts

EMOJI, EURO = "🎉".encode(), "€".encode()
SEVERAL = [b"", b" a", EMOJI[:2], EMOJI[2:], EURO + EMOJI[:1], EURO[1:] + b"b"]
PIECES = [*(bytes([byte]) for byte in range(1, 256)), *SEVERAL]


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    kinds = {"piece_bytes": "uint8[b]", "piece_sizes": "int32[p]", "piece_ends": "int32[p]"}
    inputs = {**kinds, "tokens": "int64[B, T]", "lengths": "int64[B, 1]"}
    signature = ", ".join(f"{kind} {name}" for name, kind in inputs.items())
    model = f'<ir_version: 10, opset_import: ["" : 20]> g ({signature}) => (uint8[n] texts) {{{texts.text()}}}'
    return onnxruntime.InferenceSession(onnx.parser.parse_model(model).SerializeToString())


def _made(session: onnxruntime.InferenceSession, rows: list[list[int]], lengths: list[int] | None = None) -> list[str]:
    """The texts of rows of ids of `PIECES`, which are filled up with ids of a letter."""
    width = max(map(len, rows))
    tokens = np.array([[*row, *[96] * (width - len(row))] for row in rows], dtype=np.int64).reshape(len(rows), width)
    counts = np.array(lengths or [len(row) for row in rows], dtype=np.int64)[:, None]
    [made] = session.run(None, {**texts.tables(PIECES), "tokens": tokens, "lengths": counts})
    return made.tobytes().decode().split("\0")


def _ids(*pieces: bytes) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def test_bytes_of_a_character_may_lie_in_several_tokens(session: onnxruntime.InferenceSession) -> None:
    whole = _ids(b" a", EMOJI[:2], b"", EMOJI[2:], EURO + EMOJI[:1], EMOJI[1:2], EMOJI[2:])
    assert _made(session, [whole, whole[:-1], whole[:2], []]) == ["a🎉€🎉", "a🎉€", "a", ""]
    assert _made(session, [whole], [1]) == ["a"]
    assert _made(session, [[]]) == [""]


def test_what_is_no_character_is_left_out(session: onnxruntime.InferenceSession) -> None:
    broken = _ids(EMOJI[:2], b" a", EURO[1:] + b"b", EMOJI[:2], EMOJI[:2], EMOJI[2:], b" ")
    assert _made(session, [broken, _ids(b" ", b" ")]) == ["ab🎉", ""]


def test_any_bytes_are_as_python_reads_them(session: onnxruntime.InferenceSession) -> None:
    """First and later bytes at random, near the bounds of what may follow: overlong, surrogates, too large."""
    random = np.random.default_rng(0)
    near = [0x20, 0x61, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF]
    near += [0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    rows = random.choice(near, (400, 9)) - 1
    expected = [b"".join(PIECES[token] for token in row).decode(errors="ignore").strip(" ") for row in rows]
    assert _made(session, rows.tolist()) == expected
