"""The Hub: what a push would change, the push itself, and the download of models and adapters.

The only module that imports huggingface_hub, which finds the token by itself (HF_TOKEN, the login file). A push:
1. read the head of the branch, after creating the repo or the branch if it is missing;
2. compare it with the folder, by content;
3. commit what differs in one commit on top of that head: the Hub refuses it if somebody else was faster;
4. read the tree back: every file must have arrived.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

from httpx2 import TransportError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status

from vlm_export.errors import CheckFailed, InputError, VlmExportError, reason, shown
from vlm_export.news import tell
from vlm_export.own_files import leads_out

Kind = Literal["model", "space"]
Files = Mapping[str, Path | bytes]  # by path in the repo: a file, or what it holds
# The folder this tool owns in a published repo: remote files in it that are no longer built are deleted.
OWNED_FOLDER: Mapping[Kind, str] = {"model": "onnx/", "space": "model/"}
# Source: hub-docs, `docs/hub/storage-limits.md`.
MAX_FILE_BYTES = 500 * 10**9
MAX_ENTRIES = 10_000  # of a folder
# huggingface_hub refuses to commit anything in these.
FORBIDDEN_FOLDERS = (".git", ".cache")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TOLD_MEGABYTES = 1  # a download of less is not told
LOGIN = "run `hf auth login` or set HF_TOKEN"


Action = Literal["add", "update", "delete", "same", "send"]


class Unreachable(InputError):
    """The Hub does not answer, or is not to be asked."""


@dataclass(frozen=True)
class FileChange:
    """What a push does to one file of the repo; `send` where nobody knows what the Hub has."""

    path: str
    action: Action
    size_bytes: int


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        create_repo: whether the repo is not there yet.
        changes: by path, without the remote files that a push does not touch.
        kind: of the repo.
        not_compared: why the Hub was not asked what it has, if it was not; everything is `send` then.
    """

    repo_id: str
    revision: str
    create_repo: bool
    changes: tuple[FileChange, ...]
    kind: Kind = "model"
    not_compared: str = ""

    def total_bytes(self, *actions: str) -> int:
        """The size of all files to which one of these things is done."""
        return sum(change.size_bytes for change in self.changes if change.action in actions)


@dataclass(frozen=True)
class PushResult:
    """Where a push ended up: the repo's page, the commit (the head if nothing had changed), the pull request's page."""

    url: str
    commit: str | None
    pull_request: str | None


@dataclass(frozen=True)
class _Remote:
    """A branch as the Hub has it; with `has_branch` false, `main`, from which the branch will start."""

    commit: str | None
    private: bool
    has_branch: bool
    files: Mapping[str, RepoFile]


def plan_push(
    repo_id: str,
    files: Path | Files,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    kind: Kind = "model",
) -> PushPlan:
    """What `push` of the same arguments would change on the branch `revision`, which need not exist yet, nor the repo.

    Raises InputError where that would, as far as the Hub says so before; Unreachable if it cannot be asked.
    """
    found = _checked(repo_id, files, revision, create_pr)
    with _hub_errors(repo_id, revision):
        remote = _read_remote(HfApi(), repo_id, revision, kind)
        _check_front_matter(found, kind)
    if remote is not None:
        _check_private(repo_id, remote, private)
    changes = _changes(found, remote.files if remote else {}, kind)
    return PushPlan(repo_id, revision or constants.DEFAULT_REVISION, remote is None, changes, kind)


def plan_unseen(repo_id: str, files: Path | Files, reason: str, *, revision: str | None, kind: Kind) -> PushPlan:
    """What a push would send to a repo that cannot be looked at, for a reason that is given.

    Raises InputError as `plan_push` does.
    """
    found = _checked(repo_id, files, revision, create_pr=False)
    changes = tuple(FileChange(name, "send", _size(found[name])) for name in sorted(found))
    return PushPlan(repo_id, revision or constants.DEFAULT_REVISION, False, changes, kind, reason)


def check_token(repo_id: str) -> None:
    """Raises InputError if there is no token to push with."""
    if _token() is None:
        raise InputError(f"{repo_id}: no Hugging Face token to push with: {LOGIN}")


def push_folder(
    repo_id: str,
    files: Path | Files,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    kind: Kind = "model",
    message: str,
) -> PushResult:
    """Make `repo_id` hold every file of a folder, or these files, in one commit; no commit if it already does.

    Stale files under `OWNED_FOLDER` are deleted, other remote files are left alone. `private` counts when the repo is
    created; without it the namespace's default does. Raises InputError for what the user or the Hub refuses,
    CheckFailed if a file did not arrive.
    """
    found = _checked(repo_id, files, revision, create_pr)
    with _hub_errors(repo_id, revision):
        check_token(repo_id)
        api = HfApi()
        remote = _prepare_remote(api, repo_id, revision, private, kind)
        operations = _operations(_changes(found, remote.files, kind), found)
        if not operations:
            return PushResult(page_of(repo_id, kind), remote.commit, None)
        # Not upload_folder: with hf_xet it may split a push over several commits, and it skips some folders silently.
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=kind,
            revision=revision,
            create_pr=create_pr,
            parent_commit=remote.commit,
        )
        _check_arrived(api, repo_id, info.pr_revision or info.oid, found, kind)
    return PushResult(page_of(repo_id, kind), info.oid, info.pr_url)


