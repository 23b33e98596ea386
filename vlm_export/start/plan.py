"""All stages of a conversion as they are told before the first begins, and what can be known by then to stop one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_export import hub, ready
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.machine import available_memory, free_disk
from vlm_export.quantize.estimate import Estimate, check_memory
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.start.draft import Draft, Wishes, reference_for
from vlm_export.start.figures import number, size
from vlm_export.start.inspection import Checkpoint, open_checkpoint
from vlm_export.start.named import find
from vlm_export.start.recipe_text import write_recipe
from vlm_export.start.timing import about, times
from vlm_export.targets import UNASKED, ClientTarget, Target
from vlm_export.wanted import Wanted, parse
from vlm_export.web import chromium, node_runtime

_NPM_BYTES = 485_000_000  # of the packages that `node/package-lock.json` pins
_RUNTIMES = {"ort": "ONNX Runtime", "node": "Node", "wasm": "Chromium on WASM", "webgpu": "Chromium on WebGPU"}


@dataclass(frozen=True)
class Run:
    """How to convert.

    Attributes:
        quantize: what to write in place of the recipe's dtypes, as it was typed.
        runtimes: where to verify, in place of `targets.UNASKED`.
        push_to: a Hub id, or None to stop before.
        private: whether a new repo is private.
        work: the work folder, if it was named.
        again: whether to run stages, too, of which nothing changed.
    """

    quantize: tuple[str, ...] = ()
    runtimes: tuple[Target, ...] = ()
    push_to: str | None = None
    private: bool = False
    work: Path | None = None
    again: bool = False

    @property
    def wanted(self) -> Wanted | None:
        """The dtypes in place of the recipe's; None leaves them to it.

        Raises:
            InputError: a dtype that there is none of.
        """
        return parse(self.quantize, "--quantize") if self.quantize else None

    def options(self) -> str:
        """What was typed, with a space before each option."""
        values = [("--quantize", each) for each in self.quantize]
        values += [("--runtime", each) for each in self.runtimes]
        values += [("--push", self.push_to)] if self.push_to else []
        values += [("--work", str(self.work))] if self.work else []
        return (
            "".join(f" {name} {shlex.quote(value)}" for name, value in values)
            + " --private" * self.private
            + " --again" * self.again
        )


@dataclass(frozen=True)
class Stage:
    """A stage: the command that does it alone, what it does, and what it takes."""

    command: str
    does: str
    takes: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be done; `expected` is of the export, and None where that is known only once it is merged."""

    recipe: RecipeFile
    work: Work
    run: Run
    stages: tuple[Stage, ...]
    expected: Estimate | None


def recipe_of(draft: Draft, *, force: bool, notify: Callable[[str], None]) -> RecipeFile:
    """The recipe of a draft: written, or the one that is in its file if that is about the same model and adapters.

    Raises:
        InputError: the file holds a recipe about another model, or there are wishes that it may not grant.
    """
    path = draft.wishes.path
    if path.exists() and not force:
        there = load_recipe(path)
        named = [there.recipe.model, *(adapter.path for adapter in there.recipe.adapters)]
        if named == [reference_for(source, path) for source in draft.sources]:
            check_unchanged(path, draft.wishes)
            notify(f"{path}: is there, and used as it stands; --force writes it anew")
            return there
    recipe = write_recipe(draft, force=force)
    notify(f"{path}: written; what is in it can be edited, and is used by the next `vlm-export convert`")
    return recipe


def check_unchanged(path: Path, wishes: Wishes) -> None:
    """Raises InputError for wishes about a recipe that is there: it says itself what they are about."""
    if given := wishes.options():
        raise InputError(
            f"{path}: is there, and {', '.join(given)} would change it: edit it, or name a checkpoint and --force"
        )


def model_of(recipe: RecipeFile, notify: Callable[[str], None]) -> Checkpoint | None:
    """The model that a recipe names; None where its own code says what it is.

    Raises:
        InputError: there is no such model, or of no family.
    """
    if recipe.recipe.trust_remote_code:
        return None
    local = recipe.local(recipe.recipe.model)
    return open_checkpoint(find(str(local) if local else recipe.recipe.model, notify))


def plan(recipe: RecipeFile, work: Work, model: Checkpoint | None, run: Run) -> Plan:
    """The stages of a conversion.

    Raises:
        InputError: what can be told before: a layout or a component that the model has not, too little disk or memory,
            a program that `verify` starts and that is missing, or no token to push with.
    """
    wanted = run.wanted or parse(recipe.recipe.dtypes, f"{recipe.path}: dtypes")
    expected = _expected(recipe, model, wanted)
    runtimes = _runtimes(recipe, run.runtimes)
    if model is not None and expected is not None:
        _check_machine(work.root, expected, model.merged_bytes)
    _check_programs(runtimes)
    if run.push_to is not None:
        _check_push(run.push_to)
    return Plan(recipe, work, run, tuple(_stages(recipe, work, model, expected, runtimes, run)), expected)


