"""A Hub on the loopback interface: enough of its HTTP API to push with huggingface_hub and to load with a browser.

    with HubServer(tmp_path) as hub:        # in tests; `configure` points huggingface_hub at it
        ...
    python -m tests.hub_server --port 0 --root DIR      # by hand: prints its URL, runs until interrupted

`Store` keeps repos, commits and blobs on disk; `_Handler` speaks HTTP and answers errors as the Hub does, with the
X-Error-Code headers that huggingface_hub reads; `hub_faults.py` says what goes wrong on the way. Models, and static
Spaces as `spaces/ns/name`; one token, no paging; Xet where `offer_xet` says so, else set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import hmac
import json
import mimetypes
import os
import re
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import takewhile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

try:
    from hub_faults import Fault, Faults, no_faults
except ImportError:  # by hand, as `python -m tests.hub_server`
    from tests.hub_faults import Fault, Faults, no_faults

if TYPE_CHECKING:
    import pytest

TOKEN = "hf_test_only_0123456789"
# No name starts with a dot, so none leaves the folder of the repos.
REPO_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
CHUNK_SIZE_BYTES = 1 << 20
LFS_THRESHOLD_BYTES = 10 << 20
# What the Hub puts into a new repo, shortened. External data (.onnx_data) is not in its list either.
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.bin", "*.onnx", "*.pt", "*.safetensors")
)


class HubError(Exception):
    """An answer that is not a success; `code` is what huggingface_hub tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


# Storage


