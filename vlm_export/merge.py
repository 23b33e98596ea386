"""Merge LoRA adapters into plain weights, and prove that the merged model is the adapted one.

Steps: match every tensor of checkpoint and adapters with the model (all that does not match is reported at once),
stream the tensors through `W + Σ scale · B A` in float32 into `merged/`, then compare the logits of the merged model
with those of base + adapter run by PEFT. The only module that imports peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vlm_export.artifacts import replaced_folder, write_json
from vlm_export.checkpoint import (
    WEIGHTS,
    Checkpoint,
    LoraPair,
    TensorRef,
    aliases,
    build_empty,
    load_tensors,
    open_checkpoint,
    pair_lora,
    read_json,
    sha256,
    stored_tensors,
)
from vlm_export.errors import CheckFailed, InputError
from vlm_export.processing import copy_tokenizer
from vlm_export.tensor_file import Entry, write_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_DIFF_VS_ADAPTER = 1e-4  # logits; float32 sums in another order differ by about 1e-6 of their size
MIN_DIFF_VS_BASE = 1e-3  # an adapter that moves no logit by more than rounding does not matter
# Kinds that `W + scale · B A` does not describe: merging them as if it did would be silently wrong.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA bias",
}


@dataclass(frozen=True)
class Update:
    """`scale · B A` for one weight."""

    module: str
    pair: LoraPair
    scale: float

    def delta(self, *, transposed: bool) -> torch.Tensor:
        """float32, in the weight's own layout: `[out, in]`, or `[in, out]` for GPT-2's Conv1D."""
        delta = self.scale * (self.pair.b.load().float() @ self.pair.a.load().float())
        return delta.T if transposed else delta


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter folder, matched with the model: LoRA updates, replaced parameters, and where PEFT attaches it."""

    path: Path
    root: str
    updates: tuple[Update, ...]
    replaced: Mapping[str, TensorRef]


@dataclass(frozen=True)
class MergeReport:
    """`merge.json`. Without an adapter there is nothing to prove, and no differences."""

    adapter_tensors: int
    unused: list[str]
    layers: dict[str, float]  # module → ‖ΔW‖ / ‖W‖
    tied: dict[str, str]
    inputs_sha256: dict[str, str]
    parameters: int
    max_abs_diff_vs_adapter: float | None
    max_abs_diff_vs_base: float | None
    schema: int = 1


@dataclass
class _Merge:
    """What one merge needs to know of the model: filled by `_match`, read by the rest."""

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    updates: dict[str, list[Update]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)


def merge(
    path: Path, adapter_paths: Sequence[Path], out: Path, *, on_tensor: Callable[[int, int], None] | None = None
) -> MergeReport:
    """Write the plain checkpoint of `path` with its own and the given adapters merged, in order, to the folder `out`.

    Raises:
        InputError: tensors are missing, left over, of the wrong shape, not finite, or an adapter changes nothing.
        CheckFailed: the merged model does not compute what PEFT computes with the adapter attached.
    """
    checkpoint = open_checkpoint(path)
    adapters = _open_adapters(checkpoint, adapter_paths)
    job = _match(checkpoint, adapters)
    with replaced_folder(out) as folder:
        layers = _stream(job, folder / WEIGHTS, on_tensor)
        write_json(folder / "config.json", checkpoint.family.merged_config(checkpoint.config))
        copy_tokenizer(checkpoint.path, folder)
        versus_adapter, versus_base = _prove(job, folder)
        report = MergeReport(
            adapter_tensors=sum(2 * len(updates) for updates in job.updates.values())
            + sum(len(adapter.replaced) for adapter in adapters),
            unused=list(checkpoint.unused),
            layers=layers,
            tied=aliases(build_empty(checkpoint)),
            inputs_sha256=input_hashes(path, adapter_paths),
            parameters=sum(math.prod(ref.shape) for ref in job.tensors.values()),
            max_abs_diff_vs_adapter=versus_adapter,
            max_abs_diff_vs_base=versus_base,
        )
        write_json(folder / "merge.json", asdict(report))
    return report


