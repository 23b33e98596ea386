"""Links that lead out of a checkpoint, an adapter or a golden are not read, nor published; no pipe is waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pico
import pytest
from click.testing import CliRunner, Result
from exported import Exported, prepare, write_images

from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.hub import plan_push
from vlm_export.own_files import check_files, own_file, unchanged_file
from vlm_export.preprocessing import copy_processor, load_tokenizer

SECRET = "what is nobody's business"


def vlm_export(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    """The one line that an input error is."""
    done = vlm_export(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert len(done.stderr.splitlines()) == 1
    assert SECRET not in done.stderr
    return done.stderr


@pytest.fixture(autouse=True)
def _nothing_is_waited_for() -> Iterator[None]:
    """A pipe would be, without end."""

    def give_up(*_: object) -> None:
        raise AssertionError("waits for a pipe")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# The rule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file in it and one beside it."""
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "file.json").write_text("{}")
    (tmp_path / "secret.json").write_text(SECRET)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "file.json").write_text(SECRET)
    return tmp_path / "folder"


def test_files_and_links_inside_are_taken(folder: Path) -> None:
    (folder / "inner" / "link.json").symlink_to("../file.json")
    (folder / "alias").symlink_to("inner")
    (folder.parent / "reached").symlink_to(folder)
    for start in (folder, folder.parent / "reached", folder / "inner" / ".."):
        assert own_file(start, "file.json") == start / "file.json"
        assert own_file(start, "inner/link.json") == start / "inner" / "link.json"
        assert own_file(start, "alias/link.json") == start / "alias" / "link.json"
    assert own_file(folder, "missing.json") is own_file(folder, "no/file.json") is None
    assert unchanged_file(folder, "file.json", "0" * 64) is None
    check_files(folder, ["*.json", "inner/*.json", "missing/*"])


@pytest.mark.parametrize(
    ("link", "target", "name", "said"),
    [
        ("a.json", "../secret.json", "a.json", "a.json: a link that leads out of folder: copy the file itself there"),
        ("a.json", "{folder}/../secret.json", "a.json", "a.json: a link that leads out"),
        ("a.json", "/dev/zero", "a.json", "a.json: a link that leads out"),
        ("sub", "../outer", "sub/file.json", "sub: a link that leads out of folder: copy the folder itself there"),
        ("a.json", "b.json", "a.json", "a.json: a link to no file"),
        ("a.json", "../none.json", "a.json", "a.json: a link to no file"),
        ("a.json", "a.json", "a.json", "a.json: a link to no file"),
        ("a.json", "inner", "a.json", "a.json: is a folder: put a file there"),
    ],
)
def test_other_links_are_refused_by_name(link: str, target: str, name: str, said: str, folder: Path) -> None:
    (folder / link).symlink_to(target.format(folder=folder))
    for look in (lambda: own_file(folder, name), lambda: check_files(folder, ["*.json", "sub/*.json"])):
        with pytest.raises(InputError) as caught:
            look()
        assert str(caught.value).startswith(f"{folder / said.format(folder=folder)}")


def test_a_name_leads_out_too(folder: Path) -> None:
    with pytest.raises(InputError, match="leads out"):
        own_file(folder, "inner/../../secret.json")


def test_a_pipe_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json: is a pipe, a socket or a device: put a file there"):
        check_files(folder, ["*.json"])


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path: Path) -> None:
    """Those of its repo, or those that the whole cache shares; not those of another repo."""
    cache = tmp_path / "hub"
    repo, other = cache / "models--org--model", cache / "models--org--other"
    snapshot = repo / "snapshots" / "0123abc"
    shared = cache / "blobs" / "ab" / f"ab{'0' * 62}"
    for path in (repo / "blobs" / "1", other / "blobs" / "1", shared, cache / "blobs" / "notes", cache / "token"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "2").symlink_to(f"../../blobs/ab/{shared.name}")
    for name in ("1", "2"):
        (snapshot / f"{name}.json").symlink_to(f"../../blobs/{name}")
        assert own_file(snapshot, f"{name}.json")
    for target in ("../../../models--org--other/blobs/1", "../../../token", "../../../blobs/notes"):
        (snapshot / "bad.json").unlink(missing_ok=True)
        (snapshot / "bad.json").symlink_to(target)
        with pytest.raises(InputError, match="leads out"):
            own_file(snapshot, "bad.json")
    elsewhere = tmp_path / "mine" / "snapshots" / "today"  # a folder that is merely called so
    elsewhere.mkdir(parents=True)
    (tmp_path / "mine" / "blobs").mkdir()
    (tmp_path / "mine" / "blobs" / "1").write_text("{}")
    (elsewhere / "a.json").symlink_to("../../blobs/1")
    with pytest.raises(InputError, match="leads out"):
        own_file(elsewhere, "a.json")


