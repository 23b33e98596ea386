"""The repo to the Hub: only as it was verified. Needs neither PyTorch nor transformers."""

from __future__ import annotations

from importlib.metadata import version

from vlm_export import hub
from vlm_export.documents import load_document
from vlm_export.errors import CheckFailed
from vlm_export.files import Work, file_hashes
from vlm_export.manifest import load_manifest
from vlm_export.publish.findings import REPORT
from vlm_export.recipe import RecipeFile
from vlm_export.verify.report import Report


def check_verified(work: Work) -> None:
    """Raises CheckFailed unless a passing report exists for exactly the files of `repo/`."""
    path = work.report / REPORT
    if not path.is_file():
        raise CheckFailed(f"{work.repo}: not verified yet: run `vlm-export verify`, or push with --allow-unverified")
    report = load_document(path, Report, "run `vlm-export verify` again")
    if report.verdict != "pass" or not report.checks:
        raise CheckFailed(f"{path}: the verdict is {report.verdict}: mend it, or push with --allow-unverified")
    verified = report.verified_dtypes
    if missing := [dtype for dtype in load_manifest(work.repo).verified if dtype not in verified]:
        raise CheckFailed(
            f"{path}: says nothing of {', '.join(missing)}: run `vlm-export verify` without --dtype, or push with "
            "--allow-unverified"
        )
    hashes, seen = file_hashes(work.repo), report.files_sha256
    changed = sorted(name for name in hashes.keys() | seen.keys() if hashes.get(name) != seen.get(name))
    if changed:
        raise CheckFailed(
            f"{path}: is about other files than {work.repo} holds ({', '.join(changed[:3])}): "
            "run `vlm-export verify` again, or push with --allow-unverified"
        )


def run_plan(work: Work, repo_id: str, *, revision: str | None) -> hub.PushPlan:
    """What a push would change."""
    load_manifest(work.repo)
    return hub.plan_push(repo_id, work.repo, revision=revision)


def run_push(
    recipe: RecipeFile,
    work: Work,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    allow_unverified: bool,
) -> hub.PushResult:
    """Upload `repo/`, which must be verified as it stands."""
    load_manifest(work.repo)
    if not allow_unverified:
        check_verified(work)
    message = f"Export {recipe.name} with vlm-export {version('vlm-export')}"
    return hub.push_folder(repo_id, work.repo, private=private, revision=revision, create_pr=create_pr, message=message)
