"""A Hub that is busy, and connections that break: the push waits, says so in a line, and the Hub has each file once."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faulty_pushes import soak
from hub_faults import Fault, OneFault, no_faults
from hub_server import TOKEN, HubServer, configure, environment
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._xet import abort_xet_session
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vlm_export.errors import CheckFailed, InputError, VlmExportError
from vlm_export.hub import PushResult, Unreachable, download, patience, plan_push, push_folder, xet
from vlm_export.hub import push as push_stage
from vlm_export.news import told_to
from vlm_export.web import site_server
from vlm_export.web.listening import listen, url_of

REPO = "tester/demo"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# demo\n",
    "config.json": b"{}",
    "onnx/decoder_model_merged.onnx": bytes(range(256)) * 500,
    "onnx/vision_encoder.onnx": b"vision",
}
# Every request of a push to a branch of a repo that is not there, with a tag.
REQUESTS = (
    "GET /api/models/tester/demo/revision/v2",
    "POST /api/repos/create",
    "GET /api/models/tester/demo/tree/",
    "POST /api/models/tester/demo/branch/",
    "POST /api/validate-yaml",
    "POST /api/models/tester/demo/preupload/",
    "POST /tester/demo.git/info/lfs/objects/batch",
    "PUT /lfs/",
    "POST /tester/demo.git/info/lfs/objects/verify",
    "POST /api/models/tester/demo/commit/",
    "POST /api/models/tester/demo/tag/",
)
BROKEN = {
    "busy": Fault("status", status=503),
    "failed": Fault("late status", status=500),
    "cut": Fault("request cut"),
    "lost": Fault("answer lost"),
    "half": Fault("answer cut", after_bytes=40),
    "silent": Fault("no answer"),
    "twice": Fault("twice"),
}


@pytest.fixture
def told() -> Iterator[list[str]]:
    lines: list[str] = []
    with told_to(lines.append):
        yield lines


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Iterator[HubServer]:
    """One that is waited for in milliseconds."""
    for name, value in {"FIRST_WAIT_SECONDS": 0.001, "LONGEST_WAIT_SECONDS": 0.01}.items():
        monkeypatch.setattr(patience, name, value)
    disable_progress_bars()  # as the command line does
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        server.faults = no_faults
        close_session()
    enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


@pytest.fixture(autouse=True)
def library_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def push(folder: Path, **options: object) -> PushResult:
    return push_folder(REPO, folder, message="Export", **options)  # type: ignore[arg-type]


def held(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """What the Hub has, read from its disk."""
    store = hub.store
    files = store.commit(REPO, store.resolve(REPO, revision)).files
    return {path: store.blob(file.etag).read_bytes() for path, file in files.items() if path != ".gitattributes"}


def commits(hub: HubServer, revision: str = "main") -> int:
    return len(list(hub.store.history(REPO, revision)))


def sent(hub: HubServer) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


@pytest.mark.parametrize("fault", BROKEN)
def test_each_request_may_fail(
    hub: HubServer, folder: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "silent":
        monkeypatch.setattr(patience, "QUIET_SECONDS", 0.2)
    for number, request in enumerate(REQUESTS[-5:] if fault == "silent" else REQUESTS):
        hub.store.root = folder.parent / f"hub {number}"
        hub.requests.clear()
        told.clear()
        hub.faults = OneFault(request, BROKEN[fault])
        result = push(folder, revision="v2", tag="v2.0")
        assert [each for each in hub.requests if request in " ".join(each)] != [], request
        assert held(hub, "v2") == FILES
        assert hub.store.resolve(REPO, "v2.0") == hub.store.resolve(REPO, "v2") == result.commit
        assert commits(hub, "v2") == 2, request
        waits = [line for line in told if "waiting" in line]
        assert len(waits) == (fault != "twice"), (request, told)


@pytest.mark.parametrize("status", [200, 204, 302, 418])
def test_an_answer_that_is_none_at_any_request(hub: HubServer, folder: Path, status: int) -> None:
    for number, request in enumerate(REQUESTS):
        hub.store.root = folder.parent / f"hub {number}"
        headers = {"Location": "/elsewhere"} if status == 302 else {}
        hub.faults = OneFault(request, Fault("status", status=status, headers=headers))
        with suppress(VlmExportError):
            push(folder, revision="v2", tag="v2.0")
        hub.faults = no_faults
        push(folder, revision="v2", tag="v2.0")
        assert held(hub, "v2") == FILES, request


def test_it_is_told_what_is_waited_for(hub: HubServer, folder: Path, told: list[str]) -> None:
    hub.faults = OneFault("/tree/", Fault("status", status=429, headers={"Retry-After": "1"}))
    push(folder)
    assert told == [
        f"{REPO}@main: 4 to add; 128.0 kB to upload; the repo is new",
        f"{REPO}: waiting, 1 s: the Hub answered 429",
    ]
    told.clear()
    hub.faults = OneFault("/revision/", Fault("status", status=502), times=9)
    plan_push(REPO, folder, revision="main")
    assert told == [f"{REPO}: waiting, 300 s at most: the Hub answered 502"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", status=503), r"the Hub answered 503 \(a planted fault\): wait some minutes, then run again"),
        (Fault("request cut"), r"the connection to .* broke for 0 s: check the network, then run again"),
        (
            Fault("status", status=429, headers={"Retry-After": "3600"}),
            "the Hub asks to wait for 3,600 s: run again then",
        ),
        (
            Fault("status", status=429, headers={"RateLimit": '"api";r=0;t=4000'}),
            "the Hub asks to wait for 4,000 s: run again then",
        ),
        (
            Fault("status", status=503, headers={"Retry-After": "Fri, 31 Dec 2199 23:59:59 GMT"}),
            r"the Hub asks to wait for [\d,]+ s: run again then",
        ),
    ],
)
def test_the_waiting_ends(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, message: str
) -> None:
    monkeypatch.setattr(patience, "WAITING_SECONDS", 0.05)
    hub.faults = OneFault("/lfs/objects/batch", fault, times=1000)
    with pytest.raises(Unreachable, match=f"^{REPO}: {message}$"):
        push(folder)
    hub.faults = no_faults
    push(folder)
    assert held(hub) == FILES


@pytest.mark.parametrize("request_text", ["/tree/", "PUT /lfs/"])
def test_an_answer_that_trickles_has_an_end(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, request_text: str
) -> None:
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.15)
    monkeypatch.setattr(patience, "SLOWEST_BYTES_PER_SECOND", 10**9)
    hub.faults = OneFault(request_text, Fault("trickle"), times=100)
    with pytest.raises(Unreachable, match=r"no whole answer within 0 s: check the network, then run again$"):
        push(folder)


def test_a_download_that_trickles_has_an_end(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder)
    monkeypatch.setattr(patience, "QUIET_SECONDS", 0.2)
    hub.faults = OneFault("GET /tester/demo/resolve/", Fault("trickle", after_bytes=2000), times=100)
    with pytest.raises(Unreachable, match=r"sent [\d,]+ bytes in \d+ s: check the network, then run again$"):
        download(REPO, allow_patterns=["onnx/decoder_model_merged.onnx"])


def test_what_was_sent_is_not_sent_again(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITING_SECONDS", 0.02)
    hub.faults = OneFault("/commit/", Fault("status", status=500), times=1000)
    with pytest.raises(Unreachable):
        push(folder)
    assert sent(hub) == 2
    hub.faults = no_faults
    push(folder)
    assert (sent(hub), held(hub)) == (2, FILES)


def test_an_interrupt_ends_uploads_at_once(hub: HubServer, folder: Path) -> None:
    hub.faults = OneFault("PUT /lfs/", Fault("no answer"), times=100)
    script = "import sys, pathlib; from vlm_export.hub import push_folder; "
    script += "push_folder(sys.argv[1], pathlib.Path(sys.argv[2]), message='m')"
    line = [sys.executable, "-c", script, REPO, str(folder)]
    pushing = subprocess.Popen(line, env=os.environ | environment(hub.url, folder.parent / "other", TOKEN), stderr=-1)
    while sent(hub) < 2 and pushing.poll() is None:
        time.sleep(0.01)
    pushing.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in pushing.communicate(timeout=30)[1]
    hub.faults = no_faults
    push(folder)
    assert (sent(hub), held(hub)) == (2, FILES)


def test_large_files_go_in_parts(hub: HubServer, folder: Path) -> None:
    hub.split_uploads(50_000)
    hub.faults = OneFault("PUT /lfs/", Fault("request cut", after_bytes=20_000), times=3)
    push(folder)
    assert held(hub) == FILES
    assert sent(hub) == 1 + 3 + 3  # the small one, three parts, and what failed


def test_large_files_go_by_xet(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    said = r"^tester/demo: the upload by Xet failed \(.*404.*\): run again, or set HF_HUB_DISABLE_XET=1$"
    with pytest.raises(InputError, match=said):
        push(folder)
    hub.offer_xet(folder.parent / "xet")
    files = FILES | {f"onnx/{name}.onnx": random.Random(name).randbytes(200_000) for name in ("a", "b")}
    files |= {name: random.Random(name).randbytes(9000) for name in FILES if name.startswith("onnx/")}
    push(write(folder, files))
    assert (held(hub), sent(hub)) == (files, 0)
    push(write(folder, {"onnx/a.onnx": files["onnx/a.onnx"][:150_000]}))
    assert held(hub)["onnx/a.onnx"] == files["onnx/a.onnx"][:150_000]


@pytest.fixture
def by_xet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large files go by Xet; its client's settings are read anew."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    abort_xet_session()
    yield
    abort_xet_session()


def test_xet_that_does_not_answer_is_told_and_ended(
    hub: HubServer, folder: Path, by_xet: None, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet, "TOLD_SECONDS", 0.3)
    monkeypatch.setattr(xet, "QUIET_SECONDS", 1.0)
    with listen(0) as silent:
        hub.offer_xet(url_of(silent).removesuffix("/"))
        with pytest.raises(InputError, match=r"^tester/demo: .*: no byte moved by Xet for 1 s: check the network"):
            push(folder)
    assert told[-1:] == ["tester/demo: waiting, 1 s: no byte moves by Xet, which tries again by itself"]
    hub.offer_xet(folder.parent / "xet")
    files = {name: random.Random(name).randbytes(9000) for name in FILES if name.startswith("onnx/")}
    push(write(folder, files))
    assert held(hub) == FILES | files


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_xet_reports_to_nobody(
    hub: HubServer, folder: Path, by_xet: None, monkeypatch: pytest.MonkeyPatch, enabled: str
) -> None:
    """By itself it would, as is seen where that is turned on."""
    assert os.environ["HF_XET_TELEMETRY_ENABLED"] == "0"
    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", enabled)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    asked: list[str] = []

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await Response(status_code=404)(scope, receive, send)

    with listen(0) as listening:
        server = site_server.server(refuse)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        hub.offer_xet(url_of(listening).removesuffix("/"))
        with pytest.raises(InputError, match="the upload by Xet failed"):
            push(folder)
        server.should_exit = True
        thread.join(10)
    assert any("/xorbs/" in path for path in asked)
    assert any("telemetry" in path for path in asked) is (enabled == "1")


# Somebody else pushes


def test_another_commit_is_named(hub: HubServer, folder: Path) -> None:
    push(folder)
    write(folder, {"config.json": b"[]"})

    def overtaken(method: str, path: str) -> None:
        if "/preupload/" in path:
            hub.faults = no_faults
            theirs = [CommitOperationAdd("config.json", b"theirs")]
            HfApi(endpoint=hub.url).create_commit(REPO, theirs, commit_message="Their own")

    hub.faults = overtaken
    with pytest.raises(InputError, match=r"another commit .*\(\w{12} by tester: Their own\): look at the new plan"):
        push(folder)
    assert held(hub)["config.json"] == b"theirs"
    push(folder)
    assert held(hub)["config.json"] == b"[]"


# Pull requests and tags


@pytest.mark.parametrize("fault", ["failed", "lost", "half"])
def test_one_pull_request_is_opened(hub: HubServer, folder: Path, fault: str) -> None:
    push(folder)
    write(folder, {"config.json": b"[]"})
    hub.faults = OneFault("/commit/", BROKEN[fault])
    result = push(folder, create_pr=True)
    assert result.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert [ref for ref in hub.store.refs(REPO) if "pr" in ref] == ["refs/pr/1"]
    assert held(hub, "refs/pr/1") == FILES | {"config.json": b"[]"}
    assert result.commit == hub.store.resolve(REPO, "refs/pr/1")


def test_a_pull_request_that_the_hub_refused_is_asked_for_again(hub: HubServer, folder: Path) -> None:
    push(folder)
    write(folder, {"config.json": b"[]"})
    hub.faults = OneFault("/commit/", Fault("status", status=503), times=2)
    assert push(folder, create_pr=True).pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert commits(hub, "refs/pr/1") == 3


def test_a_pull_request_is_gone_on_with(hub: HubServer, folder: Path) -> None:
    push(folder)
    write(folder, {"config.json": b"[]"})
    first = push(folder, create_pr=True)
    again = push(folder, create_pr=True)
    assert (again.pull_request, again.commit, again.plan.is_done) == (first.pull_request, first.commit, True)
    write(folder, {"config.json": b"[1]"})
    plan = plan_push(REPO, folder, create_pr=True, message="Export")
    assert (plan.revision, plan.pull_request) == ("refs/pr/1", first.pull_request)
    assert push(folder, create_pr=True).pull_request == first.pull_request
    assert held(hub, "refs/pr/1")["config.json"] == b"[1]"
    assert push_folder(REPO, folder, create_pr=True, message="Other").pull_request != first.pull_request


def test_a_tag_that_does_not_arrive(hub: HubServer, folder: Path) -> None:
    hub.faults = OneFault("/tag/", Fault("status", status=200))
    with pytest.raises(CheckFailed, match=r"the tag v1\.0 is not at the commit \w{40}: push again"):
        push(folder, tag="v1.0")
    push(folder, tag="v1.0")
    assert hub.store.resolve(REPO, "v1.0") == hub.store.resolve(REPO, "main")


def test_a_tag(hub: HubServer, folder: Path) -> None:
    first = push(folder, tag="v1.0")
    assert hub.store.resolve(REPO, "v1.0") == first.commit
    assert push(folder, tag="v1.0").commit == first.commit
    write(folder, {"config.json": b"[]"})
    for act in (push, lambda folder, tag: plan_push(REPO, folder, tag=tag)):
        with pytest.raises(InputError, match=r"--tag v1\.0: is at commit \w{12} already: choose another"):
            act(folder, tag="v1.0")
        with pytest.raises(InputError, match=r"--tag 'a\.\.b': no name of a tag"):
            act(folder, tag="a..b")
        with pytest.raises(InputError, match=r"--tag v2: a pull request is not merged yet"):
            push(folder, tag="v2", create_pr=True)
    assert held(hub) == FILES
    assert push(folder, tag="v2").commit == hub.store.resolve(REPO, "v2") != first.commit


# Many at random: `scripts/reliability/pushes.py` makes hundreds


@pytest.mark.parametrize("seed", [1, 2])
def test_pushes_over_a_bad_line(tmp_path: Path, seed: int) -> None:
    figures = soak(tmp_path, times=4, seed=seed)
    assert figures.wrong == []
    assert figures.faults.total() > 10


def test_the_soak_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = push_stage._operations
    monkeypatch.setattr(push_stage, "_check_arrived", lambda *_: None)
    monkeypatch.setattr(push_stage, "_operations", lambda changes, files: operations(changes, files)[:-1])
    assert soak(tmp_path / "short", times=1, seed=1, share=0).differing != []
