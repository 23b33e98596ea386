"""The Hub door through the real huggingface_hub, against the loopback Hub of hub_server.py."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from hub_server import TOKEN, HubServer, configure, environment
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from vlm_export import hub as hub_door
from vlm_export.errors import CheckFailed, InputError
from vlm_export.hub import FileChange, download, plan_push, push_folder
from vlm_export.news import told_to

REPO = "tester/demo"
# Above the megabyte, so that it is streamed in pieces.
GRAPH = bytes(range(256)) * 5000
FILES = {
    "README.md": b"---\nlibrary_name: transformers.js\n---\n# demo\n",
    "config.json": b'{"model_type": "demo"}',
    ".hidden": b"kept\n",
    "onnx/decoder_model_merged.onnx": GRAPH,
    "onnx/decoder_model_merged.onnx_data": b"external data",
    "onnx/deep/er/vision_encoder_q4.onnx": b"q4",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()


@pytest.fixture(autouse=True)
def no_token_shown(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, nothing printed or logged has the token."""
    caplog.set_level(logging.DEBUG)
    yield
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(folder: Path, repo_id: str = REPO, **options: object) -> hub_door.PushResult:
    return push_folder(repo_id, folder, message="Export", **options)  # type: ignore[arg-type]


def actions(folder: Path, **options: str) -> dict[str, str]:
    return {change.path: change.action for change in plan_push(REPO, folder, **options).changes}


def fails_with(call: Callable[[], object]) -> str:
    """The one line of the InputError, after looking for the token in all that `--debug` would print."""
    with pytest.raises(InputError) as caught:
        call()
    error = caught.value
    assert TOKEN not in "".join(traceback.format_exception(error)) + repr(error)
    assert "\n" not in str(error)
    return str(error)