def page_of(repo_id: str, kind: Kind = "model") -> str:
    """The address of a repo's page."""
    return f"{constants.ENDPOINT}/{'spaces/' if kind == 'space' else ''}{repo_id}"


def download(repo_id: str, *, revision: str | None = None, allow_patterns: Sequence[str]) -> Path:
    """Fetch the files of a model or adapter that match `allow_patterns`; the snapshot's folder, named after its commit.

    A pickle that the repo also has as safetensors is left out. Works from the cache when the Hub cannot be reached.
    Raises InputError if the repo or the revision cannot be read, or if nothing matches.
    """
    with _hub_errors(repo_id, revision):
        pinned = HfApi().resolve_revision(repo_id, revision=revision)
        listed = _listing(repo_id, pinned.resolved)
        if not any(fnmatch.fnmatch(path, pattern) for path in listed for pattern in allow_patterns):
            raise InputError(f"{repo_id}@{pinned}: no file matches {', '.join(allow_patterns)}: check the repo's files")
        superseded = _superseded_pickles(list(listed))
        wanted = filter_repo_objects(listed, allow_patterns=list(allow_patterns))
        _tell_download(repo_id, pinned.resolved, {path: listed[path] for path in wanted if path not in superseded})
        folder = snapshot_download(
            repo_id,
            revision=pinned,
            allow_patterns=list(allow_patterns),
            ignore_patterns=[glob.escape(path) for path in superseded],
        )
    return Path(folder)


def _tell_download(repo_id: str, commit: str, wanted: Mapping[str, int]) -> None:
    """Tell how much of it the cache does not have, unless that is little."""
    missing = [path for path in wanted if not isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str)]
    megabytes = sum(wanted[path] for path in missing) / 1e6
    if megabytes >= _TOLD_MEGABYTES:
        tell(f"fetching {repo_id}@{commit[:12]}: {len(missing)} files, {megabytes:,.0f} MB")


def list_files(repo_id: str, *, revision: str | None = None) -> dict[str, int]:
    """The size in bytes of each of a repo's files, by path. Works from the cache when the Hub cannot be reached.

    Raises InputError if the repo or the revision cannot be read.
    """
    with _hub_errors(repo_id, revision):
        return _listing(repo_id, HfApi().resolve_revision(repo_id, revision=revision).resolved)


def find_models(author: str, search: str | None, most: int) -> list[tuple[str, str]]:
    """The models of an author that have `search` in their ids, by id: each with its newest commit.

    Raises InputError if the Hub cannot be asked.
    """
    with _hub_errors(author, None):
        found = HfApi().list_models(author=author, search=search, expand=["sha"])
        named = [(model.id, str(model.sha)) for model in islice(found, most)]
    return sorted(named)


