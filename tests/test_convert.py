"""`vlm-export convert`, and the way from a checkpoint to the Hub by typing only what the last command printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pico_chat
import pytest
from click.testing import CliRunner, Result
from exported import write_images
from hub_server import TOKEN, HubServer, environment

from vlm_export.cli import main
from vlm_export.recipe import load_recipe
from vlm_export.start import plan as plans
from vlm_export.start.timing import about, times

ORT = ("--quantize", "fp32", "--runtime", "ort")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with no token of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def own_graph_cache(_shared_graph_cache: Path) -> Path:
    """What is changed here is where files lie, nothing that is traced."""
    return _shared_graph_cache


def typed(line: str, *more: str) -> Result:
    """A line as it was printed, in this process."""
    program, *arguments = shlex.split(line)
    assert program == "vlm-export"
    return CliRunner().invoke(main, [*arguments, *more])


def next_of(said: str) -> str:
    """What a command's last line says to type next."""
    *_, last = said.splitlines()
    assert last.startswith("next: "), said
    return last.removeprefix("next: ")


def chat_model() -> str:
    pico_chat.write_llava(Path("pico-llava"))
    return "pico-llava"


def captioner() -> str:
    pico.write_checkpoint(Path("pico-captioner"))
    return "pico-captioner"


def adapter() -> str:
    base = pico_chat.write_llava(Path("pico-base"))
    pico_chat.write_adapter(Path("pico-lora"), base)
    return f"{base} pico-lora"


@pytest.mark.parametrize("command", ["inspect", "init", "convert", "env", "cache", "cache clean"])
def test_each_command_has_help_with_an_example(command: str) -> None:
    said = typed(f"vlm-export {command} --help").stdout
    assert f"Example: vlm-export {command}" in said


@pytest.mark.parametrize("write", [chat_model, captioner, adapter])
def test_from_a_checkpoint_to_the_hub_by_what_was_printed(write: Callable[[], str], tmp_path: Path) -> None:
    begun = typed(f"vlm-export init {write()} --repo-id acme/pico --license mit")
    assert begun.exit_code == 0, begun.stderr
    done = typed(next_of(begun.stdout), *ORT)
    assert done.exit_code == 0, done.stderr + done.stdout
    assert "checks passed" in done.stdout
    with HubServer(tmp_path / "hub") as hub:
        command = [sys.executable, "-m", *shlex.split(next_of(done.stdout).replace("vlm-export", "vlm_export", 1))]
        pushed = subprocess.run(
            command, env=os.environ | environment(hub.url, tmp_path / "home", TOKEN), capture_output=True, text=True
        )
        assert (pushed.returncode, pushed.stdout) == (0, f"pushed to {hub.url}/acme/pico\n"), pushed.stderr


def test_one_command_in_stock_transformers_js_and_pushed(tmp_path: Path) -> None:
    """As a user runs it: real processes, Node, and a Hub whose token says who its user is."""
    model = captioner()
    with HubServer(tmp_path / "hub") as hub:
        environ = os.environ | environment(hub.url, tmp_path / "home", TOKEN)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "vlm_export", *arguments]
            return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

        done = run("convert", model, "--quantize", "fp32", "--license", "mit")
        assert done.returncode == 0, done.stderr + done.stdout
        assert next_of(done.stdout) == "vlm-export push tester/pico-captioner"
        assert "  4  verify  compares in ONNX Runtime and Node" in done.stderr
        pushed = run("convert", "--push", "acme/pico", "--runtime", "ort", "--json")
        assert pushed.returncode == 0, pushed.stderr
        found = json.loads(pushed.stdout)
        assert (found["verdict"], found["pushed"]["url"]) == ("pass", f"{hub.url}/acme/pico")
        assert found["next"] == "vlm-export run acme/pico photo.jpg"


def test_plan_stages_and_summary() -> None:
    write_images(Path("photos"))
    done = typed(f"vlm-export convert {captioner()} --images photos --work out", *ORT)
    assert done.exit_code == 0, done.stderr
    first, second, *stages = done.stderr.splitlines()
    assert first == (
        "vlm-export.yaml: written; what is in it can be edited, and is used by the next `vlm-export convert`"
    )
    assert second == "converting pico-captioner by vlm-export.yaml, in out:"
    assert stages[:4] == [
        "  1  golden  records what PyTorch says of the golden images; in golden/pico-captioner, under a minute",
        "  2  merge   merges the LoRA inside into 39.2 k parameters; 157 kB in out/merged, under a minute",
        "  3  onnx    writes 2 graphs, 357 kB; 734.0 MB of memory, under a minute, and tracing once",
        "  4  verify  compares in ONNX Runtime; under a minute",
    ]
    ended = [line.split(":")[0] for line in stages[4:] if ": done in " in line]
    assert ended == ["golden", "merge", "onnx", "verify"]
    assert any(line.startswith("warning: ") and "licence" in line for line in stages[4:])
    assert done.stdout.splitlines()[-5:] == [
        "repo    out/repo",
        "report  out/report/index.html",
        "look    vlm-export demo --work out",
        "",
        "next: vlm-export push your-name/pico-captioner --work out",
    ]
    assert load_recipe(Path("vlm-export.yaml")).recipe.dtypes == ("fp32",)
    assert Path("out/repo/onnx/encoder_model.onnx").is_file()