def uploads(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


# Push


def test_a_push_downloads_byte_identical(hub: HubServer, folder: Path) -> None:
    result = push(folder)
    files = read(Path(snapshot_download(REPO)))
    assert files.pop(".gitattributes")
    assert files == FILES
    assert result.url == f"{hub.url}/{REPO}"
    assert result.commit == HfApi().model_info(REPO).sha
    assert result.pull_request is None
    assert [commit.title for commit in HfApi().list_repo_commits(REPO)] == ["Export", "initial commit"]


def test_graphs_go_through_lfs_and_json_does_not(hub: HubServer, folder: Path) -> None:
    push(folder)
    lfs = {
        file.path for file in HfApi().list_repo_tree(REPO, recursive=True) if isinstance(file, RepoFile) and file.lfs
    }
    assert lfs == {"onnx/decoder_model_merged.onnx", "onnx/deep/er/vision_encoder_q4.onnx"}
    assert sum(method == "PUT" for method, _ in hub.requests) == 2


def test_the_second_push_changes_nothing(hub: HubServer, folder: Path) -> None:
    first = push(folder)
    sent = uploads(hub)
    assert set(actions(folder).values()) == {"same"}
    again = push(folder)
    assert again.commit == first.commit and again.plan.is_done
    assert uploads(hub) == sent


def test_a_plan_is_what_the_push_does(hub: HubServer, folder: Path) -> None:
    push(folder)
    write(folder, {"config.json": b"{}", "onnx/decoder_model_merged.onnx": GRAPH[::-1], "onnx/new.onnx": b"new"})
    (folder / "onnx/decoder_model_merged.onnx_data").unlink()
    plan = plan_push(REPO, folder)
    assert not plan.create_repo
    assert plan.revision == "main"
    assert [change for change in plan.changes if change.action != "same"] == [
        FileChange("config.json", "update", 2),
        FileChange("onnx/decoder_model_merged.onnx", "update", len(GRAPH)),
        FileChange("onnx/decoder_model_merged.onnx_data", "delete", len(b"external data")),
        FileChange("onnx/new.onnx", "add", 3),
    ]
    push(folder)
    assert read(Path(snapshot_download(REPO))).keys() == read(folder).keys() | {".gitattributes"}
    assert set(actions(folder).values()) == {"same"}


def test_only_stale_onnx_files_are_deleted(hub: HubServer, folder: Path) -> None:
    push(folder)
    by_hand = [CommitOperationAdd("notes/by-hand.txt", b"mine"), CommitOperationAdd("onnx/old_fp16.onnx", b"old")]
    HfApi().create_commit(REPO, by_hand, commit_message="by hand")
    (folder / "config.json").unlink()
    assert actions(folder)["onnx/old_fp16.onnx"] == "delete"
    assert actions(folder).keys().isdisjoint({"notes/by-hand.txt", ".gitattributes", "config.json"})
    push(folder)
    files = read(Path(snapshot_download(REPO)))
    assert files["notes/by-hand.txt"] == b"mine"
    assert "config.json" in files
    assert "onnx/old_fp16.onnx" not in files


def test_a_plan_for_a_repo_that_does_not_exist_creates_nothing(hub: HubServer, folder: Path) -> None:
    plan = plan_push(REPO, folder)
    assert plan.create_repo
    assert {change.path: change.size_bytes for change in plan.changes} == {k: len(v) for k, v in FILES.items()}
    assert {change.action for change in plan.changes} == {"add"}
    assert not HfApi().repo_exists(REPO)
    assert {path for method, path in hub.requests if method != "GET"} == {"/api/validate-yaml"}


def test_private(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push(folder, private=True)
    assert HfApi().model_info(REPO).private
    assert push(folder, private=True).commit
    configure(monkeypatch, hub.url, tmp_path / "stranger", None)
    assert "no token" in fails_with(lambda: download(REPO, allow_patterns=["*"]))


def test_private_does_not_push_to_a_public_repo(hub: HubServer, folder: Path) -> None:
    push(folder)
    assert "is public" in fails_with(lambda: push(folder, private=True))


def test_an_organization(hub: HubServer, folder: Path) -> None:
    push(folder, "acme/demo")
    assert HfApi().repo_exists("acme/demo")


def test_a_branch_is_created_and_main_stays(hub: HubServer, folder: Path) -> None:
    main = push(folder)
    write(folder, {"config.json": b"{}"})
    plan = plan_push(REPO, folder, revision="v2")
    assert plan.revision == "v2"
    assert [change.path for change in plan.changes if change.action == "update"] == ["config.json"]
    branch = push(folder, revision="v2")
    assert HfApi().model_info(REPO, revision="v2").sha == branch.commit
    assert HfApi().model_info(REPO).sha == main.commit
    assert set(actions(folder, revision="v2").values()) == {"same"}
    assert push(folder, revision="v2").commit == branch.commit


def test_a_branch_of_a_new_repo(hub: HubServer, folder: Path) -> None:
    result = push(folder, revision="v1")
    assert HfApi().model_info(REPO, revision="v1").sha == result.commit
    assert HfApi().list_repo_files(REPO) == [".gitattributes"]


def test_a_pull_request_and_then_another_push_into_it(hub: HubServer, folder: Path) -> None:
    main = push(folder)
    write(folder, {"config.json": b"{}"})
    pull = push(folder, create_pr=True)
    assert pull.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert HfApi().model_info(REPO).sha == main.commit
    write(folder, {"config.json": b"[]"})
    push(folder, revision="refs/pr/1")
    assert len(HfApi().list_repo_commits(REPO, revision="refs/pr/1")) == 4


def test_a_pull_request_has_no_revision(folder: Path) -> None:
    assert "drop the revision 'v2'" in fails_with(lambda: push(folder, revision="v2", create_pr=True))


def test_another_commit_during_the_push(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder)
    write(folder, {"config.json": b"{}"})
    create_commit = HfApi.create_commit

    def overtaken(api: HfApi, *arguments: object, **options: object) -> object:
        create_commit(api, REPO, [CommitOperationAdd("config.json", b"theirs")], commit_message="theirs")
        return create_commit(api, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    assert "another commit" in fails_with(lambda: push(folder))
    assert Path(snapshot_download(REPO), "config.json").read_bytes() == b"theirs"


def test_a_file_that_the_repo_ignores_is_a_failed_check(hub: HubServer, folder: Path) -> None:
    push(write(folder.parent / "ignoring", {".gitignore": b"*_q4.onnx\n"}))
    with pytest.raises(CheckFailed, match=r"without the local onnx/deep/er/vision_encoder_q4\.onnx: remove"):
        push(folder)


# What the folder may hold


def test_symlinks(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (folder / "inside.onnx").symlink_to("onnx/decoder_model_merged.onnx")
    push(folder)
    assert Path(snapshot_download(REPO), "inside.onnx").read_bytes() == GRAPH
    outside = write(tmp_path, {"secret.txt": b"secret"}) / "secret.txt"
    (folder / "onnx/leak.onnx").symlink_to(outside)
    assert "onnx/leak.onnx is a link that leaves the folder" in fails_with(lambda: push(folder))
    assert "leaves the folder" in fails_with(lambda: plan_push(REPO, folder))


@pytest.mark.parametrize("target", ["missing", "onnx"])
def test_symlinks_to_no_file(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    assert "link is a link to no file" in fails_with(lambda: push(folder))


@pytest.mark.parametrize("name", [".git", ".cache"])
def test_folders_that_the_hub_does_not_take(folder: Path, name: str) -> None:
    write(folder / name, {"file": b""})
    assert f"does not take {name}" in fails_with(lambda: push(folder))


def test_no_folder_and_no_files(tmp_path: Path) -> None:
    assert "is not a folder" in fails_with(lambda: push(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "holds no files" in fails_with(lambda: push(tmp_path / "empty"))


def test_a_model_card_that_the_hub_refuses(hub: HubServer, folder: Path) -> None:
    write(folder, {"README.md": b"---\nlicense: [\n---\n"})
    assert "Invalid YAML" in fails_with(lambda: push(folder))


# Errors


@pytest.mark.parametrize("call", [push, lambda folder: plan_push(REPO, folder)])
def test_no_token(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], object]
) -> None:
    configure(monkeypatch, hub.url, tmp_path / "home", None)
    message = fails_with(lambda: call(folder))
    assert "no " in message and "run `hf auth login` or set HF_TOKEN" in message


def test_the_login_file_is_found(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, hub.url, tmp_path / "home", None)
    write(tmp_path / "home", {"token": TOKEN.encode()})
    assert push(folder).commit


def test_a_wrong_token(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, hub.url, tmp_path / "home", "hf_wrong")
    for call in (lambda: push(folder), lambda: plan_push(REPO, folder), lambda: download(REPO, allow_patterns=["*"])):
        message = fails_with(call)
        assert "does not accept the token (Invalid credentials in Authorization header)" in message
        assert "hf_wrong" not in message


def test_a_token_that_no_header_can_carry(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, hub.url, tmp_path / "home", f"{TOKEN}\x01")
    assert "holds characters that no token has" in fails_with(lambda: push(folder))


def test_a_token_in_the_answer_is_not_shown(hub: HubServer, folder: Path) -> None:
    message = fails_with(lambda: push(folder, f"{TOKEN}/demo"))
    assert message.startswith("<token>/demo: the token may not do this")
    assert fails_with(lambda: push(folder, TOKEN)).startswith("'<token>' is not a repo id")


def test_a_namespace_of_somebody_else(hub: HubServer, folder: Path) -> None:
    message = fails_with(lambda: push(folder, "someone/demo"))
    assert 'the rights to create a model under the namespace "someone"' in message
    assert "write access to someone/demo" in message


def test_a_repo_of_somebody_else_takes_a_pull_request(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", namespaces=("someone",)) as theirs, pytest.MonkeyPatch.context() as patch:
        configure(patch, theirs.url, tmp_path / "their home", TOKEN)
        push(folder, "someone/demo")
    write(folder, {"config.json": b"{}"})
    assert "does not have write access to someone/demo" in fails_with(lambda: push(folder, "someone/demo"))
    pull = push(folder, "someone/demo", create_pr=True).pull_request
    assert pull == f"{hub.url}/someone/demo/discussions/1"


@pytest.mark.parametrize("repo_id", ["demo", "a/b/c", "tester/de mo", "tester/.demo", ""])
def test_a_malformed_repo_id(hub: HubServer, folder: Path, repo_id: str) -> None:
    assert f"{repo_id!r} is not a repo id" in fails_with(lambda: push(folder, repo_id))
    assert f"{repo_id!r} is not a repo id" in fails_with(lambda: plan_push(repo_id, folder))


def test_an_unreachable_hub(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    configure(monkeypatch, url, tmp_path / "home", TOKEN)
    for call in (lambda: push(folder), lambda: plan_push(REPO, folder), lambda: download(REPO, allow_patterns=["*"])):
        assert f"cannot reach {url}" in fails_with(call)


def test_offline(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: push(folder), lambda: plan_push(REPO, folder), lambda: download(REPO, allow_patterns=["*"])):
        assert "HF_HUB_OFFLINE is set" in fails_with(call)
    assert hub.requests == []


# Download


CHECKPOINT = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "adapter/adapter_model.bin": b"only a pickle",
    "projection.pt": b"another pickle",
}


def test_download_takes_safetensors_before_pickle(hub: HubServer, tmp_path: Path) -> None:
    push(write(tmp_path / "checkpoint", CHECKPOINT))
    files = read(download(REPO, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.pt"]))
    assert files == {name: content for name, content in CHECKPOINT.items() if name != "pytorch_model.bin"}
    assert read(download(REPO, allow_patterns=["adapter/*"])).keys() == files.keys()


def test_download_is_pinned_and_then_works_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = push(write(tmp_path / "checkpoint", CHECKPOINT)).commit
    push(write(tmp_path / "checkpoint", {"config.json": b"[]"}))
    folder = download(REPO, revision=old, allow_patterns=["*.json", "*.bin"])
    assert folder.name == old
    assert (folder / "config.json").read_bytes() == b"{}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO, revision=old, allow_patterns=["*.json", "*.bin"]) == folder


def test_a_download_is_told_before_it_begins_and_not_where_all_is_here(hub: HubServer, folder: Path) -> None:
    push_folder(REPO, folder, message="x")
    told: list[str] = []
    with told_to(told.append):
        commit = download(REPO, allow_patterns=["*.json"]).name
        assert told == [], "kilobytes"
        download(REPO, allow_patterns=["onnx/*"])
        assert told == [f"fetching {REPO}@{commit[:12]}: 3 files, 1 MB"]
        download(REPO, allow_patterns=["onnx/*"])
    assert len(told) == 1


def test_download_of_what_is_not_there(hub: HubServer, folder: Path) -> None:
    push(folder)
    assert "has no revision 'v9'" in fails_with(lambda: download(REPO, revision="v9", allow_patterns=["*"]))
    assert "no file matches *.gguf" in fails_with(lambda: download(REPO, allow_patterns=["*.gguf"]))
    assert "was not found" in fails_with(lambda: download("tester/none", allow_patterns=["*"]))
    assert "is not a repo id" in fails_with(lambda: download("a/b/c", allow_patterns=["*"]))


# The server, as a browser and another process see it


def test_a_browser_reads_ranges_from_any_origin(hub: HubServer, folder: Path) -> None:
    push(folder, revision="v1")
    url = f"{hub.url}/{REPO}/resolve/v1/onnx/decoder_model_merged.onnx"
    with urlopen(Request(url, headers={"Range": "bytes=10-19", "Origin": "http://localhost"})) as answer:
        assert answer.read() == GRAPH[10:20]
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 10-19/{len(GRAPH)}"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
    with urlopen(Request(url, method="HEAD")) as answer:
        assert answer.headers["X-Linked-Size"] == answer.headers["Content-Length"] == str(len(GRAPH))
        assert answer.headers["X-Linked-ETag"] == answer.headers["ETag"]


def test_another_process_pushes_with_the_environment_alone(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, vlm_export.hub as h; h.push_folder(sys.argv[1], pathlib.Path(sys.argv[2]), message='m')"
    )
    variables = os.environ | environment(hub.url, tmp_path / "other", TOKEN)
    done = subprocess.run([sys.executable, "-c", script, REPO, folder], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert set(actions(folder).values()) == {"same"}


def test_a_corrupted_upload_is_refused(hub: HubServer, folder: Path) -> None:
    push(folder)
    oid = "0" * 64
    batch = json.dumps({"objects": [{"oid": oid, "size": 3}]}).encode()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with urlopen(Request(f"{hub.url}/{REPO}.git/info/lfs/objects/batch", batch, headers, method="POST")) as answer:
        href = json.load(answer)["objects"][0]["actions"]["upload"]["href"]
    with pytest.raises(OSError, match="HTTP Error 400"):
        urlopen(Request(href, b"bad", method="PUT"))
