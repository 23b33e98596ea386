"""`vlm-export env` and `cache`: what a bug report needs and no secret; what is kept, and only that, can be deleted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_server import TOKEN
from huggingface_hub import constants

from vlm_export import __version__
from vlm_export.cli import main
from vlm_export.files import SKELETON
from vlm_export.start import environment
from vlm_export.web import chromium, node_runtime

NODE_FILES = ("package-lock.json", "node_modules/a/index.js")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of a test's own: the user's is not to be cleaned by tests."""
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLM_EXPORT_STRUCTURES")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def run(*arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=said)


def fill(cache: Path) -> dict[str, Path]:
    """One of everything that may lie there, 10 bytes each file."""
    found = {
        "graph": cache / "structures" / f"{'a' * 64}{SKELETON}",
        "node": node_runtime.home_of() / "package-lock.json",
        "module": node_runtime.home_of() / "node_modules" / "a" / "index.js",
        "chromium": node_runtime.home_of(chromium.SCRIPTS) / "package-lock.json",
        "old": cache / f"node-{'0' * 16}" / "package-lock.json",
        "no lock": cache / f"node-{'1' * 16}" / "thesis.txt",
        "other": cache / "wheels" / "a.whl",
        "beside": cache / "structures" / "thesis.txt",
        "hub": cache.parent / "hub" / "models--a--b" / "blobs" / "c",
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
    return found


def test_an_empty_cache_says_so() -> None:
    assert run("cache").stdout == "nothing is kept between runs yet\n"
    assert run("cache", "clean", "--yes").stdout == "deleted 0 bytes\n"


def test_it_lists_what_is_kept(cache: Path) -> None:
    fill(cache)
    found = json.loads(run("cache", "--json").stdout)["caches"]
    assert {(each["what"], each["size_bytes"], bool(each["deleted"])) for each in found} == {
        ("graphs that were traced: 1 components", 10, True),
        ("npm: transformers.js", 20, True),
        ("npm: what drives Chromium", 10, True),
        ("npm: packages of another version of vlm-export", 10, True),
        ("other", 10, False),
        ("the Hub's downloads, of all programs", 10, False),
    }
    lines = run("cache").stdout.splitlines()
    assert lines[-1] == "next: vlm-export cache clean  (deletes 50 bytes)"
    assert "the Hub's downloads, of all programs: `hf cache` manages it" in lines


def test_clean_deletes_what_it_listed_and_nothing_else(cache: Path) -> None:
    there = fill(cache)
    done = run("cache", "clean", "--yes", "--json")
    assert (done.exit_code, json.loads(done.stdout)["size_bytes"]) == (0, 50)
    left = {name for name, path in there.items() if path.exists()}
    assert left == {"no lock", "other", "beside", "hub"}


def test_clean_asks(cache: Path) -> None:
    there = fill(cache)
    for answer in ("n\n", "\n", ""):
        done = run("cache", "clean", said=answer)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.count(str(cache)) == 4 and "delete 50 bytes? [y/N]" in done.stderr
        assert all(path.exists() for path in there.values())
    assert run("cache", "clean", said="y\n").stdout == "deleted 50 bytes\n"
    assert not there["graph"].exists()


def test_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    there = fill(cache)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_bytes(bytes(1000))
    (there["module"].parent / "link").symlink_to(precious)
    (cache / f"node-{'2' * 16}").symlink_to(precious)
    (precious / "package-lock.json").write_text("{}")
    assert run("cache", "clean", "--yes").exit_code == 0
    assert (precious / "thesis.txt").exists() and (precious / "package-lock.json").exists()


def test_env_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{TOKEN}@hub.example.org")
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    done = run("env")
    assert done.exit_code == 0, done.stderr
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert rows["vlm-export"] == __version__
    assert rows["packages"].startswith("torch ")
    assert rows["Node"].startswith("v") and rows["Chromium"].startswith("no Chromium (CHROMIUM is /nowhere/chromium)")
    assert "HF_ENDPOINT" in done.stdout and TOKEN not in done.stdout
    assert any(line.split() == ["Hub", "token", "set"] for line in done.stdout.splitlines())
    found = json.loads(run("env", "--json").stdout)
    assert found["token"] is True and found["variables"]["HF_ENDPOINT"] == "https://hub.example.org"
    assert found["available_memory_bytes"] > 0 and found["memory_bytes"] > 1 << 28
    assert TOKEN not in json.dumps(found)


def test_without_node_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = json.loads(run("env", "--json").stdout)
    assert found["node"] == "node is not on PATH: install Node 20 or newer, or run with --runtime ort"
    assert found["npm"] == "not on PATH"


CPUINFO = {
    "processor : 0\nmodel name : Core 9\nflags : fpu avx2 avx512_vnni f16c\n": (
        "Core 9",
        ("avx2", "f16c", "avx512_vnni"),
    ),
    "processor : 0\nFeatures : fp asimd asimddp\n": (None, ("asimd", "asimddp")),
}


@pytest.mark.parametrize("content", CPUINFO)
def test_what_a_processor_can_do(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    name, features = CPUINFO[content]
    found = environment.environment()
    assert found.features == features and (name is None or found.processor == name)
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "none")
    assert environment.environment().features is None


def test_the_home_folder_is_not_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in ("env", "cache"):
        said = run(command).stdout
        assert "~/cache/wheels" in said and str(tmp_path) not in said


def test_neither_torch_nor_onnx_is_imported() -> None:
    script = (
        "import sys; from vlm_export.cli import main; main(['env'], standalone_mode=False);"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