def attach(path: Path, adapter_paths: Sequence[Path]) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint's PyTorch model in float32 with its adapters attached by PEFT and nothing merged.

    Raises:
        InputError: as `merge`.
    """
    checkpoint = open_checkpoint(path)
    job = _match(checkpoint, _open_adapters(checkpoint, adapter_paths))
    return checkpoint, _attached(job)


def _match(checkpoint: Checkpoint, adapters: tuple[Adapter, ...]) -> _Merge:
    """Match every tensor with a parameter; list everything that is wrong, not the first."""
    job = _Merge(checkpoint, adapters)
    model = build_empty(checkpoint)
    shared = aliases(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    job.transposed = {name for name, module in modules.items() if isinstance(module, Conv1D)}
    problems = []
    for name, ref in checkpoint.tensors.items():
        canonical = shared.get(name, name)
        if canonical not in shapes:
            problems.append(f"{ref}: no such tensor in a {checkpoint.family.model_type} of this config")
        elif canonical in job.tensors and not torch.equal(job.tensors[canonical].load(), ref.load()):
            problems.append(f"{ref}: differs from {job.tensors[canonical].key}, which the config ties to it")
        elif ref.shape != shapes[canonical]:
            problems.append(f"{ref}: shape {list(ref.shape)}, the config says {list(shapes[canonical])}")
        else:
            job.tensors[canonical] = ref
    problems += [f"{checkpoint.path.name}: tensor {name} is missing" for name in shapes if name not in job.tensors]
    for update in [*_embedded_updates(checkpoint), *(update for adapter in adapters for update in adapter.updates)]:
        weight = f"{update.module}.weight"
        problem = _misfit(update, shapes.get(shared.get(weight, weight)), modules.get(update.module), job.transposed)
        if problem:
            problems.append(problem)
        elif weight in shared or weight in shared.values():
            problems.append(f"{update.pair.a}: adapts {update.module}, which is tied; untie the base model first")
        job.updates.setdefault(weight, []).append(update)
    for adapter in adapters:
        for name, ref in adapter.replaced.items():
            if shapes.get(name) != ref.shape:
                problems.append(f"{ref}: replaces {name} of shape {shapes.get(name)} by one of shape {ref.shape}")
            job.tensors[name] = ref
    _check_values(job, problems)
    if problems:
        raise InputError(_all(problems))
    return job


def _misfit(
    update: Update, shape: tuple[int, ...] | None, module: nn.Module | None, transposed: set[str]
) -> str | None:
    if shape is None or module is None:
        return f"{update.pair.a}: adapts {update.module}, which the model does not have"
    if not isinstance(module, nn.Linear | Conv1D):
        return f"{update.pair.a}: adapts a {type(module).__name__}; only linear layers can be merged"
    delta = (update.pair.b.shape[0], update.pair.a.shape[1])
    wanted = shape[::-1] if update.module in transposed else shape
    if delta != wanted:
        return f"{update.pair.b}: B @ A is {list(delta)}, {update.module}.weight is {list(wanted)}"
    return None


def _check_values(job: _Merge, problems: list[str]) -> None:
    """NaN, Inf, and adapters that change nothing."""
    for updates in job.updates.values():
        for update in updates:
            for ref in (update.pair.a, update.pair.b):
                if not torch.isfinite(ref.load()).all():
                    problems.append(f"{ref}: holds NaN or Inf")
    groups: dict[Path, list[Update]] = {}
    for updates in job.updates.values():
        for update in updates:
            groups.setdefault(update.pair.b.file, []).append(update)
    for group in groups.values():
        if not any(update.pair.b.load().any() and update.pair.a.load().any() for update in group):
            names = ", ".join(update.pair.b.key for update in group[:2])
            problems.append(f"{group[0].pair.b.file}: the adapter changes nothing, every lora_B is zero ({names}, …)")


def _all(problems: list[str], shown: int = 5) -> str:
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + rest


def _embedded_updates(checkpoint: Checkpoint) -> list[Update]:
    if not checkpoint.lora:
        return []
    settings = checkpoint.family.embedded_lora(checkpoint.config)
    if settings is None:
        raise InputError(f"{checkpoint.path / 'config.json'}: no lora_r and lora_alpha, but there are LoRA tensors")
    for pair in checkpoint.lora.values():
        if pair.a.shape[0] != settings.r:
            raise InputError(f"{pair.a}: rank {pair.a.shape[0]}, config.json: lora_r is {settings.r}")
    return [Update(module, pair, settings.alpha / settings.r) for module, pair in checkpoint.lora.items()]


def _open_adapters(checkpoint: Checkpoint, paths: Sequence[Path]) -> tuple[Adapter, ...]:
    modules = {name for name, _ in build_empty(checkpoint).named_modules()}
    return tuple(_open_adapter(path, checkpoint, modules) for path in paths)


def _open_adapter(path: Path, checkpoint: Checkpoint, modules: set[str]) -> Adapter:
    """Read a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) and find where it attaches."""
    config_file = path / "adapter_config.json"
    config = read_json(config_file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{config_file}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    for key, kind in _UNSUPPORTED.items():
        if config.get(key):
            raise InputError(f"{config_file}: {key}: {kind} cannot be merged by this version")
    tensors = {key.removeprefix("base_model.model."): ref for key, ref in stored_tensors(path, ADAPTER_WEIGHTS).items()}
    lora = pair_lora({key: ref for key, ref in tensors.items() if ".lora_" in key})
    replaced = {key: ref for key, ref in tensors.items() if ".lora_" not in key}
    root = next(
        (root for root in checkpoint.family.adapter_roots if all(root + module in modules for module in lora)), None
    )
    if root is None:
        unknown = [module for module in lora if not any(r + module in modules for r in checkpoint.family.adapter_roots)]
        named = ", ".join(unknown[:3]) or next(iter(lora))
        raise InputError(f"{path / ADAPTER_WEIGHTS}: adapts {named}, which the base model does not have")
    updates = tuple(Update(root + module, pair, _scale(module, config, pair)) for module, pair in lora.items())
    return Adapter(path, root, updates, {root + key: ref for key, ref in replaced.items()})


def _scale(module: str, config: Mapping[str, Any], pair: LoraPair) -> float:
    """`alpha / r`, or `alpha / √r` for rsLoRA; either may have a pattern for this module (PEFT `get_pattern_key`)."""

    def matching(patterns: Mapping[str, float], default: float) -> float:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = matching(config.get("rank_pattern") or {}, config["r"])
    alpha = matching(config.get("alpha_pattern") or {}, config["lora_alpha"])
    if pair.a.shape[0] != rank:
        raise InputError(f"{pair.a}: rank {pair.a.shape[0]}, adapter_config.json says {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _stream(job: _Merge, target: Path, on_tensor: Callable[[int, int], None] | None) -> dict[str, float]:
    """Write every parameter, one in memory at a time. Returns ‖ΔW‖ / ‖W‖ by module."""
    ratios: dict[str, float] = {}
    done = 0

    def merged(name: str, ref: TensorRef) -> torch.Tensor:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(done, len(job.tensors))
        weight = ref.load()
        if not torch.isfinite(weight).all():
            raise InputError(f"{ref}: holds NaN or Inf")
        for update in job.updates.get(name, ()):
            delta = update.delta(transposed=update.module in job.transposed)
            ratios[update.module] = float(delta.norm() / weight.float().norm())
            weight = weight.float() + delta
        return weight

    def entry(name: str, ref: TensorRef) -> Entry:
        return Entry(ref.dtype, ref.shape, lambda: merged(name, ref))

    write_tensors(target, {name: entry(name, ref) for name, ref in sorted(job.tensors.items())})
    return ratios


def _attached(job: _Merge) -> nn.Module:
    """Base weights, and the adapters put on by PEFT itself: an account of the adapter that is not ours."""
    checkpoint = job.checkpoint
    model = load_tensors(build_empty(checkpoint), {**job.tensors, **_base_tensors(job)})
    if checkpoint.lora:
        settings = checkpoint.family.embedded_lora(checkpoint.config)
        assert settings is not None
        config = peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=sorted(checkpoint.lora))
        peft.inject_adapter_in_model(config, model)
        state = {
            f"{module}.lora_{part}.default.weight": ref.load().float()
            for module, pair in checkpoint.lora.items()
            for part, ref in (("A", pair.a), ("B", pair.b))
        }
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, unexpected
    for index, adapter in enumerate(job.adapters):
        target = model.get_submodule(adapter.root.rstrip(".")) if adapter.root else model
        wrapped = peft.PeftModel.from_pretrained(target, str(adapter.path), adapter_name=f"adapter_{index}")
        if index + 1 < len(job.adapters):
            wrapped.merge_and_unload()
    return model.eval().requires_grad_(False)


def _base_tensors(job: _Merge) -> dict[str, TensorRef]:
    """What an adapter replaces, as the base has it."""
    shared = aliases(build_empty(job.checkpoint))
    return {shared.get(name, name): ref for name, ref in job.checkpoint.tensors.items()}


def _prove(job: _Merge, folder: Path) -> tuple[float | None, float | None]:
    """The largest differences of merged logits from attached and from base, on the same seeded random inputs."""
    if not job.updates and not any(adapter.replaced for adapter in job.adapters):
        return None, None
    merged = open_checkpoint(folder)
    family, config = job.checkpoint.family, job.checkpoint.config
    inputs = family.sample_inputs(config, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = load_tensors(build_empty(merged), merged.tensors)(*inputs)
        base = load_tensors(build_empty(job.checkpoint), {**job.tensors, **_base_tensors(job)})(*inputs)
        adapted = _attached(job)(*inputs)
    versus_adapter, versus_base = float((ours - adapted).abs().max()), float((ours - base).abs().max())
    if not versus_adapter <= MAX_DIFF_VS_ADAPTER:
        raise CheckFailed(
            f"{folder.parent.name}: merged logits differ from base + adapter by {versus_adapter:.2e} "
            f"(limit {MAX_DIFF_VS_ADAPTER:.0e}): the merge is wrong, nothing was written"
        )
    if not versus_base >= MIN_DIFF_VS_BASE:
        raise CheckFailed(
            f"{folder.parent.name}: merged logits differ from the base model's by {versus_base:.2e} only: "
            "the adapter has no effect, nothing was written"
        )
    return versus_adapter, versus_base


def input_hashes(path: Path, adapter_paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of everything that a merge reads, by `<folder>/<file>`."""
    files = [path / "config.json", *sorted(path.glob("model*.safetensors"))]
    for adapter in adapter_paths:
        files += [adapter / "adapter_config.json", *sorted(adapter.glob("adapter_model*.safetensors"))]
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in files}