def test_times_grow_with_what_is_to_be_done() -> None:
    small, large = times(230_000_000, 2, 1, ["ort"]), times(7_000_000_000, 20, 3, ["ort", "node"])
    assert (about(small.golden), about(small.merge), about(small.verify)) == (
        "under a minute",
        "under a minute",
        "about 2 min",
    )
    assert large.golden > 10 * small.golden and large.merge > 10 * small.merge and large.verify > 10 * small.verify
    assert times(230_000_000, 2, 1, ["node"]).verify < small.verify


def test_what_fails_is_not_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = typed(f"vlm-export convert {captioner()} --quantize int8 --runtime ort --push acme/pico --json")
    assert done.exit_code == 1, "random weights say something else in int8"
    found = json.loads(done.stdout)
    assert (found["verdict"], found["pushed"]) == ("fail", None)
    assert found["next"] == "vlm-export verify --bisect"
    assert "push: done" not in done.stderr


def test_a_dry_run_writes_the_recipe_and_tells_the_plan() -> None:
    done = typed(f"vlm-export convert {captioner()} --dry-run")
    assert (done.exit_code, next_of(done.stdout)) == (0, "vlm-export convert")
    assert Path("vlm-export.yaml").is_file() and not Path("build").exists() and not Path("golden").exists()
    options = "--quantize q8 --quantize decoder=q4 --runtime ort --work 'my work'"
    assert next_of(typed(f"vlm-export convert --dry-run {options}").stdout) == f"vlm-export convert {options}"
    again = typed("vlm-export convert --dry-run --json")
    assert [stage["command"] for stage in json.loads(again.stdout)["stages"]] == ["golden", "merge", "onnx", "verify"]


def test_a_recipe_that_is_there_is_used_as_it_stands() -> None:
    model = captioner()
    typed(f"vlm-export init {model}")
    edited = Path("vlm-export.yaml").read_text().replace("max_new_tokens: 30", "max_new_tokens: 7")
    Path("vlm-export.yaml").write_text(edited)
    done = typed(f"vlm-export convert {model} --dry-run")
    assert done.stderr.splitlines()[0] == "vlm-export.yaml: is there, and used as it stands; --force writes it anew"
    assert Path("vlm-export.yaml").read_text() == edited
    typed(f"vlm-export convert {model} --dry-run --force")
    assert Path("vlm-export.yaml").read_text() != edited


def test_a_bundled_recipe() -> None:
    done = typed("vlm-export convert shapes-captioner --dry-run")
    assert (done.exit_code, next_of(done.stdout)) == (0, "vlm-export convert shapes-captioner")
    assert "converting shapes-captioner by the bundled recipe, in build/shapes-captioner:" in done.stderr.splitlines()


WRONG = {
    "convert": "no vlm-export.yaml in this folder: name a checkpoint: `vlm-export convert CHECKPOINT`",
    "convert pico-captionr": "no such folder: pico-captionr; did you mean pico-captioner?",
    "convert pico-captioner --quantize q5": "--quantize: no dtype 'q5': there is "
    "fp32, fp16, int8, uint8, q8, q4, q4f16, bnb4, q2, q2f16, or all",
    "convert pico-captioner --quantize vison=q8 --dry-run": "--quantize: no component 'vison'; there is "
    "encoder_model, decoder_model_merged",
    "convert pico-captioner --push pico": "--push pico: not an id of the Hub: write namespace/name",
    "convert pico-captioner --push acme/pico": "--push acme/pico: no Hugging Face token to push with: "
    "run `hf auth login` or set HF_TOKEN",
    "convert there.yaml other": "other: a recipe names its adapters itself: list it under `adapters`",
    "convert there.yaml --license mit --for node": "there.yaml: is there, and --for, --license would change it: "
    "edit it, or name a checkpoint and --force",
    "convert pico-captioner --output there.yaml": "there.yaml: exists: write over it with --force, or to another file "
    "with --output",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_can_be_told_before_is(line: str) -> None:
    captioner()
    Path("there.yaml").write_text("name: there\nmodel: ./other\n")
    done = typed(f"vlm-export {line}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {WRONG[line]}"
    assert not Path("build").exists() and not Path("golden").exists()


def test_a_layout_that_the_model_has_not_is_told_before() -> None:
    pico_chat.write_llava(Path("pico-llava"))
    Path("x.yaml").write_text("name: x\nmodel: ./pico-llava\nlayout: captioner\n")
    done = typed("vlm-export convert x.yaml")
    told = "error: x.yaml: layout: llava has no layout 'captioner'; it has chat, single\n"
    assert (done.exit_code, done.stderr) == (2, told)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("free_disk", "build/pico-captioner: needs 33.0 MB of disk, and 1 kB are free"),
        ("available_memory", "needs 734"),
    ],
)
def test_a_machine_that_is_too_small_is_told_before(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, name, lambda *_: 1000)
    done = typed(f"vlm-export convert {captioner()}")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not Path("golden").exists()


def test_node_that_is_missing_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = captioner()
    monkeypatch.setenv("PATH", "")
    done = typed(f"vlm-export convert {model}")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        2,
        "error: node is not on PATH: install Node 20 or newer, or run with --runtime ort",
    )
    assert typed(f"vlm-export convert {model} --runtime ort --dry-run").exit_code == 0


def test_npm_packages_are_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    done = typed(f"vlm-export convert {captioner()} --dry-run")
    assert done.stderr.splitlines()[-1] == (
        "  4  verify  compares in ONNX Runtime and Node; installs npm packages first, 485.0 MB, once, under a minute"
    )


def test_the_plan_is_told_before_torch_is_imported() -> None:
    captioner()
    script = (
        "import sys; from vlm_export.cli import main;"
        "main(['convert', 'pico-captioner', '--dry-run'], standalone_mode=False);"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