@dataclass(frozen=True)
class StoredFile:
    """A file in a commit: the sha1 of its git blob, which is a pointer for an LFS file, and that one's sha256."""

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> StoredFile:
        return cls(_git_sha1(content), len(content))

    @classmethod
    def lfs(cls, sha256: str, size: int) -> StoredFile:
        return cls(_git_sha1(_pointer(sha256, size)), size, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def describe(self, path: str) -> dict[str, Any]:
        described: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            pointer_size = len(_pointer(self.sha256, self.size))
            described["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return described


@dataclass(frozen=True)
class Commit:
    """One state of a repo: all of its files, and the commit it was made from."""

    parent: str | None
    title: str
    message: str
    date: str
    files: Mapping[str, StoredFile]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Commit:
        fields = json.loads(text)
        files = {path: StoredFile(**file) for path, file in fields.pop("files").items()}
        return cls(files=files, **fields)


class Store:
    """Repos on disk: `models/ns/name/{repo.json,commits/<sha>.json}`, contents by hash in `blobs/`."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = threading.RLock()

    def exists(self, repo_id: str) -> bool:
        return self._repo_file(repo_id).is_file()

    def create(self, repo_id: str, private: bool) -> None:
        self._save(repo_id, {"private": private, "refs": {}})
        attributes = GITATTRIBUTES.encode()
        file = StoredFile.regular(attributes)
        self.put_blob(file.oid, attributes)
        self.add_commit(repo_id, "main", None, "initial commit", "", {".gitattributes": file})

    def is_private(self, repo_id: str) -> bool:
        return bool(self._load(repo_id)["private"])

    def refs(self, repo_id: str) -> dict[str, str]:
        """Commits by branch name or `refs/pr/N`."""
        return dict(self._load(repo_id)["refs"])

    def set_ref(self, repo_id: str, ref: str, commit: str) -> None:
        state = self._load(repo_id)
        state["refs"][ref] = commit
        self._save(repo_id, state)

    def resolve(self, repo_id: str, revision: str) -> str:
        """The commit of a branch, a pull request or a commit id."""
        refs = self.refs(repo_id)
        commit = refs.get(revision) or refs.get(f"refs/tags/{revision}", revision)
        if not self._commit_file(repo_id, commit).is_file():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, repo_id: str, commit: str) -> Commit:
        return Commit.from_json(self._commit_file(repo_id, commit).read_bytes())

    def history(self, repo_id: str, revision: str) -> Iterator[tuple[str, Commit]]:
        """Newest first."""
        at: str | None = self.resolve(repo_id, revision)
        while at is not None:
            commit = self.commit(repo_id, at)
            yield at, commit
            at = commit.parent

    def add_commit(
        self, repo_id: str, ref: str, parent: str | None, title: str, message: str, files: Mapping[str, StoredFile]
    ) -> str:
        content = Commit(parent, title, message, _now(), files).to_json()
        sha = hashlib.sha1(content).hexdigest()
        _write(self._commit_file(repo_id, sha), content)
        self.set_ref(repo_id, ref, sha)
        return sha

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest

    def put_blob(self, digest: str, content: bytes) -> None:
        _write(self.blob(digest), content)

    def _repo_file(self, repo_id: str) -> Path:
        return self.root / "models" / repo_id / "repo.json"

    def _commit_file(self, repo_id: str, commit: str) -> Path:
        name = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else "none"
        return self.root / "models" / repo_id / "commits" / f"{name}.json"

    def _load(self, repo_id: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._repo_file(repo_id).read_bytes())
        return state

    def _save(self, repo_id: str, state: Mapping[str, Any]) -> None:
        _write(self._repo_file(repo_id), json.dumps(state).encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, path)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _matches(path: str, pattern: str) -> bool:
    """A git pattern: without a slash it is about the name, with one about the whole path."""
    return fnmatch.fnmatch(path if "/" in pattern else PurePosixPath(path).name, pattern)


def _front_matter(card: str) -> Any:
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else None


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, store: Store, token: str, namespaces: Sequence[str]):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = store
        self.token = token
        self.namespaces = namespaces
        self.requests: list[tuple[str, str]] = []
        self.faults: Faults = no_faults
        self.part_bytes: int | None = None
        self.gated: set[str] = set()
        self.xet: Path | str | None = None
        self.upload_key = secrets.token_bytes(16)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no fault of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def upload_signature(self, oid: str) -> str:
        """LFS uploads carry no token: like at the Hub, whoever was handed the URL may use it."""
        return hmac.new(self.upload_key, oid.encode(), "sha256").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: with Nagle's algorithm every answer takes 40 ms.
    disable_nagle_algorithm = True
    server: _Server

    # Dispatch

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_OPTIONS = do_GET

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.server.requests.append((self.command, path))
        fault = self.server.faults(self.command, path)
        if fault is not None:
            self._spoiled(fault, url.path)
            return
        # An upload is streamed to disk by its route.
        self.body = self._read_body() if self.command == "POST" else b""
        self._answer(url.path)

    def _answer(self, path: str) -> None:
        """Find the route of a path, and do it."""
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for route_method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and route_method == method:
                    found = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                    if space := found.pop("space", ""):
                        found["repo"] = space
                    answer(self, **found)
                    return
            raise HubError(404, f"Cannot {self.command} {path}")
        except HubError as error:
            self._send_json(error.body, error.status, error.headers)

    def _spoiled(self, fault: Fault, path: str) -> None:
        """Answer in the way of a fault, see `hub_faults.Kind`."""
        if fault.kind == "request cut":
            self.rfile.read(min(fault.after_bytes, int(self.headers.get("Content-Length", 0))))
            self._reset()
            return
        self.body = self._read_body()
        if fault.kind == "status":
            self._fail(fault)
            return
        answers = [self._recorded(path) for _ in range(2 if fault.kind == "twice" else 1)]
        if fault.kind == "late status":
            self._fail(fault)
            return
        if fault.kind == "twice":
            self.wfile.write(answers[-1])
            return
        elif fault.kind == "answer cut":
            self.wfile.write(answers[0][: fault.after_bytes])
            self._reset()
        elif fault.kind == "trickle":
            with suppress(ConnectionError):
                self.wfile.write(answers[0][: fault.after_bytes])
                for at in range(fault.after_bytes, len(answers[0])):
                    self.wfile.write(answers[0][at : at + 1])
                    time.sleep(0.1)
        elif fault.kind == "no answer":
            with suppress(ConnectionError):
                self.connection.recv(1)  # until the client hangs up
        self.close_connection = True

    def _recorded(self, path: str) -> bytes:
        """Do what was asked; the answer, which is not sent."""
        reader, writer = self.rfile, self.wfile
        self.rfile, self.wfile = BytesIO(self.body), BytesIO()
        try:
            self._answer(path)
            return self.wfile.getvalue()
        finally:
            self.rfile, self.wfile = reader, writer

    def _fail(self, fault: Fault) -> None:
        headers = {"X-Error-Message": "a planted fault", **fault.headers}
        self._send_json({"error": "a planted fault"}, fault.status, headers)

    def _reset(self) -> None:
        """End the connection so that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, header in (headers or {}).items():
            self.send_header(name, header)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type, Range")
        self.send_header("Access-Control-Expose-Headers", "*")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests look at `HubServer.requests`."""

    # Who may do what

    def _authorized(self) -> bool:
        """Whether the request has the token; without any it is anonymous, with another one it is refused."""
        header = self.headers.get("Authorization")
        if header is None:
            return False
        if not hmac.compare_digest(header.encode(), f"Bearer {self.server.token}".encode()):
            raise HubError(401, "Invalid credentials in Authorization header")
        return True

    def _may_write(self, repo_id: str) -> bool:
        return repo_id.removeprefix("spaces/").split("/")[0] in self.server.namespaces

    def _check_read(self, repo_id: str) -> Store:
        store, authorized = self.server.store, self._authorized()
        if store.exists(repo_id) and (not store.is_private(repo_id) or (authorized and self._may_write(repo_id))):
            return store
        if not authorized:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def _check_write(self, repo_id: str) -> Store:
        store = self._check_token(repo_id)
        if not self._may_write(repo_id):
            raise HubError(403, f"Your token does not have write access to {repo_id}")
        return store

    def _check_push(self, repo_id: str) -> Store:
        """A pull request is open to everybody who has a token."""
        return self._check_token(repo_id) if self.query.get("create_pr") == ["1"] else self._check_write(repo_id)

    def _check_token(self, repo_id: str) -> Store:
        if not self._authorized():
            raise HubError(401, "Invalid username or password.")
        return self._check_read(repo_id)

    # Routes: account and repos

    def preflight(self) -> None:
        self.send_response(204)
        self.send_header("Access-Control-Allow-Methods", "GET, HEAD, OPTIONS")
        self.end_headers()

    def whoami(self) -> None:
        if not self._authorized():
            raise HubError(401, "Invalid username or password.")
        user, *organizations = self.server.namespaces
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._send_json(
            {"type": "user", "name": user, "orgs": [{"name": name} for name in organizations], "auth": access}
        )

    def create_repo(self) -> None:
        if not self._authorized():
            raise HubError(401, "Invalid username or password.")
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or self.server.namespaces[0]
        repo_id = f"{namespace}/{wanted['name']}"
        if not re.fullmatch(REPO_ID, repo_id):
            raise HubError(400, f"Invalid repo name: {repo_id}")
        if not self._may_write(repo_id):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if wanted.get("type") == "space":
            if wanted.get("sdk") != "static":
                raise HubError(400, "A Space of another sdk than static is not served here")
            repo_id = f"spaces/{repo_id}"
        url = f"{self.server.url}/{repo_id}"
        with self.server.store.lock:
            if self.server.store.exists(repo_id):
                raise HubError(409, "You already created this model repo", url=url)
            self.server.store.create(repo_id, wanted.get("visibility") == "private")
        self._send_json({"url": url, "name": repo_id})

    def list_models(self) -> None:
        """Those of an author that may be read and have the words in their ids."""
        store, [author] = self.server.store, self.query["author"]
        [search] = self.query.get("search", [""])
        ids = (f"{author}/{folder.name}" for folder in sorted((store.root / "models" / author).glob("*")))
        found = [each for each in ids if search in each and (self._authorized() or not store.is_private(each))]
        self._send_json([{"id": each, "sha": store.refs(each)["main"]} for each in found])

    def model_info(self, repo: str, revision: str = "main") -> None:
        store = self._check_read(repo)
        history = list(store.history(repo, revision or "main"))
        sha, commit = history[0]
        self._send_json(
            {
                "id": repo.removeprefix("spaces/"),
                "author": repo.removeprefix("spaces/").split("/")[0],
                "sha": sha,
                "private": store.is_private(repo),
                "createdAt": history[-1][1].date,
                "lastModified": commit.date,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def refs(self, repo: str) -> None:
        refs = self._check_read(repo).refs(repo)
        pulls = {ref for ref in refs if ref.startswith("refs/pr/")}
        tagged = {ref for ref in refs if ref.startswith("refs/tags/")}
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": refs[name]}
            for name in sorted(refs.keys() - pulls - tagged)
        ]
        tags = [
            {"name": ref.removeprefix("refs/tags/"), "ref": ref, "targetCommit": refs[ref]} for ref in sorted(tagged)
        ]
        requests = [{"name": name, "ref": name, "targetCommit": refs[name]} for name in sorted(pulls)]
        self._send_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": requests})

    def history(self, repo: str, revision: str) -> None:
        commits = self._check_read(repo).history(repo, revision)
        author = {"user": self.server.namespaces[0]}
        self._send_json(
            [
                {"id": sha, "title": commit.title, "message": commit.message, "date": commit.date, "authors": [author]}
                for sha, commit in commits
            ]
        )

    def create_branch(self, repo: str, branch: str) -> None:
        store = self._check_write(repo)
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        start = json.loads(self.body).get("startingPoint", "main")
        with store.lock:
            if branch in store.refs(repo):
                raise HubError(409, f"Reference already exists: refs/heads/{branch}")
            store.set_ref(repo, branch, store.resolve(repo, start))
        self._send_json({})

    # Routes: listing files

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        store = self._check_read(repo)
        files = store.commit(repo, store.resolve(repo, revision)).files
        prefix = f"{path}/" if path else ""
        entries = [file.describe(name) for name, file in files.items() if name.startswith(prefix)]
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        entries += [_describe_folder(folder) for folder in folders if folder.startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self._send_json(sorted(entries, key=lambda entry: entry["path"]))

    def paths_info(self, repo: str, revision: str) -> None:
        store = self._check_read(repo)
        files = store.commit(repo, store.resolve(repo, revision)).files
        asked = parse_qs(self.body.decode()).get("paths", [])
        described = [files[path].describe(path) for path in asked if path in files]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        self._send_json(described + [_describe_folder(folder) for folder in folders])

    # Routes: reading a file

    def resolve(self, repo: str, revision: str, path: str) -> None:
        store = self._check_read(repo)
        if repo in self.server.gated:
            raise HubError(403, f"Access to model {repo} is restricted", "GatedRepo")
        sha = store.resolve(repo, revision)
        file = store.commit(repo, sha).files.get(path)
        if file is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers["X-Repo-Commit"] = sha
            raise error
        start, end = self._range(file.size)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{file.etag}"')
        if file.sha256:
            self.send_header("X-Linked-ETag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(file.size))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", mimetypes.guess_type(path)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self._send_content(store.blob(file.etag), start, end)

    def _range(self, size: int) -> tuple[int, int]:
        """The bytes asked for, as [start, end)."""
        header = self.headers.get("Range")
        if header is None:
            return 0, size
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
        if match and match[1]:
            start, end = int(match[1]), min(int(match[2] or size - 1) + 1, size)
        elif match and match[2]:
            start, end = max(size - int(match[2]), 0), size
        else:
            raise HubError(400, f"Invalid range: {header}")
        if start >= end:
            error = HubError(416, "Range not satisfiable")
            error.headers["Content-Range"] = f"bytes */{size}"
            raise error
        return start, end

    def _send_content(self, blob: Path, start: int, end: int) -> None:
        # A browser that has seen enough hangs up.
        with blob.open("rb") as content, suppress(ConnectionError):
            content.seek(start)
            while start < end:
                chunk = content.read(min(CHUNK_SIZE_BYTES, end - start))
                self.wfile.write(chunk)
                start += len(chunk)

    # Routes: a push

    def validate_yaml(self) -> None:
        try:
            metadata = _front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            problem = {"message": f"Invalid YAML: {error}"}
            raise HubError(400, "Invalid metadata", errors=[problem], warnings=[]) from error
        empty = {"message": "empty or missing yaml metadata in repo card"}
        self._send_json({"errors": [], "warnings": [] if metadata else [empty]})

    def preupload(self, repo: str, revision: str) -> None:
        store = self._check_push(repo)
        files = store.commit(repo, store.resolve(repo, revision)).files
        wanted = json.loads(self.body)
        ignored = wanted.get("gitIgnore", self._text(files.get(".gitignore"))).split()
        attributes = self._text(files.get(".gitattributes")).splitlines()
        lfs_patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]
        answers = []
        for file in wanted["files"]:
            path = file["path"]
            lfs = file["size"] > LFS_THRESHOLD_BYTES or any(_matches(path, pattern) for pattern in lfs_patterns)
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(_matches(path, pattern) for pattern in ignored),
                    "oid": files[path].etag if path in files else None,
                }
            )
        self._send_json({"files": answers})

    def _text(self, file: StoredFile | None) -> str:
        return self.server.store.blob(file.etag).read_text() if file else ""

    def lfs_batch(self, repo: str) -> None:
        store = self._check_token(repo)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            if not store.blob(oid).is_file():
                upload = f"{self.server.url}/lfs/{oid}?signature={self.server.upload_signature(oid)}"
                verify = f"{self.server.url}/{repo}.git/info/lfs/objects/verify"
                header = {}
                if (part_bytes := self.server.part_bytes) and wanted["size"] > part_bytes:
                    parts = range(1, -(-wanted["size"] // part_bytes) + 1)
                    header = {f"{part:05}": upload.replace(f"/lfs/{oid}", f"/lfs/{oid}/{part}") for part in parts}
                    header["chunk_size"] = str(part_bytes)
                wanted["actions"] = {"upload": {"href": upload, "header": header}, "verify": {"href": verify}}
            answers.append(wanted)
        self._send_json({"transfer": "basic", "objects": answers})

    def xet_token(self, repo: str, revision: str) -> None:
        self._check_write(repo)
        if self.server.xet is None:
            raise HubError(404, "No Xet here")
        until = int(time.time()) + 3600
        url = self.server.xet if isinstance(self.server.xet, str) else f"local://{self.server.xet}"
        self._send_json({"casUrl": url, "accessToken": "of_xet", "exp": until})

    # Routes: discussions and tags

    def discussions(self, repo: str) -> None:
        """The open pull requests, newest first; of one author and title each, as they are made here."""
        store = self._check_read(repo)
        user = self.server.namespaces[0]
        main = {sha for sha, _ in store.history(repo, "main")}
        found = []
        for ref, sha in store.refs(repo).items() if self.query.get("author", [user]) == [user] else ():
            if ref.startswith("refs/pr/"):
                number = int(ref.removeprefix("refs/pr/"))
                kind, name = ("space", repo.removeprefix("spaces/")) if repo.startswith("spaces/") else ("model", repo)
                first = list(takewhile(lambda each: each[0] not in main, store.history(repo, sha)))[-1][1]
                found.append(
                    {
                        "num": number,
                        "title": first.title,
                        "author": {"name": user},
                        "createdAt": first.date,
                        "status": "open",
                        "isPullRequest": True,
                        "repo": {"name": name, "type": kind},
                    }
                )
        self._send_json({"count": len(found), "start": 0, "discussions": found[::-1]})

    def create_tag(self, repo: str, revision: str) -> None:
        store, tag = self._check_write(repo), json.loads(self.body)["tag"]
        with store.lock:
            if f"refs/tags/{tag}" in store.refs(repo):
                raise HubError(409, f"Tag {tag} already exists")
            store.set_ref(repo, f"refs/tags/{tag}", store.resolve(repo, revision))
        self._send_json({})

    def lfs_upload(self, oid: str) -> None:
        """Streams the body to disk; it becomes a blob if its sha256 is the one that was announced."""
        blob = self.server.store.blob(oid)
        content, digest = self._received(blob.parent)
        self._check_signature(oid)
        if digest != oid:
            os.unlink(content)
            raise HubError(400, "The content is not the announced one")
        os.replace(content, blob)
        self._send_json({})

    def lfs_part(self, oid: str, part: str) -> None:
        """One part of a large file, which is kept until all are there."""
        content, digest = self._received(self.server.store.blob(oid).parent)
        self._check_signature(oid)
        os.replace(content, self.server.store.blob(f"{oid}.{part}"))
        self._send_json({}, headers={"ETag": f'"{digest}"'})

    def lfs_complete(self, oid: str) -> None:
        """Put the parts together, if they are those that were sent."""
        self._check_signature(oid)
        blob, digest = self.server.store.blob(oid), hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=blob.parent, delete=False) as whole:
            for part in json.loads(self.body)["parts"]:
                content = self.server.store.blob(f"{oid}.{part['partNumber']}").read_bytes()
                if f'"{hashlib.sha256(content).hexdigest()}"' != part["etag"]:
                    raise HubError(400, "A part is another than was sent")
                whole.write(content)
                digest.update(content)
        if digest.hexdigest() != oid:
            os.unlink(whole.name)
            raise HubError(400, "The content is not the announced one")
        os.replace(whole.name, blob)
        self._send_json({})

    def _check_signature(self, oid: str) -> None:
        signature = self.query.get("signature", [""])[0]
        if not hmac.compare_digest(signature, self.server.upload_signature(oid)):
            raise HubError(403, "Bad signature")

    def _received(self, folder: Path) -> tuple[str, str]:
        """The body on disk, and its sha256."""
        folder.mkdir(parents=True, exist_ok=True)
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
            while left and (chunk := self.rfile.read(min(CHUNK_SIZE_BYTES, left))):
                temporary.write(chunk)
                digest.update(chunk)
                left -= len(chunk)
        return temporary.name, digest.hexdigest()

    def lfs_verify(self, repo: str) -> None:
        store, wanted = self._check_token(repo), json.loads(self.body)
        blob = store.blob(wanted["oid"])
        if not blob.is_file() or blob.stat().st_size != wanted["size"]:
            raise HubError(404, "Object not found")
        self._send_json({})

    def commit(self, repo: str, revision: str) -> None:
        create_pr = self.query.get("create_pr") == ["1"]
        store = self._check_push(repo)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with store.lock:
            head = store.resolve(repo, revision)
            parent = header["value"].get("parentCommit", head)
            if parent != head and not create_pr:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            pull = 1 + sum(ref.startswith("refs/pr/") for ref in store.refs(repo))
            ref = f"refs/pr/{pull}" if create_pr else revision
            if not create_pr and revision not in store.refs(repo):
                raise HubError(400, f"Cannot commit to {revision}: it is not a branch")
            files = dict(store.commit(repo, parent).files)
            for operation in operations:
                self._apply(files, operation["key"], operation["value"])
            title, message = header["value"]["summary"], header["value"]["description"]
            sha = store.add_commit(repo, ref, parent, title, message, dict(sorted(files.items())))
        url = f"{self.server.url}/{repo}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        self._send_json(answer | ({"pullRequestUrl": f"{url}/discussions/{pull}"} if create_pr else {}))

    def _apply(self, files: dict[str, StoredFile], key: str, value: Mapping[str, Any]) -> None:
        """One line of a commit, done to the files of its parent."""
        store, path = self.server.store, value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            files[path] = StoredFile.regular(content)
            store.put_blob(files[path].oid, content)
        elif key == "lfsFile":
            if not store.blob(value["oid"]).is_file() and isinstance(self.server.xet, Path):
                store.put_blob(value["oid"], _of_xet(self.server.xet, value["oid"], value["size"]))
            if not store.blob(value["oid"]).is_file():
                raise HubError(400, f"LFS object {value['oid']} of {path} was never uploaded")
            files[path] = StoredFile.lfs(value["oid"], store.blob(value["oid"]).stat().st_size)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise HubError(400, f"Unknown operation: {key}")


def _of_xet(folder: Path, oid: str, size: int) -> bytes:
    """A file out of what Xet's client has written, in which it is a row of chunks, not compressed if it is random.

    A chunk has eight bytes in front of it: version, length in three, kind of compression, length before it in three.
    """
    for path in folder.glob("xet/xorbs/xorbs/default.*"):
        content, at, chunks = path.read_bytes(), 0, list[bytes]()
        while at < len(content) and content[at] == 0 and content[at + 4] == 0:
            length = int.from_bytes(content[at + 1 : at + 4], "little")
            chunks.append(content[at + 8 : at + 8 + length])
            at += 8 + length
        for first in range(len(chunks)):
            found = b"".join(chunks[first:])[:size]
            if hashlib.sha256(found).hexdigest() == oid:
                return found
    raise HubError(400, f"LFS object {oid} did not come by Xet")


def _describe_folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


_REPO = rf"(?P<repo>(?:spaces/)?{REPO_ID})"
_MODEL = rf"/api/(?:models/(?P<repo>{REPO_ID})|(?P<space>spaces/{REPO_ID}))"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: Sequence[tuple[str, str, Callable[..., None]]] = (
    ("OPTIONS", r".*", _Handler.preflight),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", r"/api/models", _Handler.list_models),
    ("GET", rf"{_MODEL}(/revision/{_REVISION})?", _Handler.model_info),
    ("GET", rf"{_MODEL}/refs", _Handler.refs),
    ("GET", rf"{_MODEL}/discussions", _Handler.discussions),
    ("GET", rf"{_MODEL}/xet-write-token/{_REVISION}", _Handler.xet_token),
    ("POST", rf"{_MODEL}/tag/{_REVISION}", _Handler.create_tag),
    ("GET", rf"{_MODEL}/commits/{_REVISION}", _Handler.history),
    ("POST", rf"{_MODEL}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("GET", rf"{_MODEL}/tree/{_REVISION}(/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_MODEL}/paths-info/{_REVISION}", _Handler.paths_info),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.lfs_part),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_complete),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
)


class HubServer:
    """The running server. The token's user is the first of `namespaces`; it may write to all of them."""

    def __init__(
        self, root: Path, token: str = TOKEN, *, port: int = 0, namespaces: Sequence[str] = ("tester", "acme")
    ):
        self._server = _Server(port, Store(root), token, namespaces)
        self.token = token

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def faults(self) -> Faults:
        """What goes wrong, from now on."""
        return self._server.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._server.faults = faults

    def split_uploads(self, part_bytes: int) -> None:
        """Have large files sent in parts of that size, as the Hub does above 5 GB or so."""
        self._server.part_bytes = part_bytes

    def offer_xet(self, place: Path | str) -> None:
        """Have large files sent by Xet, to an address, or to a folder, in which its client keeps them."""
        self._server.xet = place

    @property
    def gated(self) -> set[str]:
        """The repos whose files nobody gets without having asked for them."""
        return self._server.gated

    @property
    def store(self) -> Store:
        """What it holds."""
        return self._server.store

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and path of every request so far."""
        return self._server.requests

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


# Pointing huggingface_hub at it


def environment(url: str, home: Path, token: str | None) -> dict[str, str]:
    """The variables with which another process uses this Hub, and nothing of the user's home."""
    return {
        "HF_ENDPOINT": url,
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }


def configure(patch: pytest.MonkeyPatch, url: str, home: Path, token: str | None) -> None:
    """The same for this process, where huggingface_hub has read most variables when it was imported."""
    from huggingface_hub import constants

    for name, value in environment(url, home, token).items():
        patch.setenv(name, value)
        if hasattr(constants, name):
            patch.setattr(constants, name, value == "1" if value in ("0", "1") else value)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a Hub on the loopback interface.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the repos")
    parser.add_argument("--token", default=TOKEN, help="the token that may write (default: %(default)s)")
    options = parser.parse_args()
    hub = HubServer(options.root, options.token, port=options.port)
    print(hub.url, flush=True)
    with suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