def tensors_of(repo_id: str, file: str, *, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each tensor of a safetensors file, by key: its header alone is fetched.

    Raises InputError if the file cannot be read, or is none.
    """
    with _hub_errors(repo_id, revision):
        try:
            found = HfApi().parse_safetensors_file_metadata(repo_id, file, revision=revision)
        except SafetensorsParsingError as error:
            raise InputError(f"{repo_id}: {file}: not a readable safetensors file") from error
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()}


def cache_folder() -> Path:
    """Where downloads are kept, for all programs that use the Hub."""
    return Path(constants.HF_HUB_CACHE)


def has_token() -> bool:
    """Whether a token is set, by HF_TOKEN or by the login file."""
    return get_token() is not None


def user_name() -> str:
    """The name of the token's user, whose repos it may push to.

    Raises InputError if there is no token, the Hub does not accept it, or cannot be reached.
    """
    with _hub_errors("whoami", None):
        if _token() is None:
            raise InputError(f"no Hugging Face token: {LOGIN}")
        name = HfApi().whoami()["name"]
        if not isinstance(name, str):
            raise TypeError("no name of a user")
        return name


# The folder to push


def _checked(repo_id: str, files: Path | Files, revision: str | None, create_pr: bool) -> Files:
    """The files to push. Raises InputError for what the Hub would refuse whatever it has."""
    if create_pr and revision is not None:
        raise InputError(f"{repo_id}: a pull request always goes to the main branch: drop the revision {revision!r}")
    found = folder_files(files) if isinstance(files, Path) else files
    _check_limits(repo_id, found)
    _check_namespace(repo_id)
    return found


def _check_limits(repo_id: str, files: Files) -> None:
    """Raises InputError for what is larger than the Hub takes."""
    for name, content in files.items():
        if (size := _size(content)) > MAX_FILE_BYTES:
            limit = f"{MAX_FILE_BYTES / 1e9:.0f} GB"
            raise InputError(f"{repo_id}: {name} has {size / 1e9:,.0f} GB, and the Hub takes files up to {limit}")
    entries = {
        PurePosixPath(*parts[:end]) for name in files for parts in [name.split("/")] for end in range(1, len(parts) + 1)
    }
    folder, count = Counter(entry.parent.as_posix() for entry in entries).most_common(1)[0]
    if count > MAX_ENTRIES:
        raise InputError(f"{repo_id}: {folder} holds {count:,} files, and the Hub takes {MAX_ENTRIES:,} in a folder")


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of `folder` by their path in the repo. Raises InputError for what the Hub could not hold."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: build one to push first")
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_symlink():
            _check_link(folder, relative)
        if path.is_file():
            files[relative.as_posix()] = path
        elif not path.is_dir():
            raise InputError(f"{folder}: {relative} is a pipe, a socket or a device: remove it from the folder")
        if path.name in FORBIDDEN_FOLDERS:
            raise InputError(f"{folder}: the Hub does not take {relative}: remove it from the folder")
    if not files:
        raise InputError(f"{folder} holds no files: build one to push first")
    return files


def _check_link(folder: Path, relative: Path) -> None:
    if leads_out(folder, folder / relative):
        raise InputError(f"{folder}: {relative} is a link that leaves the folder: put the file itself there")
    if not (folder / relative).is_file():
        raise InputError(f"{folder}: {relative} is a link to no file: put the file or folder itself there")


def _same_content(content: Path | bytes, remote: RepoFile) -> bool:
    """Whether a local file is the remote one: the Hub gives the sha256 of LFS files, else the git blob sha1."""
    size_bytes = _size(content)
    if size_bytes != remote.size:
        return False
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if remote.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size_bytes)).hexdigest() == remote.blob_id


def _changes(files: Files, remote: Mapping[str, RepoFile], kind: Kind) -> tuple[FileChange, ...]:
    changes = [_change(name, content, remote.get(name)) for name, content in files.items()]
    stale = [name for name in remote if name.startswith(OWNED_FOLDER[kind]) and name not in files]
    changes += [FileChange(name, "delete", remote[name].size) for name in stale]
    return tuple(sorted(changes, key=lambda change: change.path))


def _change(name: str, content: Path | bytes, remote: RepoFile | None) -> FileChange:
    action: Action = "add"
    if remote is not None:
        action = "same" if _same_content(content, remote) else "update"
    return FileChange(name, action, _size(content))


# The repo


def _check_namespace(repo_id: str) -> None:
    """Raises InputError for an id without an owner, which huggingface_hub would take."""
    if "/" not in repo_id:
        raise InputError(_redact(_not_a_repo_id(repo_id)))


def _read_remote(api: HfApi, repo_id: str, revision: str | None, kind: Kind) -> _Remote | None:
    """The head of `revision`, or of main if the repo lacks that branch; None if there is no such repo."""
    has_branch = True
    try:
        try:
            info = api.repo_info(repo_id, revision=revision, repo_type=kind)
        except RevisionNotFoundError:
            has_branch = False
            info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError as error:
        # 401 and 403 do not tell "not there" from "not for you".
        if error.response.status_code == 404:
            return None
        raise
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=kind)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return _Remote(info.sha, bool(info.private), has_branch, files)


def _prepare_remote(api: HfApi, repo_id: str, revision: str | None, private: bool, kind: Kind) -> _Remote:
    """The branch to commit to, created with its repo if need be."""
    remote = _read_remote(api, repo_id, revision, kind)
    if remote is None:
        sdk = "static" if kind == "space" else None
        api.create_repo(repo_id, private=private or None, repo_type=kind, space_sdk=sdk, exist_ok=True)
        remote = _read_remote(api, repo_id, revision, kind)
    if remote is None:
        raise InputError(f"{repo_id} exists but the token may not see it: use a token with access to it")
    _check_private(repo_id, remote, private)
    if revision is not None and not remote.has_branch:
        api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
    return remote


def _check_private(repo_id: str, remote: _Remote, private: bool) -> None:
    if private and not remote.private:
        raise InputError(f"{repo_id} exists and is public: make it private in its settings, or push without --private")


def _check_front_matter(files: Files, kind: Kind) -> None:
    """Have the Hub look at the card's front matter, as a commit does. Raises HfHubHTTPError if it refuses that."""
    card = files.get(constants.REPOCARD_NAME)
    if card is None:
        return
    text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8", errors="replace")
    asked = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json={"content": text, "repoType": kind})
    hf_raise_for_status(asked)


