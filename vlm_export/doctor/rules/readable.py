"""Contract §1, §6.1: every file that a client reads is there as a whole, and within the repo's folder."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView


def check(repo: RepoView) -> Iterator[Finding]:
    """Find JSON and graphs that are damaged, pointers of Git LFS, links that lead out."""
    for file, problem in repo.damaged.items():
        fix = "fetch the files themselves: git lfs pull" if "Git LFS" in problem else "put a whole file in its place"
        yield error(file, problem, fix)
