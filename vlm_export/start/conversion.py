"""`vlm-export convert`: the stages of a plan, one after the other."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from vlm_export import hub, pipeline
from vlm_export.commands import Commands
from vlm_export.documents import load_document
from vlm_export.errors import InputError
from vlm_export.hub import PushResult
from vlm_export.manifest import Manifest, load_manifest
from vlm_export.merging.merge import MergeReport
from vlm_export.pipeline import Progress
from vlm_export.publish import gate
from vlm_export.publish.findings import PAGE
from vlm_export.start.plan import Plan
from vlm_export.start.stages import Options, Stages
from vlm_export.start.stages import Stage as StageName
from vlm_export.verify.causes import explain
from vlm_export.verify.golden import Golden, load_golden
from vlm_export.verify.report import Report

Made = TypeVar("Made")


@dataclass(frozen=True)
class Converted:
    """What each stage gave; `pushed` is None where nothing was to be pushed, or something failed before."""

    plan: Plan
    golden: Golden
    merged: MergeReport
    manifest: Manifest
    report: Report
    pushed: PushResult | None

    @property
    def passed(self) -> bool:
        """Whether every check of `verify` passed."""
        return self.report.verdict == "pass"

    @property
    def repo_id(self) -> str:
        """Where to push: as the recipe says, else to the token's user, else to somebody's name to fill in."""
        named = self.plan.recipe.recipe.hub.repo_id
        if named or not hub.has_token():
            return named or f"your-name/{self.plan.recipe.name}"
        try:
            return f"{hub.user_name()}/{self.plan.recipe.name}"
        except InputError:  # offline, where all else was done
            return f"your-name/{self.plan.recipe.name}"

    @cached_property
    def next(self) -> str:
        """The command to type next."""
        if self.pushed is not None:
            return f"vlm-export run {shlex.quote(str(self.plan.run.push_to))} photo.jpg"
        commands = Commands.of(self.plan.recipe, self.plan.work)
        if self.passed:
            return replace(commands, repo_id=self.repo_id).push()
        return commands.verify(" --bisect")

    def as_json(self) -> dict[str, Any]:
        """One object."""
        return {
            "recipe": str(self.plan.recipe.path),
            "path": str(self.plan.work.repo),
            "page": str(self.plan.work.report / PAGE),
            "stages": [asdict(stage) for stage in self.plan.stages],
            "verdict": self.report.verdict,
            "captions": {image.file: image.caption for image in self.golden.images},
            "merge": asdict(self.merged),
            "manifest": asdict(self.manifest),
            "table": [asdict(row) for row in self.report.table],
            "pushed": asdict(self.pushed) if self.pushed else None,
            "next": self.next,
        }

    def lines(self) -> list[str]:
        """What was made, where it is, what failed and why, and the next command."""
        failed = len(self.report.failures)
        told = f"{failed} check{'s' * (failed > 1)} failed"
        checks = f"all {len(self.report.checks)} checks passed" if self.passed else told
        commands = Commands.of(self.plan.recipe, self.plan.work)
        return [
            f"{self.plan.recipe.name}: {checks}",
            *explain(self.report, commands, self.manifest.mixed),
            f"repo    {self.plan.work.repo}",
            f"report  {self.plan.work.report / PAGE}",
            f"look    {commands.demo()}",
            *([f"pushed  {self.pushed.pull_request or self.pushed.url}"] if self.pushed else []),
            "",
            f"next: {self.next}",
        ]


def convert(plan: Plan, progress: Progress, notify: Callable[[str], None]) -> Converted:
    """Run the stages. What `verify` fails is not pushed.

    A stage that would be made of the same again is skipped, which `notify` is told, unless `plan.run.again` says
    otherwise.

    Raises:
        InputError, CheckFailed: as the stages do; what those before it made is kept.
    """
    with plan.work.alone():
        return _convert(plan, progress, notify)


def _convert(plan: Plan, progress: Progress, notify: Callable[[str], None]) -> Converted:
    recipe, work, run = plan.recipe, plan.work, plan.run
    stages = Stages(recipe, work, Options(wanted=run.wanted))

    def stage(name: str, do: Callable[[Progress], Made]) -> Made:
        """Run one, its name in front of what it shows, and tell how long it took."""
        started = time.monotonic()
        made = do(lambda what, done, total: progress(f"{name}: {what}", done, total))
        notify(f"{name}: done in {_duration(time.monotonic() - started)}")
        return made

    def needed(name: StageName, do: Callable[[Progress], object]) -> None:
        """Run a stage whose result is kept, if anything has changed since."""
        stages.run(name, lambda: stage(name, do), notify, again=run.again)

    needed("golden", lambda shown: pipeline.run_golden(recipe, shown))
    needed("merge", lambda shown: pipeline.run_merge(recipe, work, shown))
    merged = load_document(work.merge_report, MergeReport, f"run `{Commands.of(recipe, work).merge()}`")
    for warning in merged.warnings:
        notify(f"warning: {warning}")
    needed("onnx", lambda shown: pipeline.run_export(recipe, work, shown, wanted=run.wanted, notify=notify))
    report = stage(
        "verify",
        lambda shown: pipeline.run_verify(recipe, work, shown, runtimes=run.runtimes or None, reusing=not run.again),
    )
    if report.reused:
        notify(f"verify: unchanged since it passed: {', '.join(report.reused)}")
    golden = load_golden(recipe.golden_dir).facts
    pushed = None
    if run.push_to is not None and report.verdict == "pass":
        pushed = stage("push", lambda _: _push(plan, run.push_to))
    return Converted(plan, golden, merged, load_manifest(work.repo), report, pushed)


def _push(plan: Plan, repo_id: str | None) -> PushResult:
    assert repo_id is not None
    return gate.run_push(plan.recipe, plan.work, gate.Destination(repo_id, private=plan.run.private))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
