"""`vlm-export run` as users meet it: what it prints and imports, where the model comes from, what it falls back to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session

from vlm_export import runtime
from vlm_export.apps.exported_repo import find_repo, open_model, split_arguments
from vlm_export.apps.load import load
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.hub import push_folder
from vlm_export.recipe import find_recipe
from vlm_export.runtime.images import open_image
from vlm_export.verify.golden import load_golden

# Runs the command in this process and says which of the heavy libraries it brought.
MEASURED = """
import sys
from vlm_export.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    print([name for name in ("torch", "transformers", "onnx_ir", "huggingface_hub") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def captions() -> dict[Path, str]:
    """What PyTorch says of the golden images."""
    recipe = find_recipe("shapes-captioner")
    golden = load_golden(recipe.golden_dir)
    paths = [path.resolve() for path in golden.image_paths()]
    return dict(zip(paths, (image.caption for image in golden.facts.images), strict=True))


@pytest.fixture
def images(captions: dict[Path, str]) -> list[str]:
    return [str(path) for path in list(captions)[:3]]


@pytest.fixture
def repo_copy(default_repo: Path, tmp_path: Path) -> Path:
    """A copy that the test spoils, with the merged checkpoint beside it."""
    shutil.copytree(default_repo.parent, tmp_path / "work")
    return tmp_path / "work" / "repo"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


def test_one_image_gives_its_caption_and_several_a_line_each(
    default_repo: Path, captions: dict[Path, str], images: list[str]
) -> None:
    expected = [captions[Path(image)] for image in images]
    alone = run(default_repo, images[0])
    assert (alone.exit_code, alone.stdout, alone.stderr) == (0, f"{expected[0]}\n", "")
    several = run(default_repo, *images, "--dtype", "fp32")
    assert several.stdout.splitlines() == [f"{i}: {text}" for i, text in zip(images, expected, strict=True)]
    assert run(default_repo, *images, "--stream").stdout == several.stdout
    assert run(default_repo, images[0], "--stream").stdout == alone.stdout


def test_a_folder_is_the_images_in_it(default_repo: Path, images: list[str], tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG"):
        shutil.copy(images[0], tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    lines = run(default_repo, tmp_path).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "a.PNG"), str(tmp_path / "b.png")]
    assert split_arguments([str(tmp_path)]) == (None, [tmp_path / "a.PNG", tmp_path / "b.png"])


def test_a_folder_goes_on_past_what_cannot_be_read(default_repo: Path, images: list[str], tmp_path: Path) -> None:
    for image in images:
        shutil.copy(image, tmp_path)
    (tmp_path / "01a.png").write_bytes(b"no picture")
    result = run(default_repo, tmp_path)
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == len(images)
    *lines, last = result.stderr.splitlines()
    assert lines == [
        f"{tmp_path / '01a.png'}: not a readable image: cannot identify image file '{tmp_path / '01a.png'}'"
    ]
    assert last == "error: 1 of 4 images cannot be read"
    streamed = run(default_repo, tmp_path, "--stream")
    assert (streamed.exit_code, streamed.stdout) == (2, result.stdout)
    as_json = run(default_repo, tmp_path, "--json")
    found = json.loads(as_json.stdout)
    assert (as_json.exit_code, len(found["results"]), len(found["unread"])) == (2, 3, 1)


def test_an_image_from_stdin(default_repo: Path, images: list[str], captions: dict[Path, str]) -> None:
    content = Path(images[0]).read_bytes()
    result = CliRunner().invoke(main, ["run", str(default_repo), "-"], input=content)
    assert (result.exit_code, result.stdout.strip()) == (0, captions[Path(images[0])])
    result = CliRunner().invoke(main, ["run", str(default_repo), "-"], input=b"no picture")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: -: stdin holds no readable image")


def test_json_has_tokens_times_and_what_ran(default_repo: Path, captions: dict[Path, str], images: list[str]) -> None:
    done = json.loads(run(default_repo, *images, "--json", "--num-beams", 3, "--num-return-sequences", 2).stdout)
    assert (done["model"], done["layout"], done["backend"], done["dtype"]) == (
        "shapes-captioner",
        "captioner",
        "onnx",
        "q8",
    )
    assert done["load_seconds"] > 0
    for image, result in zip(images, done["results"], strict=True):
        assert result["images"] == [image]
        assert result["text"] == captions[Path(image)]
        assert result["token_ids"][-1] == 0
        assert result["score"] > result["alternatives"][0]["score"]
        assert 0 < result["first_token_seconds"] < result["seconds"]


def test_alternatives_are_lines_of_their_own(default_repo: Path, images: list[str]) -> None:
    for more in ((), ("--stream",)):
        lines = run(default_repo, images[0], "--num-beams", 2, "--num-return-sequences", 2, *more).stdout.splitlines()
        assert len(set(lines)) == 2
    options = ("--sample", "--temperature", 5, "--seed", 3, "--num-return-sequences", 3)
    assert len(set(run(default_repo, images[0], *options).stdout.splitlines())) == 3
    assert run(default_repo, images[0], *options).stdout == run(default_repo, images[0], *options).stdout


def test_onnx_runtime_alone_is_imported(default_repo: Path, images: list[str], captions: dict[Path, str]) -> None:
    arguments = [sys.executable, "-c", MEASURED, "run", str(default_repo), images[0], "--num-beams", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [captions[Path(images[0])], "[]"]


def test_straight_after_installing_it_captions_with_pytorch(
    tmp_path: Path, images: list[str], captions: dict[Path, str]
) -> None:
    command = [str(Path(sys.executable).with_name("vlm-export")), "run", images[0]]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout == f"{captions[Path(images[0])]}\n"
    assert done.stderr == (
        "shapes-captioner is not exported yet: captioning with PyTorch; to export it, "
        "`vlm-export merge shapes-captioner`, then `vlm-export onnx shapes-captioner`\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_found_in_its_work_folder(
    default_repo: Path, images: list[str], captions: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(default_repo.parents[2])
    for arguments in ([images[0]], ["shapes-captioner", images[0]], ["build/shapes-captioner", images[0]]):
        done = run(*arguments)
        assert (done.stdout, done.stderr) == (f"{captions[Path(images[0])]}\n", "")
    assert find_repo(None) == find_repo("build/shapes-captioner") == Path("build/shapes-captioner/repo")
    assert find_repo(None, default_repo.parent) == default_repo


SPOILT = {
    "missing": lambda graph: graph.unlink(),
    "cut": lambda graph: graph.write_bytes(graph.read_bytes()[:1000]),
    "another": lambda graph: shutil.copy(graph.with_name("decoder_model_merged.onnx"), graph),
}


@pytest.mark.parametrize("how", SPOILT)
def test_falls_back_to_pytorch_where_a_graph_is_missing_or_fails(
    how: str, repo_copy: Path, images: list[str], captions: dict[Path, str]
) -> None:
    SPOILT[how](repo_copy / "onnx" / "encoder_model.onnx")
    done = run(repo_copy, images[0], "--dtype", "fp32")
    assert done.stdout == f"{captions[Path(images[0])]}\n"
    [line] = done.stderr.splitlines()
    assert line.endswith("captioning with PyTorch instead")
    assert "encoder_model" in line
    forced = run(repo_copy, images[0], "--dtype", "fp32", "--backend", "onnx")
    assert forced.exit_code == 2
    assert "encoder_model" in forced.stderr and forced.stdout == ""


def test_another_dtype_is_no_reason_to_fall_back(repo_copy: Path, images: list[str]) -> None:
    done = run(repo_copy, images[0], "--dtype", "fp16")
    assert done.exit_code == 2
    assert done.stderr.endswith("encoder_model_fp16.onnx, decoder_model_merged_fp16.onnx missing; there is fp32, q8\n")


def test_without_a_pytorch_model_it_says_what_is_missing(repo_copy: Path, images: list[str]) -> None:
    shutil.rmtree(repo_copy.parent / "merged")
    for graph in (repo_copy / "onnx").glob("encoder*"):
        graph.unlink()
    for backend in ("auto", "torch"):
        done = run(repo_copy, images[0], "--backend", backend)
        assert done.exit_code == 2
        assert f"there is no PyTorch model to run instead, in {repo_copy.parent / 'merged'}" in done.stderr
    assert "encoder_model.onnx missing" in run(repo_copy, images[0]).stderr


def test_pytorch_can_be_forced(default_repo: Path, images: list[str], captions: dict[Path, str]) -> None:
    model = open_model(str(default_repo), backend="torch")
    pieces: list[str] = []
    answer = model.generate([open_image(Path(images[0]))], on_text=pieces.append)
    assert (model.backend, model.name, answer.finish_reason) == ("torch", "shapes-captioner", "stop")
    assert answer.text == "".join(pieces) == captions[Path(images[0])]
    assert len(pieces) > 5
    beams = runtime.Options(num_beams=3, num_return_sequences=3)
    ours = load(default_repo, dtype="fp32").generate([open_image(Path(images[0]))], options=beams)
    theirs = model.generate([open_image(Path(images[0]))], options=beams)
    assert [one.token_ids for one in (ours, *ours.alternatives)] == [
        one.token_ids for one in (theirs, *theirs.alternatives)
    ]
    stopped = model.generate([open_image(Path(images[0]))], options=runtime.Options(stop=(" triangle",)))
    assert (stopped.text, stopped.finish_reason) == (captions[Path(images[0])].split(" triangle")[0], "stop")
    broken_off = model.generate([open_image(Path(images[0]))], cancelled=lambda: True)
    assert (len(broken_off.token_ids), broken_off.finish_reason) == (1, "cancelled")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photo.jpg"], "photo.jpg: no such image"),
        (["photos/cat.png"], "photos/cat.png: no such image"),
        (["shapes-captioner", "photo.jpg"], "photo.jpg: no such image"),
        (["shapes-captioner"], "give an image: `vlm-export run shapes-captioner photo.jpg`"),
        (["nothing"], "nothing: no such image; give an image: `vlm-export run nothing photo.jpg`"),
        (["shapes-captoiner", "IMAGE"], "no recipe 'shapes-captoiner': did you mean 'shapes-captioner'?; nor is it a "),
        (["my.yaml", "IMAGE"], "my.yaml: no such recipe file"),
        (["EMPTY"], "no images in this folder, and no config.json and onnx/ of an exported repo"),
        (["EMPTY", "IMAGE"], "no images in this folder"),
        (["REPO", "IMAGE", "--prompt", "what?"], "shapes-captioner: a captioner repo takes no prompt"),
        (["REPO", "IMAGE", "IMAGE", "--together"], "captions one image at a time, not 2 together"),
        (["REPO", "IMAGE", "--top-p", "0.9"], "--top-p: is for sampling: add --sample"),
        (["REPO", "IMAGE", "--num-beams", "0"], "num_beams: 0, but it must be at least 1"),
        (["REPO", "IMAGE", "--num-beams", "100000"], "num_beams: 100000, but it must be at most 4096"),
        (["REPO", "IMAGE", "--sample", "--temperature", "nan"], "temperature: nan, but it must be from"),
        (["REPO", "IMAGE", "--sample", "--temperature", "1e-320"], "temperature: 1e-320, but it must be from"),
        (["REPO", "IMAGE", "--num-beams", "2", "--length-penalty", "1e308"], "length_penalty: 1e+308, but 30 to the"),
        (["REPO", "IMAGE", "--sample", "--seed", "-1"], "seed: -1, but it must be at least 0"),
        (["REPO", "IMAGE", "--max-new-tokens", f"{10**23}"], "but after the prompt the model has positions for 221"),
        (["REPO", "IMAGE", "--dtype", "q9"], "dtype 'q9' is none of fp32, fp16, int8, uint8, q8"),
        (["REPO", "README"], "not a readable image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_that_says_what_to_do(
    arguments: list[str], said: str, default_repo: Path, images: list[str], tmp_path: Path
) -> None:
    named = {
        "IMAGE": images[0],
        "REPO": str(default_repo),
        "README": str(default_repo / "README.md"),
        "EMPTY": str(tmp_path),
    }
    done = run(*(named.get(argument, argument) for argument in arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_image_without_a_suffix_is_an_image(default_repo: Path, images: list[str], tmp_path: Path) -> None:
    """What exists as a file is an image, whatever it is called."""
    bare = shutil.copy(images[0], tmp_path / "shapes-captioner")
    assert split_arguments([bare]) == (None, [tmp_path / "shapes-captioner"])
    assert split_arguments(["shapes-captioner", bare]) == ("shapes-captioner", [tmp_path / "shapes-captioner"])
    assert split_arguments(["org/model", bare])[0] == "org/model"


def test_a_published_encoder_decoder_without_a_cache_of_cross_attention(
    repo_copy: Path, images: list[str], captions: dict[Path, str]
) -> None:
    """Which is fed as this one is; what it looks like is said by its config alone."""
    path = repo_copy / "config.json"
    values = json.loads(path.read_text())
    del values["prefix_conditioning"]
    path.write_text(json.dumps(values))
    (repo_copy / "generation_config.json").unlink()  # then config.json alone says what begins and ends a text
    options = ("--dtype", "fp32", "--max-new-tokens", 30)
    assert run(repo_copy, images[0], *options).stdout == f"{captions[Path(images[0])]}\n"


def test_settings_that_are_not_applied_are_named(repo_copy: Path, images: list[str]) -> None:
    path = repo_copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_scale": 1.5, "min_p": None}))
    assert run(repo_copy, images[0]).stderr == f"{path}: guidance_scale: is not applied\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "moondream1"}, "config.json: model_type 'moondream1' is not supported"),
        ({"model_type": "llava"}, "config.json: image_token_id: not set"),
    ],
)
def test_a_repo_of_another_kind_is_named(change: dict[str, str], said: str, repo_copy: Path, images: list[str]) -> None:
    path = repo_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = run(repo_copy, images[0])
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()


def test_from_the_hub_only_what_is_needed_is_fetched(
    hub: HubServer, default_repo: Path, images: list[str], captions: dict[Path, str]
) -> None:
    push_folder("tester/demo", default_repo, message="demo")
    done = run("tester/demo", images[0])
    assert done.stdout == f"{captions[Path(images[0])]}\n"
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path}
    assert {name for name in fetched if ".onnx" in name} == {
        "encoder_model_quantized.onnx",
        "decoder_model_merged_quantized.onnx",
    }
    assert "README.md" not in fetched
    assert run("tester/demo", images[0], "--dtype", "fp32").stdout == done.stdout
    missing = run("tester/demo", images[0], "--dtype", "int8")
    assert missing.stderr.endswith(
        "error: tester/demo: onnx: encoder_model_int8.onnx, decoder_model_merged_int8.onnx missing; there is fp32, q8\n"
    )
    assert "was not found" in run("tester/none", images[0]).stderr


def test_a_recipe_that_is_not_exported_says_how(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing exported yet: run `vlm-export merge vit-gpt2 --work "):
        find_repo("vit-gpt2", tmp_path)
