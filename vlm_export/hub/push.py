"""Makes a repo of the Hub hold files.

1. Read the head of the branch, after creating the repo or the branch if it is missing.
2. Compare it with the files, by content: that is the plan.
3. Commit what differs in one commit on top of that head: the Hub refuses it if somebody else was faster.
4. Read the tree back: every file must have arrived.

A push that was interrupted is simply made again: the Hub has the large files that it got, and does not ask for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from vlm_export.errors import CheckFailed, InputError, one_line
from vlm_export.hub import patience
from vlm_export.hub.answers import hub_errors, is_conflict
from vlm_export.hub.content import Files
from vlm_export.hub.plan import Compared, FileChange, PushPlan, changes_of, checked, compared
from vlm_export.hub.remote import Kind, created, last_commit, open_pull_request, page_of, read_branch, tagged
from vlm_export.hub.token import redacted
from vlm_export.hub.user import check_token
from vlm_export.news import tell

_TRIES = 3  # to open a pull request whose answer was lost


@dataclass(frozen=True)
class PushResult:
    """Where a push ended up.

    Attributes:
        url: the repo's page.
        commit: the new one; the head, if nothing had changed.
        pull_request: its page.
        plan: what was carried out.
    """

    url: str
    commit: str | None
    pull_request: str | None
    plan: PushPlan


@dataclass(frozen=True)
class _Commit:
    commit: str | None
    pull_request: str | None = None


def push_folder(
    repo_id: str,
    files: Path | Files,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    kind: Kind = "model",
    message: str,
) -> PushResult:
    """Make `repo_id` hold every file of a folder, or these files, in one commit; no commit if it already does.

    Stale files under `OWNED_FOLDER` are deleted, other remote files are left alone. `private` counts when the repo is
    created; without it the namespace's default does. With `create_pr`, an open pull request of the user's with the same
    message is gone on with. `tag` names the commit. Raises InputError for what the user or the Hub refuses, CheckFailed
    if a file did not arrive.
    """
    found = checked(repo_id, files, revision, create_pr, tag)
    with hub_errors(repo_id, revision):
        check_token(repo_id)
        api = HfApi()
        to_do = compared(api, repo_id, found, private, revision, create_pr, tag, kind, message)
        plan = to_do.plan
        if not plan.is_done:
            tell(redacted(plan.summary))
        if to_do.remote is None:
            remote = created(api, repo_id, private, kind)
            has_branch = revision is None
        else:
            remote, has_branch = to_do.remote, to_do.remote.has_branch
        if revision is not None and not has_branch:
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        done = _Commit(remote.commit, plan.pull_request)
        if not plan.is_done:
            opens = create_pr and to_do.pull_request is None
            commit = _open_pull_request if opens else _commit
            done = commit(api, to_do, remote.commit, message)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=done.commit, repo_type=kind, exist_ok=True)
            if tagged(api, repo_id, tag, kind) != done.commit:
                raise CheckFailed(
                    f"{repo_id}: the tag {tag} is not at the commit {done.commit}: push again, or set it there"
                )
    return PushResult(page_of(repo_id, kind), done.commit, done.pull_request, plan)


def _commit(api: HfApi, to_do: Compared, parent: str | None, message: str) -> _Commit:
    """Commit to the plan's branch. Raises InputError if it is not on `parent` any more."""
    plan = to_do.plan
    try:
        # Not upload_folder: with hf_xet it may split a push over several commits, and it skips some folders silently.
        commit = api.create_commit(
            plan.repo_id,
            _operations(plan.changes, to_do.files),
            commit_message=message,
            repo_type=plan.kind,
            revision=plan.revision,
            parent_commit=parent,
        ).oid
    except Exception as error:
        if not is_conflict(error):
            raise
        # Somebody else's; or our own, whose answer was lost before the same was asked for again.
        head = read_branch(api, plan.repo_id, plan.revision, plan.kind)
        if head is None or head.commit is None or _differing(to_do, head.commit, api):
            said = f"{last_commit(api, plan.repo_id, head.commit, plan.kind)}" if head and head.commit else "it is gone"
            raise InputError(
                f"{plan.repo_id} got another commit during the push ({one_line(said, 100)}): look at the new plan "
                "with --dry-run, then push again"
            ) from error
        return _Commit(head.commit, plan.pull_request)
    _check_arrived(api, to_do, commit)
    return _Commit(commit, plan.pull_request)


def _open_pull_request(api: HfApi, to_do: Compared, parent: str | None, message: str) -> _Commit:
    """Open one, and only one: where the answer is lost, look for it first."""
    plan = to_do.plan
    for left in reversed(range(_TRIES)):
        try:
            info = api.create_commit(
                plan.repo_id,
                _operations(plan.changes, to_do.files),
                commit_message=message,
                repo_type=plan.kind,
                create_pr=True,
                parent_commit=parent,
            )
        except patience.Unreachable:
            found = open_pull_request(api, plan.repo_id, message, plan.kind)
            if found is not None and not _differing(to_do, found.branch, api):
                head = read_branch(api, plan.repo_id, found.branch, plan.kind)
                return _Commit(head.commit if head else None, found.url)
            if not left:
                raise
            time.sleep(patience.FIRST_WAIT_SECONDS)
            continue
        if info.pr_revision is None:  # main had got the very same meanwhile
            return _Commit(info.oid)
        _check_arrived(api, to_do, info.pr_revision)
        return _Commit(info.oid, info.pr_url)
    raise AssertionError("the last try returns or raises")


def _operations(changes: Iterable[FileChange], files: Files) -> list[CommitOperationAdd | CommitOperationDelete]:
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for change in changes:
        if change.action == "delete":
            operations.append(CommitOperationDelete(change.path, is_folder=False))
        elif change.action != "same":
            operations.append(CommitOperationAdd(change.path, files[change.path]))
    return operations


def _differing(to_do: Compared, revision: str, api: HfApi) -> list[str]:
    """The paths in which a revision is not what was to be pushed."""
    plan = to_do.plan
    remote = read_branch(api, plan.repo_id, revision, plan.kind)
    changes = changes_of(to_do.files, remote.files if remote else {}, plan.kind)
    return [change.path for change in changes if change.action != "same"]


def _check_arrived(api: HfApi, to_do: Compared, revision: str) -> None:
    """Raises CheckFailed if the commit is not the files: the Hub silently drops what the repo's .gitignore names."""
    missing = _differing(to_do, revision, api)
    if missing:
        raise CheckFailed(
            f"{to_do.plan.repo_id}@{revision} was committed without the local {', '.join(missing)}: "
            "remove the repo's .gitignore if it names them, then push again"
        )
