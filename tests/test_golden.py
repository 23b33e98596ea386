"""What is recorded: images as a shell finds them, and texts that end where the loaded model's own do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_decoders
import pico
import pico_chat
import pytest
from exported import record
from transformers import AutoModelForImageTextToText

from vlm_export.errors import InputError
from vlm_export.preprocessing import load_tokenizer
from vlm_export.ready import golden_images
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.verify.recording import eos_token_ids

FILES = ("img/0.png", "img/1.png", "img/.hidden.png", "img/deep/2.png", "here/img/9.png", "[odd]/3.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("../img/*.png", ["img/0.png", "img/1.png"]),
        ("./../img/0.png", ["img/0.png"]),
        ("img/../../img/[1-9].png", ["img/1.png"]),
        ("../here/../img/*", ["img/0.png", "img/1.png"]),  # and not the folder below
        ("../*/../img/0.png", ["img/0.png"]),
        ("../img/**/*.png", ["img/0.png", "img/1.png", "img/deep/2.png"]),
        ("../img/.*.png", ["img/.hidden.png"]),
        ("../[[]odd]/*", ["[odd]/3.png"]),
        ("img/*", ["here/img/9.png"]),
        ("../nowhere/*", []),
    ],
)
def test_as_a_shell_finds_them(pattern: str, names: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [folder / name for name in names]
    assert golden_images(folder / "here", [pattern]) == expected
    monkeypatch.chdir(folder / "here")
    assert golden_images(Path(), [pattern]) == expected
    assert golden_images(Path(), [str(folder / "here" / pattern)]) == expected
    assert golden_images(Path(), [pattern, pattern]) == expected


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert golden_images(Path("/"), ["~/img/0.*"]) == [folder / "img/0.png"]


def test_a_link_that_leads_out_is_refused(folder: Path) -> None:
    (folder / "img" / "7.png").symlink_to(folder / "here" / "img" / "9.png")
    with pytest.raises(InputError, match=r"7\.png: a link that leads out of .*img: copy"):
        golden_images(folder / "here", ["../img/*.png"])


# What the files say of the end, and where texts end: the tokenizer says 256.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, list[int]]] = {
    "the fine-tune's rules and the base's config": ({}, {"eos_token_id": 100}, {"eos_token_id": [256]}, [256]),
    "another end than the tokenizer's": ({}, {"eos_token_id": 256}, {"eos_token_id": 100}, [100]),
    "several": ({}, {"eos_token_id": 256}, {"eos_token_id": [7, 100, 7]}, [7, 100]),
    "no rules": ({}, {"eos_token_id": 100}, None, [100]),
    "no rules, config before text config": ({"eos_token_id": 101}, {"eos_token_id": 100}, None, [101]),
    "empty rules": ({}, {"eos_token_id": 100}, {}, [256]),
    "rules that say nothing of it": ({}, {"eos_token_id": 100}, {"pad_token_id": 0}, [256]),
    "nothing but the tokenizer": ({}, {"eos_token_id": None}, None, [256]),
    "one beyond the table": ({}, {}, {"eos_token_id": [256, 9999]}, [256]),
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("family", ["llava", "vision-encoder-decoder"])
def test_ends_where_the_loaded_model_does(family: str, case: str, tmp_path: Path) -> None:
    if family == "llava":
        folder, part = pico_chat.write_llava(tmp_path), "text_config"
    else:
        folder, part = encoder_decoders.write_checkpoint(tmp_path, encoder_decoders.config()), "decoder"
    top, text, rules, expected = ENDS[case]
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config | top | {part: config[part] | text}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if rules is not None:
        (folder / "generation_config.json").write_text(json.dumps(rules))
    found = eos_token_ids(open_checkpoint(folder), load_tokenizer(folder))
    assert found == expected
    own = AutoModelForImageTextToText.from_pretrained(folder).generation_config.eos_token_id
    if own is not None:
        own = own if isinstance(own, list) else [own]
        assert found == list(dict.fromkeys(token for token in own if token < pico_chat.VOCABULARY))


def test_a_default_of_a_class_is_no_end(tmp_path: Path) -> None:
    """LlamaConfig has 2 where its file says nothing."""
    folder = pico.write_checkpoint(tmp_path, pico.config(), lora=False)
    config = json.loads((folder / "config.json").read_text())
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        config["text_config"].pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert eos_token_ids(open_checkpoint(folder), load_tokenizer(folder)) == [256]


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    pico.write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"pico\.yaml: image_processor: image_std: is \[0, 0, 0\]"):
        record(tmp_path, image_processor={"image_std": [0, 0, 0]})
    assert not (tmp_path / "golden").exists()
