"""Texts grow by whole characters, and templates are rendered as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico_chat
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vlm_export.errors import InputError
from vlm_export.runtime.image_tokens import ImageTokens
from vlm_export.runtime.images import Grid
from vlm_export.runtime.text import Stream, Text

WORDS = "a café — naïve 👩‍👩‍👧 日本語, isn't it?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pico_chat.tokenizer(["<image>"]).save_pretrained(tmp_path)
    return tmp_path


def streamed(text: Text, token_ids: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = Stream(text, pieces.append)
    for count in range(1, len(token_ids) + 1):
        stream.update(token_ids[:count])
    stream.finish(text.decode(token_ids))
    return pieces


def test_a_stream_has_no_half_characters_and_no_special_tokens(folder: Path) -> None:
    """Every byte is a token here."""
    text = Text(folder)
    ids = [257, *text.encode(WORDS), 256]
    pieces = streamed(text, ids)
    assert "".join(pieces) == text.decode(ids) == WORDS
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > len(WORDS) / 2


def test_bytes_that_are_no_character_come_at_the_end_as_in_the_final_text(folder: Path) -> None:
    text = Text(folder)
    ids = text.encode("ab👩")[:-1]
    pieces = streamed(text, ids)
    assert "".join(pieces) == text.decode(ids)
    assert pieces[:2] == ["a", "b"]


def test_word_pieces_whose_spaces_are_cleaned_up(tmp_path: Path) -> None:
    words = ["a", "cat", ",", "is", "##n", "n't", "it", "?", "[UNK]"]
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)
    fast.save_pretrained(tmp_path)
    ids = [0, 1, 2, 3, 5, 6, 7]
    text = Text(tmp_path)
    assert text.decode(ids) == fast.decode(ids) == "a cat, isn't it?"
    pieces = streamed(text, ids)
    assert "".join(pieces) == "a cat, isn't it?"
    assert len(pieces) > 2


TEMPLATES = {
    "plain": pico_chat.TEMPLATE,
    "filters": "{{ messages | tojson }}{{ bos_token }}{% for m in messages if m.role == 'user' %}{{ m.role | upper }}"
    "{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m['role'] }}{% endgeneration %}{% continue %}{% endfor %}",
    "blocks": "{%- for m in messages %}\n    {%- if true %}\n  {{ m['role'] }}\n    {% endif %}\n{% endfor %}",
}
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<é & 'x'>"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "named"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(template: str, where: str, folder: Path) -> None:
    source = TEMPLATES[template]
    if where.endswith(".jinja"):
        (folder / where).write_text(source)
    else:
        name = "tokenizer_config.json" if where == "named" else where
        stored: Any = [{"name": "default", "template": source}] if where == "named" else source
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(values | {"chat_template": stored}))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert Text(folder).render(TALK) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_an_error(template: str, said: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=f"chat template: .*({said})"):
        Text(folder).render(TALK)


def test_as_many_places_as_images() -> None:
    whole, one = ImageTokens("<i>"), Grid(0, 0)
    assert whole.write("a<i>b<i>c", [one, one], [2, 1]) == "a<i><i>b<i>c"
    with pytest.raises(InputError, match="1 places for images"):
        whole.write("a<i>", [one, one], [2, 1])
    tiled = ImageTokens("<image>", "tiles").write("<image>", [Grid(1, 2)], [1])
    assert tiled.count("<image>") == 3
    assert "<row_1_col_2><image>\n\n<fake_token_around_image><global-img>" in tiled


def test_lines_of_cells() -> None:
    """`[IMG_BREAK]` after each line of cells but the last, which `[IMG_END]` ends; LightOnOCR has neither."""
    tokens = ImageTokens.of("i", "cells", {"image_break_token": "b", "image_end_token": "e"})
    assert [tokens.rows(grid) for grid in (Grid(2, 3), Grid(1, 1))] == [6, 1]
    assert tokens.write("a i, i", [Grid(2, 3), Grid(1, 1)], [6, 1]) == "a iiibiiie, ie"
    assert ImageTokens("i", "patches").write("a i", [Grid(2, 3)], [6]) == "a iiiiii"


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        Text(tmp_path)