def _operations(changes: Iterable[FileChange], files: Files) -> list[CommitOperationAdd | CommitOperationDelete]:
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for change in changes:
        if change.action == "delete":
            operations.append(CommitOperationDelete(change.path, is_folder=False))
        elif change.action != "same":
            operations.append(CommitOperationAdd(change.path, files[change.path]))
    return operations


def _check_arrived(api: HfApi, repo_id: str, revision: str, files: Files, kind: Kind) -> None:
    """Raises CheckFailed if the commit is not the folder: the Hub silently drops what the repo's .gitignore names."""
    remote = _read_remote(api, repo_id, revision, kind)
    changes = _changes(files, remote.files if remote else {}, kind)
    differing = [change.path for change in changes if change.action != "same"]
    if differing:
        raise CheckFailed(
            f"{repo_id}@{revision} was committed without the local {', '.join(differing)}: "
            "remove the repo's .gitignore if it names them, then push again"
        )


def _listing(repo_id: str, commit: str) -> dict[str, int]:
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        found = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        tree = [entry for entry in found if isinstance(entry, RepoFile)]
    return {file.path: file.size for file in tree}


def _superseded_pickles(paths: Sequence[str]) -> list[str]:
    """The pickles whose weights the same folder has as safetensors: same stem, or `pytorch_model*` for `model*`."""
    safetensors = {_weights_name(path) for path in paths if path.endswith(".safetensors")}
    return [path for path in paths if path.endswith(PICKLE_SUFFIXES) and _weights_name(path) in safetensors]


def _weights_name(path: str) -> PurePosixPath:
    """`a/pytorch_model-00001-of-00002.bin` and `a/model-00001-of-00003.safetensors` both give `a/model`."""
    pure = PurePosixPath(path)
    return pure.with_name(re.sub(r"-\d+-of-\d+$", "", pure.stem).removeprefix("pytorch_"))


# The token, and errors in one line


def _token() -> str | None:
    """The token that huggingface_hub sends. Raises InputError if it cannot: the HTTP client's error would show it."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise InputError(f"the Hugging Face token holds characters that no token has: {LOGIN} again")
    return token


def _redact(text: str) -> str:
    token = _token()
    return text.replace(token, "<token>") if token else text


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns an error that comes from the Hub into an InputError of one line that never shows the token."""
    _token()
    try:
        yield
    except VlmExportError:
        raise
    except Exception as error:
        message = next(filter(None, (_explain(link, repo_id, revision) for link in _chain(error))), None)
        if message is None and isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine
        if message is None:  # what huggingface_hub stumbled over in an answer, say a login page's HTML
            message = (
                f"{repo_id}: {constants.ENDPOINT} does not answer as the Hub does ({reason(error)}): check "
                "HF_ENDPOINT, and that no login page stands in front of the network"
            )
        shows_token = any(_redact(str(link)) != str(link) for link in _chain(error))
        kind = Unreachable if any(map(_is_unreachable, _chain(error))) else InputError
        raise kind(_redact(message)) from (None if shows_token else error)


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, OfflineModeIsEnabled | TransportError | ConnectionError | TimeoutError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    """What happened and what to do next; None if the error is not about talking to the Hub."""
    if isinstance(error, HFValidationError):
        return _not_a_repo_id(repo_id)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: HF_HUB_OFFLINE is set and the cache does not have what is needed: unset it and run again"
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id, revision)
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return f"{repo_id}: cannot reach {constants.ENDPOINT}: check the network and HF_ENDPOINT, then run again"
    return None


def _not_a_repo_id(repo_id: str) -> str:
    return f"{shown(repo_id)} is not a repo id: write namespace/name, in letters, digits, '-', '_' and '.'"


def _explain_answer(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "no reason given").split())
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then {LOGIN} of that account"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: name a branch, a tag or a commit that it has"
    if status == 401 and _token() is None:
        return f"{repo_id}: no public repo of that name, and no token to see a private one: check the name, or {LOGIN}"
    if status == 401:
        return f"{repo_id}: the Hub does not accept the token ({said}): {LOGIN} to a valid one"
    if status == 403:
        return f"{repo_id}: the token may not do this ({said}): use a token with write access to {repo_id}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} was not found, or the token may not see it: check the name and the token's access"
    if status == 412:
        return f"{repo_id} got another commit during the push ({said}): look at the new plan, then push again"
    if status < 500:
        return f"{repo_id}: the Hub refused the request with {status} ({said}): correct that and run again"
    return f"{repo_id}: the Hub answered {status} ({said}): try again later"
