"""A branch, a pull request and a tag as the Hub has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from vlm_export.errors import InputError, shown
from vlm_export.hub.user import name_of

Kind = Literal["model", "space"]
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")


@dataclass(frozen=True)
class Remote:
    """A branch as the Hub has it; with `has_branch` false, `main`, from which the branch will start."""

    commit: str | None
    private: bool
    has_branch: bool
    files: Mapping[str, RepoFile]


@dataclass(frozen=True)
class PullRequest:
    """An open one: the branch that its commits are on, and its page."""

    branch: str
    url: str


def page_of(repo_id: str, kind: Kind = "model") -> str:
    """The address of a repo's page."""
    return f"{constants.ENDPOINT}/{'spaces/' if kind == 'space' else ''}{repo_id}"


def read_branch(api: HfApi, repo_id: str, revision: str | None, kind: Kind) -> Remote | None:
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
    return Remote(info.sha, bool(info.private), has_branch, files)


def created(api: HfApi, repo_id: str, private: bool, kind: Kind) -> Remote:
    """The main branch of a repo that was not there yet. Raises InputError if the token does not see it then."""
    sdk = "static" if kind == "space" else None
    api.create_repo(repo_id, private=private or None, repo_type=kind, space_sdk=sdk, exist_ok=True)
    remote = read_branch(api, repo_id, None, kind)
    if remote is None:
        raise InputError(f"{repo_id} exists but the token may not see it: use a token with access to it")
    return remote


def open_pull_request(api: HfApi, repo_id: str, title: str, kind: Kind) -> PullRequest | None:
    """The newest open pull request of the user's of that title; None where there is none."""
    found = api.get_repo_discussions(
        repo_id, repo_type=kind, author=name_of(api), discussion_type="pull_request", discussion_status="open"
    )
    ours = [each for each in found if each.title == title and each.git_reference]
    newest = max(ours, key=lambda each: each.num, default=None)
    return PullRequest(str(newest.git_reference), newest.url) if newest else None


def check_tag(api: HfApi, repo_id: str, tag: str, commit: str | None, kind: Kind) -> None:
    """Raises InputError unless the tag can be set to `commit`, or to one that is not there yet if that is None."""
    found = tagged(api, repo_id, tag, kind)
    if found is not None and found != commit:
        raise InputError(f"{repo_id}: --tag {tag}: is at commit {found[:12]} already: choose another")


def tagged(api: HfApi, repo_id: str, tag: str, kind: Kind) -> str | None:
    """The commit that has a tag; None where there is no such tag."""
    refs = api.list_repo_refs(repo_id, repo_type=kind)
    return next((each.target_commit for each in refs.tags if each.name == tag), None)


def check_tag_name(repo_id: str, tag: str) -> None:
    """Raises InputError for what no tag is called."""
    if not _TAG.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise InputError(f"{repo_id}: --tag {shown(tag)}: no name of a tag: use letters, digits, '.', '-' and '_'")


def last_commit(api: HfApi, repo_id: str, commit: str, kind: Kind) -> str:
    """A commit in few words: its id, who made it, and its title."""
    newest = next(iter(api.list_repo_commits(repo_id, revision=commit, repo_type=kind)))
    return f"{commit[:12]} by {', '.join(newest.authors) or 'somebody'}: {newest.title}"
