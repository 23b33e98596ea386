"""The command line as users meet it: real processes, exact output, exit status, files on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from exported import prepare
from hub_server import TOKEN, HubServer, environment

from vlm_export import bundled
from vlm_export.cli import main
from vlm_export.recipe import find_recipe
from vlm_export.verify.golden import load_golden
from vlm_export.web import node_runtime
from vlm_export.web.captions import Item

COMMAND = Path(sys.executable).with_name("vlm-export")
REPO = "acme/shapes-captioner"
DEFAULT = "no vlm-export.yaml in this folder: this is about the bundled shapes-captioner"
# What a command tells beside its results and its progress.
TOLD = {
    "onnx": r"writes 4 files, \d+ MB; needs \d+ MB of memory; about 1 minute",
    "push": rf"{REPO}@main: 15 to add; [\d.]+ MB to upload; the repo is new",
}
# Downloads a repo as any Python user would, in a process of its own: huggingface_hub reads its settings on import.
DOWNLOAD = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"


def vlm_export(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, env=os.environ | environ, capture_output=True, text=True, check=False
    )


def in_this_process(*arguments: str, cwd: Path) -> Result:
    """The same where a process of its own would show nothing more: what it would import is there already."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(main, arguments)


def test_four_commands_in_an_empty_folder_to_captions_in_transformers_js(tmp_path: Path) -> None:
    """merge, onnx, verify, push; then download, compare byte for byte, and caption from that server in Node."""
    folder = tmp_path / "empty"
    folder.mkdir()
    with HubServer(tmp_path / "hub") as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        for line in ("merge", "onnx --quantize int8", "verify", f"push {REPO}"):
            done = vlm_export(*line.split(), cwd=folder, **environ)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            first, *rest = done.stderr.splitlines()
            assert first == DEFAULT, line
            told = [each for each in rest if not re.search(r" \(\d+ of \d+\)$", each)]  # progress of a slow machine
            assert re.fullmatch(TOLD.get(line.split()[0], ""), "".join(told)), line
            assert TOKEN not in done.stdout + done.stderr
        repo = folder / "build" / "shapes-captioner" / "repo"
        download = [sys.executable, "-c", DOWNLOAD, REPO]
        fetched = subprocess.run(download, env=os.environ | environ, capture_output=True, text=True, check=True)
        there, here = contents(Path(fetched.stdout.strip())), contents(repo)
        assert there.pop("README.md") == here.pop("README.md").replace(b"your-name/shapes-captioner", REPO.encode())
        assert there == here
        recipe = find_recipe("shapes-captioner")
        recorded = load_golden(recipe.golden_dir)
        result = node_runtime.caption(
            node_runtime.RemoteModel(f"{hub.url}/", REPO),
            layout="captioner",
            dtype="fp32",
            items=[Item(image=path) for path in recorded.image_paths()],
            generation={},
        )
    own_size = [index for index, image in enumerate(recorded.facts.images) if int(image.file[:2]) < 14]
    assert len(own_size) == 14
    for index in own_size:  # the others are resized by other code than Python's: reported by verify, not promised
        assert result.captions[index].text == recorded.facts.images[index].caption


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"}


