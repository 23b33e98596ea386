"""Models and adapters that lie at the Hub: which commit was taken is recorded, and only what is needed is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
import yaml
from click.testing import CliRunner
from exported import silent
from hub_faults import Fault, OneFault
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image

from vlm_export import pipeline
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.hub import Unreachable, commit_of, download, list_files, patience, push_folder
from vlm_export.recipe import load_recipe

BASE, LORA = "acme/base", "acme/lora"
ALL = ("*",)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    disable_progress_bars()
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()
    enable_progress_bars()


def test_a_recipe_of_repos_says_which_commits_it_took(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pico.write_checkpoint(tmp_path / "base", lora=False)
    (base / "model.gguf").write_bytes(b"not needed")
    lora = pico.write_peft_adapter(tmp_path / "lora", pico.config())
    (lora / "README.md").unlink(missing_ok=True)
    commits = {
        "model": f"{BASE}@{push_folder(BASE, base, message='base').commit}",
        "adapters.0.path": f"{LORA}@{push_folder(LORA, lora, tag='v1', message='lora').commit}",
    }
    (lora / "notes.txt").write_text("newer")
    push_folder(LORA, lora, message="newer")
    values = {"name": "pico", "model": BASE, "adapters": [{"path": LORA, "revision": "v1"}]}
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(values | {"hub": {"license": "mit"}}))
    recipe, work = load_recipe(tmp_path / "pico.yaml"), Work(tmp_path / "work")
    assert pipeline.run_merge(recipe, work, silent).commits == commits
    assert json.loads(work.merge_report.read_text())["commits"] == commits
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert "adapter_model.safetensors" in fetched and "model.gguf" not in fetched
    # The same again, without the Hub.
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pipeline.run_merge(recipe, work, silent).commits == commits
    assert hub.requests == []


@pytest.fixture
def small(tmp_path: Path, hub: HubServer) -> dict[str, str]:
    """The commits of a repo: the first, which has a tag, and the newest."""
    (tmp_path / "small").mkdir()
    found = {}
    for name, content in {"v1": b"{}", "main": b"[]"}.items():
        (tmp_path / "small" / "config.json").write_bytes(content)
        tag = "v1" if name == "v1" else None
        found[name] = str(push_folder(BASE, tmp_path / "small", message=name, tag=tag).commit)
    return found


def test_a_revision_is_named_behind_an_id(small: dict[str, str], tmp_path: Path) -> None:
    for name, content in {"v1": b"{}", "main": b"[]", small["v1"]: b"{}"}.items():
        folder = download(f"{BASE}@{name}", allow_patterns=ALL)
        assert (folder.name, (folder / "config.json").read_bytes()) == (small.get(name, small["v1"]), content)
    assert list_files(f"{BASE}@v1")["config.json"] == 2
    assert commit_of(BASE, None) == small["main"]
    with pytest.raises(InputError, match="acme/base has no revision 'v9'"):
        download(f"{BASE}@v9", allow_patterns=ALL)
    photo = str(tmp_path / "photo.png")
    Image.new("RGB", (4, 4)).save(photo)
    for command in (["doctor"], ["inspect"], ["run", photo], ["serve"], ["bench"], ["convert"]):
        said = CliRunner().invoke(main, [command[0], f"{BASE}@v9", *command[1:]])
        assert said.stderr.splitlines()[-1].startswith("error: acme/base has no revision 'v9': name"), said.stderr
        assert said.exit_code == 2


def test_what_is_in_the_cache_does_not_wait_for_a_hub_that_is_busy(
    hub: HubServer, small: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(BASE, allow_patterns=ALL)
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 3600.0)
    for fault in (Fault("status", status=503), Fault("status", status=429), Fault("request cut")):
        hub.faults = OneFault("/", fault, times=100)
        assert download(BASE, allow_patterns=ALL) == folder
    with pytest.raises(Unreachable, match=r"acme/base: the connection to .* broke for 300 s"):
        download(BASE, revision="v1", allow_patterns=ALL)


def test_private_and_gated_repos(
    hub: HubServer, small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder("acme/secret", tmp_path / "small", private=True, message="x")
    assert download("acme/secret", allow_patterns=ALL).is_dir()
    hub.gated.add(BASE)
    with pytest.raises(InputError, match=rf"^{BASE} is gated: accept its terms at {hub.url}/{BASE}, then run `hf auth"):
        download(BASE, allow_patterns=ALL)
    for token, said in {
        None: "acme/secret: no public repo of that name, and no token to see a private one: check the name, or run",
        "hf_other": "acme/secret: the Hub does not accept the token",
    }.items():
        configure(monkeypatch, hub.url, tmp_path / f"home {token}", token)
        with pytest.raises(InputError, match=f"^{said}") as caught:
            download("acme/secret", allow_patterns=ALL)
        assert "hf_other" not in str(caught.value)


def test_a_hub_that_lets_nothing_be_read_asks_for_no_right_to_write(hub: HubServer, small: dict[str, str]) -> None:
    for request in ("GET /api", "resolve"):
        hub.faults = OneFault(
            request, Fault("status", status=403, headers={"X-Error-Message": "no read scope"}), times=9
        )
        with pytest.raises(InputError, match=r"be read \(no read scope.*\): use a token that may read acme/base$"):
            download(BASE, allow_patterns=ALL)
