"""What a push changes: files against a branch of the Hub's, by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status

from vlm_export.errors import InputError
from vlm_export.hub.answers import hub_errors, not_a_repo_id
from vlm_export.hub.content import Files, check_limits, folder_files, same_content, size_bytes
from vlm_export.hub.remote import Kind, PullRequest, Remote, check_tag, check_tag_name, open_pull_request, read_branch
from vlm_export.hub.token import redacted

# The folder this tool owns in a published repo: remote files in it that are no longer built are deleted.
OWNED_FOLDER: Mapping[Kind, str] = {"model": "onnx/", "space": "model/"}
Action = Literal["add", "update", "delete", "same", "send"]


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
        pull_request: the page of the one that the push goes on with, opened by an earlier push of the same.
        tag: what the commit is called.
    """

    repo_id: str
    revision: str
    create_repo: bool
    changes: tuple[FileChange, ...]
    kind: Kind = "model"
    not_compared: str = ""
    pull_request: str | None = None
    tag: str | None = None

    def total_bytes(self, *actions: str) -> int:
        """The size of all files to which one of these things is done."""
        return sum(change.size_bytes for change in self.changes if change.action in actions)

    @property
    def summary(self) -> str:
        """Where it goes, how many files are new, changed, gone and unchanged, and how much is uploaded."""
        counts = Counter(change.action for change in self.changes)
        done = [f"{counts[action]} to {action}" for action in ("add", "update", "send", "delete") if counts[action]]
        unchanged = [f"{counts['same']} the same"] if counts["same"] else []
        where = f"{'spaces/' if self.kind == 'space' else ''}{self.repo_id}@{self.revision}"
        beside = {"the repo is new": self.create_repo, f"goes on with {self.pull_request}": self.pull_request}
        beside[f"tagged {self.tag}"] = self.tag
        upload = f"{sized(self.total_bytes('add', 'update', 'send'))} to upload"
        return "; ".join([f"{where}: {', '.join([*done, *unchanged])}", upload, *filter(beside.get, beside)])

    @property
    def is_done(self) -> bool:
        """Whether the Hub has it all."""
        return all(change.action == "same" for change in self.changes)


@dataclass(frozen=True)
class Compared:
    """A plan, and what it was compared with."""

    plan: PushPlan
    files: Files
    remote: Remote | None
    pull_request: PullRequest | None


def plan_push(
    repo_id: str,
    files: Path | Files,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    kind: Kind = "model",
    message: str = "",
) -> PushPlan:
    """What `push_folder` of the same arguments does to the branch `revision`, which need not exist yet, nor the repo.

    Raises InputError where that would, as far as the Hub says so before; Unreachable if it cannot be asked.
    """
    found = checked(repo_id, files, revision, create_pr, tag)
    with hub_errors(repo_id, revision):
        plan = compared(HfApi(), repo_id, found, private, revision, create_pr, tag, kind, message).plan
        _check_front_matter(found, kind)
    return plan


def plan_unseen(repo_id: str, files: Path | Files, reason: str, *, revision: str | None, kind: Kind) -> PushPlan:
    """What a push would send to a repo that cannot be looked at, for a reason that is given.

    Raises InputError as `plan_push` does.
    """
    found = checked(repo_id, files, revision, False, None)
    changes = tuple(FileChange(name, "send", size_bytes(found[name])) for name in sorted(found))
    return PushPlan(repo_id, revision or constants.DEFAULT_REVISION, False, changes, kind, reason)


def checked(repo_id: str, files: Path | Files, revision: str | None, create_pr: bool, tag: str | None) -> Files:
    """The files to push. Raises InputError for what the Hub would refuse whatever it has."""
    if create_pr and revision is not None:
        raise InputError(f"{repo_id}: a pull request always goes to the main branch: drop the revision {revision!r}")
    if create_pr and tag is not None:
        raise InputError(f"{repo_id}: --tag {tag}: a pull request is not merged yet: tag the commit that merges it")
    if tag is not None:
        check_tag_name(repo_id, tag)
    found = folder_files(files) if isinstance(files, Path) else files
    check_limits(repo_id, found)
    if "/" not in repo_id:  # which huggingface_hub would take
        raise InputError(redacted(not_a_repo_id(repo_id)))
    return found


def compared(
    api: HfApi,
    repo_id: str,
    files: Files,
    private: bool,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
    kind: Kind,
    message: str,
) -> Compared:
    """The plan of a push of checked files. Raises InputError for what the repo as it stands forbids."""
    remote = read_branch(api, repo_id, revision, kind)
    if remote is not None and private and not remote.private:
        raise InputError(f"{repo_id} exists and is public: make it private in its settings, or push without --private")
    pull_request = None
    if remote is not None and create_pr:
        pull_request = open_pull_request(api, repo_id, message, kind)
        if pull_request is not None:
            remote = read_branch(api, repo_id, pull_request.branch, kind)
    plan = PushPlan(
        repo_id,
        pull_request.branch if pull_request else revision or constants.DEFAULT_REVISION,
        remote is None,
        changes_of(files, remote.files if remote else {}, kind),
        kind,
        pull_request=pull_request.url if pull_request else None,
        tag=tag,
    )
    if remote is not None and tag is not None:
        check_tag(api, repo_id, tag, remote.commit if plan.is_done else None, kind)
    return Compared(plan, files, remote, pull_request)


def sized(count: int) -> str:
    """Bytes, kB or MB, whichever says most in few digits."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:,.1f} MB"


def changes_of(files: Files, remote: Mapping[str, RepoFile], kind: Kind) -> tuple[FileChange, ...]:
    """What makes `remote` hold the files, by path; stale files under OWNED_FOLDER are deleted, others left alone."""
    changes = [_change(name, content, remote.get(name)) for name, content in files.items()]
    stale = [name for name in remote if name.startswith(OWNED_FOLDER[kind]) and name not in files]
    changes += [FileChange(name, "delete", remote[name].size) for name in stale]
    return tuple(sorted(changes, key=lambda change: change.path))


def _change(name: str, content: Path | bytes, remote: RepoFile | None) -> FileChange:
    action: Action = "add"
    if remote is not None:
        action = "same" if same_content(content, remote) else "update"
    return FileChange(name, action, size_bytes(content))


def _check_front_matter(files: Files, kind: Kind) -> None:
    """Have the Hub look at the card's front matter, as a commit does. Raises HfHubHTTPError if it refuses that."""
    card = files.get(constants.REPOCARD_NAME)
    if card is None:
        return
    text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8", errors="replace")
    asked = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json={"content": text, "repoType": kind})
    hf_raise_for_status(asked)