def test_help_is_instant_and_shows_the_four_commands(tmp_path: Path) -> None:
    started = time.monotonic()
    done = vlm_export("--help", cwd=tmp_path)
    assert time.monotonic() - started < 5, "a heavy import has crept into cli.py"
    for command in ("merge", "onnx", "verify", "push", "golden", "run", "serve", "doctor", "bench", "recipes"):
        assert f"  {command} " in done.stdout


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vlm_export", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: vlm-export [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    "command", ["merge", "onnx", "verify", "push", "golden", "run", "serve", "doctor", "bench", "recipes"]
)
def test_each_command_has_help(command: str, tmp_path: Path) -> None:
    done = vlm_export(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Example: vlm-export" in done.stdout or command == "recipes"


@pytest.mark.parametrize("module", ["cli", "publish"])
def test_heavy_libraries_are_imported_neither_for_help_nor_for_push(module: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'onnx') if m in sys.modules]"
    script = f"import sys, vlm_export.{module}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_recipes(tmp_path: Path) -> None:
    heading, *lines, following = vlm_export("recipes", cwd=tmp_path).stdout.splitlines()
    assert heading.split() == ["recipe", "family", "size", "exported", "licence", "layouts", "what", "it", "is"]
    assert following == "next: vlm-export convert RECIPE"
    names = [line.split()[0] for line in lines]
    assert names == bundled.recipe_names()
    assert {"distilvit2", "shapes-captioner", "llava-1.5-7b", "smolvlm-256m", "smolvlm2-256m", "idefics3-8b"} <= {
        *names
    }
    listed = json.loads(vlm_export("recipes", "--json", cwd=tmp_path).stdout)
    assert [recipe["name"] for recipe in listed["recipes"]] == names
    columns = {
        recipe["name"]: (recipe["model_type"], recipe["license"] or "not stated") for recipe in listed["recipes"]
    }
    cells = {
        name: (family, licence) for name, family, _, _, licence, *_ in (re.split(r" {2,}", line) for line in lines)
    }
    assert cells == columns
    sizes = {name: re.split(r" {2,}", line)[2:4] for name, line in zip(names, lines, strict=True)}
    assert sizes["shapes-captioner"] == ["968.9 k", "4.1 MB in fp32"], "counted in the checkpoint"
    assert (sizes["llava-1.5-7b"], sizes["smolvlm-2.2b"], sizes["vit-gpt2"]) == (["7B", "-"], ["2.2B", "-"], ["-", "-"])
    [own] = [recipe["size"] for recipe in listed["recipes"] if recipe["name"] == "shapes-captioner"]
    assert own["parameters"] == 968_864 and own["dtype"] == "fp32"


def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    prepare(tmp_path)
    for arguments in (("merge",), ("onnx", "--quantize", "int8"), ("golden",), ("verify", "--runtime", "ort")):
        done = in_this_process(*arguments, "pico.yaml", "--json", cwd=tmp_path)
        assert done.exit_code in (0, 1), done.stderr
        assert isinstance(json.loads(done.stdout), dict)
    work = tmp_path / "build" / "pico"
    assert sorted(path.name for path in work.iterdir()) == [".stages.json", "merged", "repo", "report"]


def test_verify_ends_with_its_page_and_fails_as_asked(tmp_path: Path) -> None:
    made = prepare(tmp_path, tolerances=[])  # random weights say something else in int8
    made.export("captioner", ["int8"])
    work = tmp_path / "work"
    verify = ("verify", "pico.yaml", "--work", str(work), "--runtime", "ort")
    never = in_this_process(*verify, "--fail-on", "never", "--junit", "ci/verify.xml", cwd=tmp_path)
    assert (never.exit_code, never.stdout.splitlines()[-1]) == (0, f"to look at: {work / 'report' / 'index.html'}")
    suite = ElementTree.parse(tmp_path / "ci" / "verify.xml").getroot()[0]
    assert int(str(suite.get("failures"))) > 0, "what fails is in the file, whatever the exit status is"
    done = in_this_process(*verify, "--json", cwd=tmp_path)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["verdict"], found["page"]) == ("fail", str(work / "report" / "index.html"))
    assert Path(found["page"]).is_file()