# Checkpoints


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a checkpoint and an adapter beside it."""
    folder = tmp_path_factory.mktemp("pristine")
    settings = pico.config()
    pico.write_checkpoint(folder / "base", settings, lora=False)
    pico.write_peft_adapter(folder / "adapter", {**settings})
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    place = tmp_path / "place"
    shutil.copytree(pristine, place)
    (place / "r.yaml").write_text("name: t\nmodel: base\nadapters: [{path: adapter}]\ngolden: {images: ['images/*']}\n")
    return place


def leave(path: Path) -> None:
    """Put the file outside, and a link to it in its place."""
    outside = path.parents[2] / f"outside-{path.name}"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text('{"private": 1}')
    path.symlink_to(outside)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name",
    [
        "base/config.json",
        "base/model.safetensors",
        "base/model.safetensors.index.json",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "base/generation_config.json",
        "base/preprocessor_config.json",
        "base/processor_config.json",
        "base/chat_template.jinja",
        "base/chat_template.json",
        "base/vocab.txt",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize(("spoil", "said"), [(leave, "a link that leads out of"), (pipe, "is a pipe, a socket or a")])
def test_merge_reads_nothing_from_elsewhere(spoil: Callable[[Path], None], said: str, name: str, place: Path) -> None:
    spoil(place / name)
    assert f"{name}: {said}" in refused("merge", place / "r.yaml", "--work", place / "work")
    assert not (place / "work").exists()


def test_a_shard_of_any_name_is_a_file_of_the_folder(place: Path) -> None:
    (place / "base" / "model.safetensors").rename(place / "weights")
    (place / "base" / "part").symlink_to(place / "weights")
    index = {"weight_map": {"a": "part"}}
    (place / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "base/part: a link that leads out of" in refused("merge", place / "r.yaml", "--work", place / "work")


def test_a_folder_behind_a_link_and_links_inside_it_are_taken(place: Path, tmp_path: Path) -> None:
    base = (place / "base").rename(tmp_path / "elsewhere")
    (place / "base").symlink_to(base)
    (base / "config.json").rename(base / "real.json")
    (base / "config.json").symlink_to("real.json")
    assert vlm_export("merge", place / "r.yaml", "--work", place / "work").exit_code == 0
    assert (place / "work" / "merged" / "config.json").is_file()


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer.99.json", "additional_chat_templates/tool.jinja"])
@pytest.mark.parametrize(("spoil", "said"), [(leave, "a link that leads out of"), (pipe, "is a pipe, a socket or a")])
def test_what_transformers_reads_of_a_folder(spoil: Callable[[Path], None], said: str, name: str, place: Path) -> None:
    path = place / "base" / name
    path.parent.mkdir(exist_ok=True)
    spoil(path)
    with pytest.raises(InputError, match=said):
        load_tokenizer(place / "base")


def test_a_vocabulary_of_any_name(place: Path) -> None:
    """Without `tokenizer.json`, transformers makes one of whatever its classes look for."""
    (place / "base" / "tokenizer.json").unlink()
    leave(place / "base" / "spiece.model")
    with pytest.raises(InputError, match=r"spiece\.model: a link that leads out of"):
        copy_processor(place / "base", place)


# Goldens


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("recorded"))
    made.export()
    return made


@pytest.fixture
def golden(recorded: Exported, tmp_path: Path) -> Exported:
    return recorded.copy(tmp_path / "copy" / "of")


SITE, PAGE = "demo --export site", "demo --port 0 --no-open"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("verify", name) for name in ("images/0.png", "images", "golden.json", "golden.safetensors")),
        *((command, name) for command in (SITE, PAGE) for name in ("images/0.png", "images", "golden.json")),
        *(("bench --runtime ort", name) for name in ("images/0.png", "images")),
    ],
)
def test_goldens_from_elsewhere(command: str, name: str, golden: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden.recipe.golden_dir
    leave(folder / name)
    monkeypatch.chdir(folder.parent)
    verb, *options = command.split()
    said = refused(verb, golden.recipe.path, "--work", golden.work.root, *options)
    assert f"golden/pico/{name}: a link that leads out of" in said
    assert not Path("site").exists()


@pytest.mark.parametrize("options", [["--export", "site"], ["--port", "0", "--no-open"]])
def test_the_page_shows_no_other_image_than_was_recorded(
    options: list[str], golden: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden.recipe.golden_dir)
    Path("images/0.png").write_text(SECRET)
    said = refused("demo", golden.recipe.path, "--work", golden.work.root, *options)
    assert "images/0.png: not the image that the golden outputs were recorded on: run `vlm-export golden` again" in said
    assert not Path("site").exists()


@pytest.mark.parametrize(
    ("images", "link", "target", "said"),
    [
        ("images/*.png", "images/9.png", "../../outside/0.png", "images/9.png: a link that leads out of"),
        ("images/9.png", "images/9.png", "../../outside/0.png", "images/9.png: a link that leads out of"),
        ("images/*/*.png", "images/more", "../../outside", "images/more: a link that leads out of"),
        ("images/*.png", "images/9.png", "none.png", "images/9.png: a link to no file"),
        ("images/*.png", "images/9.png", None, "images/9.png: is a pipe, a socket or a device"),
    ],
)
def test_images_of_a_recipe_from_elsewhere(
    images: str, link: str, target: str | None, said: str, place: Path, tmp_path: Path
) -> None:
    write_images(place / "images")
    write_images(tmp_path / "outside")
    path = place / "r.yaml"
    path.write_text(path.read_text().replace("images/*", images))
    if target is None:
        os.mkfifo(place / link)
    else:
        (place / link).symlink_to(target)
    message = refused("golden", path)
    assert message.startswith(f"error: {path}: golden.images: ") and said in message
    assert not (place / "golden").exists()


def test_images_of_a_folder_behind_a_link_are_taken(place: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "outside")
    (place / "images").symlink_to(tmp_path / "outside")
    assert vlm_export("golden", place / "r.yaml").exit_code == 0
    names = sorted(path.name for path in (place / "golden" / "t" / "images").iterdir())
    assert names == ["0.png", "1.png", "2.png"]


def test_a_recipe_that_is_a_pipe(tmp_path: Path) -> None:
    pipe(tmp_path / "r.yaml")
    assert "r.yaml: cannot be read: it is no file" in refused("merge", tmp_path / "r.yaml")


def test_a_pipe_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pipe(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe, a socket or a device: remove it from the folder"):
        plan_push("org/model", tmp_path)
