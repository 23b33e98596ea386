"""`push`; its dry run, which refuses what the push refuses and says how much would go; the Space beside the model."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from exported import Exported, prepare
from filelock import FileLock, Timeout
from hub_faults import Fault, OneFault
from hub_server import TOKEN, HubServer, configure, environment
from huggingface_hub import HfApi, close_session, snapshot_download
from PIL import Image

from vlm_export import hub as hub_door
from vlm_export.cli import main
from vlm_export.errors import InputError, VlmExportError
from vlm_export.publish import gate
from vlm_export.publish.gate import Allowed, Destination
from vlm_export.publish.space import space_files
from vlm_export.recipe import load_recipe
from vlm_export.web import chromium
from vlm_export.web.site_server import SiteServer, files_under

REPO = "acme/pico"
# Every request of a push to a branch of a repo that is not there, with a tag.
REQUESTS = (
    "GET /api/models/acme/pico/revision/v2",
    "POST /api/repos/create",
    "GET /api/models/acme/pico/tree/",
    "POST /api/models/acme/pico/branch/",
    "POST /api/validate-yaml",
    "POST /api/models/acme/pico/preupload/",
    "POST /acme/pico.git/info/lfs/objects/batch",
    "PUT /lfs/",
    "POST /acme/pico.git/info/lfs/objects/verify",
    "POST /api/models/acme/pico/commit/",
    "POST /api/models/acme/pico/tag/",
)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("verified"))
    made.export(dtypes=["fp32"])
    made.verify("ort")
    return made


@pytest.fixture
def made(verified: Exported, tmp_path: Path) -> Exported:
    """A copy that the test may spoil."""
    return verified.copy(tmp_path / "copy")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()


def line_of(made: Exported, *options: str) -> list[str]:
    where = ["--recipe", str(made.recipe.path), "--work", str(made.work.root)]
    return [sys.executable, "-m", "vlm_export", "push", REPO, *where, *options]


def command(made: Exported, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    line = line_of(made, *options)
    return subprocess.run(line, env=os.environ | environ, capture_output=True, text=True, check=False)


# Beside other runs


def test_a_push_waits_for_an_export_and_an_export_for_a_push(made: Exported, hub: HubServer) -> None:
    lock, was_held = made.work.root / ".lock", []

    def look(method: str, path: str) -> None:
        try:
            with FileLock(lock, timeout=0):
                was_held.append(False)
        except Timeout:
            was_held.append(True)

    hub.faults = look
    with made.work.alone():
        push = subprocess.Popen(line_of(made), stderr=subprocess.PIPE, text=True)
        assert push.stderr is not None
        said = push.stderr.readline()
        assert f"another vlm-export, process {os.getpid()}, is at work there" in said
        assert push.poll() is None and not was_held
    assert push.wait(60) == 0, push.stderr.read()
    push.stderr.close()
    assert len(was_held) > 5 and all(was_held)
    assert not lock.exists()


def give_up_capabilities() -> None:
    """From here on, root may write only what its owner may write."""
    head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # _LINUX_CAPABILITY_VERSION_3
    assert ctypes.CDLL(None, use_errno=True).capset(head, none) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_push_from_a_folder_that_may_only_be_read(made: Exported, hub: HubServer, options: list[str]) -> None:
    for path in (made.work.root, *made.work.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def push() -> None:
        give_up_capabilities()
        done = CliRunner().invoke(main, line_of(made, *options)[3:])
        assert done.exit_code == 0, done.output
        assert f"{made.work.root}: may not be written, and so is not locked" in done.stderr
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=push)
    process.start()
    process.join(60)
    for path in (made.work.root, *made.work.root.rglob("*")):
        path.chmod(0o755)
    assert process.exitcode == 0
    assert hub.store.exists(REPO) is not bool(options)


# A dry run


def unverify(made: Exported) -> None:
    (made.work.report / "report.json").unlink()


def fail(made: Exported) -> None:
    path = made.work.report / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "fail"}))


def change(made: Exported) -> None:
    (made.work.repo / "config.json").write_text("{}")


def unlicense(made: Exported) -> None:
    path = made.work.repo / "README.md"
    path.write_text(path.read_text().replace("license: apache-2.0\n", ""))
    report = made.work.report / "report.json"
    values = json.loads(report.read_text())
    values["files_sha256"]["README.md"] = gate.file_hashes(made.work.repo)["README.md"]
    report.write_text(json.dumps(values))


def link(made: Exported) -> None:
    (made.work.repo / "assets" / "link.png").symlink_to("/etc/hostname")
    unverify(made)


@pytest.mark.parametrize(
    ("spoil", "allowed", "message"),
    [
        (unverify, Allowed(), "not verified yet"),
        (fail, Allowed(), "the verdict is fail"),
        (change, Allowed(), r"about other files than .* \(config\.json\)"),
        (unlicense, Allowed(), "no licence"),
        (link, Allowed(unverified=True), "a link that leaves the folder"),
    ],
)
def test_a_dry_run_refuses_what_the_push_refuses(
    made: Exported, hub: HubServer, spoil: object, allowed: Allowed, message: str
) -> None:
    spoil(made)  # type: ignore[operator]
    said = []
    for act in (gate.run_plan, gate.run_push):
        with pytest.raises(VlmExportError, match=message) as caught:
            act(made.recipe, made.work, Destination(REPO), allowed)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert hub.requests == []


def test_it_refuses_as_the_hub_would(verified: Exported, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.run_push(verified.recipe, verified.work, Destination(REPO))
    for to, message in (
        (Destination(REPO, private=True), "exists and is public"),
        (Destination(REPO, revision="next", create_pr=True), "a pull request always goes to the main branch"),
        (Destination("pico"), "is not a repo id"),
    ):
        for act in (gate.run_plan, gate.run_push):
            with pytest.raises(InputError, match=message):
                act(verified.recipe, verified.work, to)
    card = verified.work.repo / "README.md"
    stood = card.read_text()
    card.write_text("---\nlicense: [\n---\n")
    said = []
    for act in (gate.run_plan, gate.run_push):
        with pytest.raises(InputError, match="Invalid YAML") as caught:
            act(verified.recipe, verified.work, Destination(REPO), Allowed(unverified=True, unlicensed=True))
        said.append(str(caught.value))
    assert said[0] == said[1]
    card.write_text(stood)
    monkeypatch.setenv("HF_TOKEN", "")
    for act in (gate.run_plan, gate.run_push):
        with pytest.raises(InputError, match="no Hugging Face token to push with"):
            act(verified.recipe, verified.work, Destination(REPO))


def test_it_says_how_much_would_go(made: Exported, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        *lines, total, nothing = command(made, "--dry-run", **environ).stdout.splitlines()
        assert nothing == f"nothing was uploaded to {REPO}"
        assert all(re.fullmatch(r"add     \S+ \(([\d.]+ kB|\d+ bytes)\)", line) for line in lines)
        assert re.fullmatch(rf"{REPO}@main: {len(lines)} to add; \d+\.\d kB to upload; the repo is new", total)
        assert not any(method == "PUT" or "/commit/" in path for method, path in hub.requests)
        assert command(made, **environ).returncode == 0

        graph = made.graph("encoder_model")
        graph.rename(graph.with_name("encoder_model_q4.onnx"))
        *lines, total, _ = command(made, "--dry-run", "--allow-unverified", **environ).stdout.splitlines()
        found = {line.split()[1]: line.split()[0] for line in lines}
        assert (found["onnx/encoder_model.onnx"], found["onnx/encoder_model_q4.onnx"]) == ("delete", "add")
        size = f"{graph.with_name('encoder_model_q4.onnx').stat().st_size / 1e3:.1f} kB"
        assert total == f"{REPO}@main: 1 to add, 1 to delete, {len(lines) - 2} the same; {size} to upload"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_the_hub_it_says_that_nothing_was_compared(made: Exported, tmp_path: Path, offline: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        environ = environment(url, tmp_path / "home", TOKEN) | {"HF_HUB_OFFLINE": offline}
        done = command(made, "--dry-run", **environ)
        pushed = command(made, **environ)
    *lines, total, why, _ = done.stdout.splitlines()
    assert (done.returncode, {line.split()[0] for line in lines}) == (0, {"send"})
    assert re.fullmatch(rf"{REPO}@main: {len(lines)} to send; [\d.]+ kB to upload", total)
    reason = "HF_HUB_OFFLINE is set" if offline == "1" else f"cannot reach {url}"
    assert why.startswith(f"not compared with what the Hub has: {REPO}: {reason}")
    assert pushed.returncode == 2 and reason in pushed.stderr


def test_what_is_larger_than_the_hub_takes(tmp_path: Path, hub: HubServer) -> None:
    with (tmp_path / "large.onnx_data").open("wb") as file:
        file.truncate(hub_door.MAX_FILE_BYTES + 10**9)  # of nothing: it takes no place
    with pytest.raises(InputError, match=r"onnx/large has 501 GB, and the Hub takes files up to 500 GB"):
        hub_door.plan_push(REPO, {"onnx/large": tmp_path / "large.onnx_data"})
    many: dict[str, Path | bytes] = {f"assets/{number}": b"" for number in range(hub_door.MAX_ENTRIES + 1)}
    with pytest.raises(InputError, match=r"assets holds 10,001 files, and the Hub takes 10,000 in a folder"):
        hub_door.plan_push(REPO, many)
    del many["assets/0"]
    assert len(hub_door.plan_push(REPO, many).changes) == hub_door.MAX_ENTRIES


def test_what_came_of_the_hub_is_recorded(made: Exported) -> None:
    path, commits = made.work.merge_report, {"model": f"acme/base@{'0' * 40}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commits": commits}))
    made.export(dtypes=["fp32"])
    assert json.loads((made.work.repo / "export.json").read_text())["commits"] == commits
    assert f"- `model` is `{commits['model']}` of the Hub" in (made.work.repo / "README.md").read_text()
    made.verify("ort")
    assert json.loads((made.work.report / "report.json").read_text())["commits"] == commits
    assert commits["model"] in (made.work.report / "index.html").read_text()


# The token


ECHO = f"the token {TOKEN} may not do this"


def written(*folders: Path) -> bytes:
    """All that lies in some folders: names and contents."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    contents = [path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()]
    return b"\n".join([*(str(path).encode() for path in paths), *contents])