def lines(plan: Plan) -> list[str]:
    """The plan as lines for people."""
    rows = [(f"{place}", stage.command, stage.does, stage.takes) for place, stage in enumerate(plan.stages, start=1)]
    widest = max(len(row[1]) for row in rows)
    source = "the bundled recipe" if plan.recipe.is_bundled else plan.recipe.path
    return [
        f"converting {plan.recipe.name} by {source}, in {plan.work.root}:",
        *(
            f"  {place}  {command:{widest}}  {does}{f'; {takes}' if takes else ''}"
            for place, command, does, takes in rows
        ),
    ]


def _expected(recipe: RecipeFile, model: Checkpoint | None, wanted: Wanted) -> Estimate | None:
    if model is None:
        return None
    layout = recipe.recipe.layout
    if layout not in model.layouts:
        known = ", ".join(model.layouts)
        raise InputError(f"{recipe.path}: layout: {model.model_type} has no layout {layout!r}; it has {known}")
    return model.expected(layout, wanted)


def _runtimes(recipe: RecipeFile, asked: Sequence[Target]) -> Sequence[Target]:
    """Where `verify` will look, as it decides it itself."""
    able: Sequence[Target] = ("ort",) if recipe.recipe.layout == "components" else UNASKED
    return asked or able


def _check_machine(folder: Path, expected: Estimate, merged_bytes: int) -> None:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    needed, free = expected.disk_bytes + merged_bytes, free_disk(there)
    if needed > free:
        raise InputError(
            f"{folder}: needs {size(needed)} of disk, and {size(free)} are free: free some, choose another --work, or "
            "fewer dtypes"
        )
    check_memory(expected, available_memory())


def _check_programs(runtimes: Sequence[Target]) -> None:
    if set(runtimes) - {"ort"}:
        node_runtime.find_node()
    if {"wasm", "webgpu"}.intersection(runtimes):
        chromium.find_chromium()


def _check_push(repo_id: str) -> None:
    if repo_id.count("/") != 1:
        raise InputError(f"--push {repo_id}: not an id of the Hub: write namespace/name")
    if not hub.has_token():
        raise InputError(f"--push {repo_id}: no Hugging Face token to push with: {hub.LOGIN}")


def _stages(
    recipe: RecipeFile,
    work: Work,
    model: Checkpoint | None,
    expected: Estimate | None,
    runtimes: Sequence[Target],
    run: Run,
) -> Iterator[Stage]:
    needs = _times(recipe, model, expected, runtimes)
    golden, merge, verify = (f", {about(each)}" if each is not None else "" for each in needs)
    yield Stage("golden", "records what PyTorch says of the golden images", f"in {recipe.golden_target}{golden}")
    merged = f"{size(model.merged_bytes)} in {work.merged}" if model else f"in {work.merged}"
    yield Stage("merge", _merges(recipe, model), f"{merged}{merge}")
    if expected is None:
        yield Stage("onnx", "traces, simplifies and quantizes", f"in {work.repo}")
    else:
        memory = max(expected.memory_bytes, expected.calibration_memory_bytes)
        files = f"writes {len(expected.files)} graphs, {size(expected.size_bytes)}"
        yield Stage("onnx", files, f"{size(memory)} of memory, {about(expected.seconds)}, and tracing once")
    takes = ", ".join(filter(None, (_installs(runtimes), verify.removeprefix(", "))))
    yield Stage("verify", f"compares in {' and '.join(_RUNTIMES[each] for each in runtimes)}", takes)
    if run.push_to is not None:
        yield Stage("push", f"to {run.push_to}, if every check passes")


def _times(
    recipe: RecipeFile, model: Checkpoint | None, expected: Estimate | None, runtimes: Sequence[Target]
) -> tuple[float | None, float | None, float | None]:
    """Seconds of golden, merge and verify; None where nothing is known of the model."""
    if model is None or expected is None:
        return None, None, None
    dtypes = {file.dtype for file in expected.files}
    found = times(model.parameters, len(ready.images(recipe)), len(dtypes), runtimes)
    return found.golden, found.merge, found.verify


def _merges(recipe: RecipeFile, model: Checkpoint | None) -> str:
    count = len(recipe.recipe.adapters)
    what = f"{count} adapter{'s' * (count > 1)}" if count else "no adapter"
    if model is None:
        return f"merges {what}"
    if not count and model.lora:
        what = "the LoRA inside"
    return f"merges {what} into {number(model.parameters)} parameters"


def _installs(runtimes: Sequence[Target]) -> str:
    clients: set[ClientTarget] = {"node", "wasm", "webgpu"}
    if clients.isdisjoint(runtimes) or node_runtime.home_of().is_dir():
        return ""
    return f"installs npm packages first, {size(_NPM_BYTES)}, once"
