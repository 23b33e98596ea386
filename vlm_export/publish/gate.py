"""The repo to the Hub: only as it was verified. Needs neither PyTorch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_export import hub
from vlm_export.documents import front_matter, load_document
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import Work, file_hashes
from vlm_export.manifest import load_manifest
from vlm_export.own_files import own_file
from vlm_export.publish import licence
from vlm_export.publish.addresses import CARD, readdressed, with_link
from vlm_export.publish.local_paths import leaks
from vlm_export.recipe import RecipeFile
from vlm_export.typed import command
from vlm_export.verify.report import REPORT, Report


def check_verified(work: Work) -> None:
    """Raises CheckFailed unless a passing report exists for exactly the files of `repo/`."""
    path = work.report / REPORT
    if own_file(path.parent, path.name) is None:
        raise CheckFailed(f"{work.repo}: not verified yet: run `{command('verify')}`, or push with --allow-unverified")
    report = load_document(path, Report, f"run `{command('verify')}` again")
    if report.verdict != "pass" or not report.checks:
        raise CheckFailed(f"{path}: the verdict is {report.verdict}: mend it, or push with --allow-unverified")
    verified = report.verified_dtypes
    if missing := [dtype for dtype in load_manifest(work.repo).verified if dtype not in verified]:
        raise CheckFailed(
            f"{path}: says nothing of {', '.join(missing)}: run `{command('verify')}` without --dtype, or push with "
            "--allow-unverified"
        )
    hashes, seen = file_hashes(work.repo), report.files_sha256
    changed = sorted(name for name in hashes.keys() | seen.keys() if hashes.get(name) != seen.get(name))
    if changed:
        raise CheckFailed(
            f"{path}: is about other files than {work.repo} holds ({', '.join(changed[:3])}): "
            f"run `{command('verify')}` again, or push with --allow-unverified"
        )


@dataclass(frozen=True)
class Destination:
    """Where a push goes.

    Attributes:
        repo_id: of the Hub.
        private: whether a repo that is not there yet is made so.
        revision: the branch, else main.
        create_pr: whether a pull request is opened in place of a commit, or an open one gone on with.
        has_space: whether its card links to a Space of the same name.
        tag: what the commit is called.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    has_space: bool = False
    tag: str | None = None


@dataclass(frozen=True)
class Allowed:
    """What a push does not refuse, since its user says so."""

    unverified: bool = False
    unlicensed: bool = False


def run_plan(recipe: RecipeFile, work: Work, to: Destination, allowed: Allowed = Allowed()) -> hub.PushPlan:
    """What `run_push` would change, after all that it refuses before it uploads. Without the Hub, what it would send.

    Raises:
        InputError, CheckFailed: as `run_push` does.
    """
    return plan(_files(recipe, work, to, allowed), to, message_of(recipe))


def plan(files: hub.Files, to: Destination, message: str, kind: hub.Kind = "model") -> hub.PushPlan:
    """What a push of these files would change; where the Hub cannot be asked what it has, what would be sent.

    Raises:
        InputError: there is no token, or what the Hub would refuse.
    """
    hub.check_token(to.repo_id)
    options: dict[str, Any] = {"revision": to.revision, "kind": kind}
    try:
        return hub.plan_push(
            to.repo_id,
            files,
            private=to.private,
            create_pr=to.create_pr,
            tag=_tag(to, kind),
            message=message,
            **options,
        )
    except hub.Unreachable as error:
        return hub.plan_unseen(to.repo_id, files, str(error), **options)


def run_push(recipe: RecipeFile, work: Work, to: Destination, allowed: Allowed = Allowed()) -> hub.PushResult:
    """Upload `repo/`, which must be verified as it stands. The card gets the id that it is pushed to.

    Raises:
        CheckFailed: it is not verified, or names folders of this machine; or a file did not arrive.
        InputError: it has no licence; or what the Hub refuses.
    """
    return push(_files(recipe, work, to, allowed), to, message_of(recipe))


def push(files: hub.Files, to: Destination, message: str, kind: hub.Kind = "model") -> hub.PushResult:
    """Upload files as they are; raises as `run_push` does."""
    return hub.push_folder(
        to.repo_id,
        files,
        private=to.private,
        revision=to.revision,
        create_pr=to.create_pr,
        tag=_tag(to, kind),
        kind=kind,
        message=message,
    )


def _tag(to: Destination, kind: hub.Kind) -> str | None:
    """The model's; its Space shows what is newest."""
    return to.tag if kind == "model" else None


def message_of(recipe: RecipeFile) -> str:
    """The commit's message."""
    return f"Export {recipe.name} with vlm-export {version('vlm-export')}"


def _files(recipe: RecipeFile, work: Work, to: Destination, allowed: Allowed) -> hub.Files:
    """What is uploaded, after every check of it."""
    load_manifest(work.repo)
    files: dict[str, Path | bytes] = {**hub.folder_files(work.repo)}
    if not allowed.unverified:
        check_verified(work)
    card = work.repo / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if CARD in files else ""
    if not allowed.unlicensed and licence.is_missing(front_matter(text)):
        raise InputError(
            f"{card}: {licence.NO_LICENCE}, and run `{command('verify')}` again, which writes it into the card; "
            "or push with --allow-unlicensed"
        )
    if found := next(leaks(work.repo, recipe, work.root), None):
        raise CheckFailed(f"{work.repo / found[0]}: names {found[1]}, a folder of this machine: say it in other words")
    published = readdressed(text, to.repo_id)
    if to.has_space:
        published = with_link(published, hub.page_of(to.repo_id, "space"))
    return files | ({CARD: published.encode()} if text else {})