def test_a_failed_verification_exits_1_and_lists_what_failed(tmp_path: Path) -> None:
    made = prepare(tmp_path)
    made.export()
    graph = made.graph("encoder_model")
    graph.write_bytes(graph.read_bytes()[:-3000] + bytes(3000))
    done = vlm_export("verify", "pico.yaml", "--work", str(made.work.root), "--runtime", "ort", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL encoder_model fp32 ort")
    refused = vlm_export("push", "acme/x", "--recipe", "pico.yaml", "--work", str(made.work.root), cwd=tmp_path)
    assert refused.returncode == 1
    assert "the verdict is fail: mend it, or push with --allow-unverified" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "shape-captioner"), "no recipe 'shape-captioner': did you mean 'shapes-captioner'?"),
        (("merge", "missing.yaml"), "missing.yaml: no such recipe file; `vlm-export recipes` lists the bundled ones"),
        (("merge", "typo.yaml"), "typo.yaml: adapter: unknown key (did you mean 'adapters'?)"),
        (
            ("merge", "nowhere.yaml"),
            "nowhere.yaml: model: no such folder: ./nowhere",
        ),
        (("onnx",), "build/shapes-captioner/merged: nothing merged yet: run `vlm-export merge shapes-captioner`"),
        (("verify",), "build/shapes-captioner/repo: nothing exported yet: run `vlm-export onnx shapes-captioner`"),
        (
            ("push", "acme/x"),
            "build/shapes-captioner/repo: nothing exported yet: run `vlm-export onnx shapes-captioner`",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("name: x\nmodel: y\nadapter: z\n")
    (tmp_path / "nowhere.yaml").write_text("name: x\nmodel: ./nowhere\n")
    done = vlm_export(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    recipe_was_named = arguments[0] == "merge"
    notice = "" if recipe_was_named else f"{DEFAULT}\n"
    assert done.stderr == f"{notice}error: {message}\n"
    assert not (tmp_path / "build").exists(), "nothing half-written"


def test_a_browser_that_is_missing_is_told_before_the_work_begins(tmp_path: Path) -> None:
    made = prepare(tmp_path)
    made.export()
    options = ("--work", str(made.work.root), "--runtime", "ort", "--runtime", "wasm")
    done = vlm_export("verify", "pico.yaml", *options, cwd=tmp_path, CHROMIUM="/nowhere/chromium")
    assert done.returncode == 2
    assert done.stderr == (
        "error: no Chromium (CHROMIUM is /nowhere/chromium): install one, with `apt-get install chromium` on Debian, "
        "or set CHROMIUM to its path, or run with --runtime ort\n"
    )
    assert not made.work.report.exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = vlm_export("merge", "missing.yaml", "--debug", cwd=tmp_path)
    assert done.stderr.startswith("Traceback")


def test_code_of_a_repo_is_announced(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    (tmp_path / "own.yaml").write_text(f"name: x\nmodel: .\nrevision: '{commit}'\ntrust_remote_code: true\n")
    done = vlm_export("merge", "own.yaml", cwd=tmp_path)
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning == f"warning: trust_remote_code: runs code of .@{commit}"
    assert error.startswith("error: own.yaml: trust_remote_code: . is a local folder, whose code no commit pins: name")


def test_the_work_folder_can_be_moved(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert vlm_export("merge", "pico.yaml", cwd=tmp_path, VLM_EXPORT_WORK=str(tmp_path / "a")).returncode == 0
    assert in_this_process("merge", "pico.yaml", "--work", "b", cwd=tmp_path).exit_code == 0
    assert (tmp_path / "a" / "merged" / "merge.json").is_file()
    assert (tmp_path / "b" / "merged" / "merge.json").is_file()


def test_the_recipe_of_the_current_folder_comes_first(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "pico.yaml").rename(tmp_path / "vlm-export.yaml")
    assert in_this_process("merge", cwd=tmp_path).exit_code == 0
    assert (tmp_path / "build" / "pico" / "merged").is_dir()


def test_push_options(tmp_path: Path) -> None:
    made = prepare(tmp_path)
    made.export()
    made.verify("ort")
    work = ("--recipe", "pico.yaml", "--work", str(made.work.root))
    with HubServer(tmp_path / "hub") as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        dry = vlm_export("push", "acme/pico", "--dry-run", *work, cwd=tmp_path, **environ)
        assert "add     onnx/encoder_model.onnx" in dry.stdout
        assert dry.stdout.endswith("nothing was uploaded to acme/pico\n")
        assert vlm_export("push", "acme/pico", "--private", *work, cwd=tmp_path, **environ).returncode == 0
        same = vlm_export("push", "acme/pico", "--dry-run", *work, cwd=tmp_path, **environ)
        *files, total, _ = same.stdout.splitlines()
        assert {line.split()[0] for line in files} == {"same"}
        assert total == f"acme/pico@main: {len(files)} the same; 0 bytes to upload"
        request = vlm_export("push", "acme/pico", "--revision", "next", *work, cwd=tmp_path, **environ)
        assert request.returncode == 0, request.stderr
        both = vlm_export("push", "acme/pico", "--revision", "x", "--create-pr", *work, cwd=tmp_path, **environ)
        assert (both.returncode, both.stderr.count("\n")) == (2, 1)
        (made.work.repo / "config.json").write_text("{}")
        assert vlm_export("push", "acme/pico", *work, cwd=tmp_path, **environ).returncode == 1
        forced = vlm_export("push", "acme/pico", "--allow-unverified", "--create-pr", *work, cwd=tmp_path, **environ)
        assert forced.returncode == 0, forced.stderr
        assert "/discussions/" in forced.stdout


def test_distilvit2_comes_from_the_hub(tmp_path: Path) -> None:
    """The bundled recipe as it stands, on a stand-in of distilvit2's format at the real image size, from a server."""
    import pico

    settings = pico.config()
    settings["vision_config"] |= {"image_size": 224, "patch_size": 16}
    settings["text_config"] |= {"max_position_embeddings": 512}
    stand_in = pico.write_checkpoint(tmp_path / "stand-in", settings)
    upload = (
        "import sys; from pathlib import Path; from vlm_export import hub;"
        "hub.push_folder('tarekziade/distilvit2', Path(sys.argv[1]), message='stand-in')"
    )
    folder = tmp_path / "empty"
    folder.mkdir()
    with HubServer(tmp_path / "hub", namespaces=("tarekziade",)) as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        subprocess.run([sys.executable, "-c", upload, str(stand_in)], env=os.environ | environ, check=True)
        for line in ("golden distilvit2", "merge distilvit2", "onnx distilvit2 --quantize fp16", "verify distilvit2"):
            done = vlm_export(*line.split(), cwd=folder, **environ)
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (folder / "golden" / "distilvit2" / "golden.json").is_file()
    config = json.loads((folder / "build" / "distilvit2" / "repo" / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 224, "width": 224}


ONE_BIT = "q1: neither a processor nor WASM has a kernel for 1-bit weights (MatMulNBits takes 2, 4 or 8): choose q2"
REFUSED_TO_QUANTIZE = {
    "--quantize q5": "--quantize: no dtype 'q5': there is "
    "fp32, fp16, int8, uint8, q8, q4, q4f16, bnb4, q2, q2f16, or all",
    "--quantize q1": f"--quantize: {ONE_BIT}",
    "--quantize vision=q1": f"--quantize: {ONE_BIT}",
    "--quantize auto": "--quantize: auto goes with --budget or --max-kl; give both or neither",
    "--quantize auto,q4 --max-kl 0.1": "--quantize: auto and q4 have one file name; keep one of them",
    "--quantize q8 --max-kl 0.1": "--quantize: auto goes with --budget or --max-kl; give both or neither",
    "--budget 115": "--budget: '115' is no size: write it like 115MB",
    "--budget 0MB": "--budget: '0MB' is no size: write it like 115MB",
    "--budget 1MB --max-kl 0.1": "--budget, --max-kl and --plan: give one of them",
    "--quantize q8 --plan plan.yaml": "--plan: says how q4 is made: add --quantize q4",
    "--plan missing.yaml": "missing.yaml: no such file",
    "--memory lots": "--memory: 'lots' is no size: write it like 115MB",
}


@pytest.mark.parametrize("options", REFUSED_TO_QUANTIZE)
def test_options_of_onnx_that_are_refused(options: str, tmp_path: Path) -> None:
    done = in_this_process("onnx", *options.split(), cwd=tmp_path)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, f"error: {REFUSED_TO_QUANTIZE[options]}")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `vlm-export recipes | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_export", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1