def test_a_push_writes_the_token_nowhere(made: Exported, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN) | {"VLM_EXPORT_CACHE": str(tmp_path / "cache")}
        where = ["--recipe", str(made.recipe.path), "--work", str(made.work.root)]
        line = [sys.executable, "-m", "vlm_export", "push", REPO, "--debug", *where, "--tag", "v1"]
        pushing = psutil.Popen(line, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seen: set[str] = set()
        while pushing.poll() is None:  # what `ps` shows to others of this machine
            with suppress(psutil.Error):
                for process in (pushing, *pushing.children(recursive=True)):
                    seen.update(process.cmdline())
            time.sleep(0.02)
        said = pushing.communicate()[0]
    assert (pushing.returncode, b"pushed to" in said, "push" in seen) == (0, True, True), said
    assert TOKEN.encode() not in said + written(tmp_path / "copy", tmp_path / "home", tmp_path / "cache")
    assert TOKEN not in " ".join(seen)
    assert TOKEN.encode() not in written(tmp_path / "hub")


@pytest.mark.parametrize("status", [403, 412, 500])
def test_a_push_that_fails_shows_the_token_nowhere(
    made: Exported, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(hub_door.patience, "WAITING_SECONDS", 0.0)
    where = ["--recipe", str(made.recipe.path), "--work", str(made.work.root), "--revision", "v2", "--tag", "v2.0"]
    said = []
    for request in REQUESTS:
        hub.store.root = tmp_path / f"hub {len(said)}"
        # A Hub that repeats what it was sent, in all the places that messages are taken from.
        hub.faults = OneFault(request, Fault("status", status=status, headers={"X-Error-Message": ECHO}), times=99)
        done = CliRunner().invoke(main, ["push", REPO, "--debug", *where])
        error = done.exception
        assert done.exit_code, (request, done.output)
        said.append(done.output + repr(error) + "".join(traceback.format_exception(error) if error else ()))
    assert "<token>" in "".join(said)
    assert [line for text in said for line in text.splitlines() if TOKEN in line] == []
    assert TOKEN.encode() not in written(tmp_path / "copy", tmp_path / "home")


# The Space


@pytest.mark.node
@pytest.mark.browser
def test_the_space_and_the_model_link_to_each_other(made: Exported, tmp_path: Path) -> None:
    photo = made.recipe.golden_dir / "images" / "0.png"
    with HubServer(tmp_path / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        dry = command(made, "--create-space", "--dry-run", **environ)
        assert dry.returncode == 0, dry.stderr
        assert re.search(rf"^spaces/{REPO}@main: \d+ to add; [\d.]+ MB to upload; the repo is new$", dry.stdout, re.M)
        done = command(made, "--create-space", **environ)
        assert done.stdout.splitlines() == [
            f"pushed to {hub.url}/{REPO}",
            f"its demo page is {hub.url}/spaces/{REPO}",
        ]
        configure(patch, hub.url, tmp_path / "home", TOKEN)
        model = Path(snapshot_download(REPO))
        card = (model / "README.md").read_text()
        assert f"# pico\n\n[Try it in your browser]({hub.url}/spaces/{REPO}): " in card
        space = Path(snapshot_download(REPO, repo_type="space"))
        assert HfApi().space_info(REPO).id == REPO
        close_session()
        again = command(made, "--create-space", "--dry-run", **environ)
        assert again.stdout.count("to add") == again.stdout.count("to update") == 0
    places = [str(place).encode() for place in (made.work.root, made.recipe.path.parent, Path(__file__).parents[1])]
    published = [path for path in (*space.rglob("*"), *model.rglob("*")) if path.is_file()]
    assert [path for path in published for place in places if place in path.read_bytes()] == []
    front, text = (space / "README.md").read_text().split("---\n")[1:]
    assert (yaml.safe_load(front)["sdk"], yaml.safe_load(front)["models"]) == ("static", [REPO])
    assert f"The model is [{REPO}]({hub.url}/{REPO})." in text
    with Image.open(space / "samples" / "0.png") as sample, Image.open(photo) as own:
        assert sample.tobytes() == own.tobytes()
    shown = "document.querySelector('#home')"
    with SiteServer(files_under({"/": space})) as server:
        steps = [["waitForFunction", f"return !{shown}.hidden"], ["evaluate", f"[{shown}.href, {shown}.textContent]"]]
        seen = chromium.drive(f"{server.url}/index.html", steps, chromium.WASM)
    assert seen.answers == [[f"{hub.url}/{REPO}", REPO]]


@pytest.mark.node
def test_a_space_has_no_pictures_that_are_kept_back_and_no_words_of_their_files(made: Exported) -> None:
    photo = made.recipe.golden_dir / "images" / "0.png"
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    with Image.open(photo) as image:
        image.save(photo, exif=exif)
    golden = made.recipe.golden_dir / "golden.json"
    values = json.loads(golden.read_text())
    values["images"][0]["sha256"] = gate.file_hashes(photo.parent)["0.png"]
    golden.write_text(json.dumps(values))
    files = space_files(made.recipe, made.work, Destination(REPO))
    sample = files["samples/0.png"]
    assert isinstance(sample, bytes) and b"taken at home" not in sample
    assert Image.open(BytesIO(sample)).size == (16, 16)

    path = made.recipe.path
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"hub": {"pictures": False}}))
    files = space_files(load_recipe(path), made.work, Destination(REPO))
    assert not [name for name in files if name.startswith("samples/")]


@pytest.mark.parametrize("to", [Destination(REPO, revision="next"), Destination(REPO, create_pr=True)])
def test_a_space_shows_the_main_branch(verified: Exported, to: Destination) -> None:
    with pytest.raises(InputError, match=r"--create-space: shows what is on the main branch"):
        space_files(verified.recipe, verified.work, to)
