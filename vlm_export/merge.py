"""Merge LoRA adapters into plain weights, and prove that the merged model is the adapted one.

Steps: match every tensor of checkpoint and adapters with the model (all that does not match is reported at once),
stream the tensors through `W + Σ scale · B A` in float32 into `merged/`, then compare the logits of the merged model
with those of base + adapter run by PEFT. The only module that imports peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from vlm_export.processing import copy_processor
from vlm_export.tensor_file import DTYPES, Entry, write_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_DIFF_VS_ADAPTER = 1e-4  # logits; float32 sums in another order differ by about 1e-6 of their size
MIN_DIFF_VS_BASE = 1e-3  # an adapter that moves no logit by more than rounding does not matter
_HALF = ("F16", "BF16")
# Kinds that `W + scale · B A` does not describe: merging them as if it did would be silently wrong.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA bias",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
_INITS_THAT_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    """An adapter, matched with the model: a PEFT folder, or the LoRA tensors that a checkpoint itself holds.

    Attributes:
        source: the file that its settings come from.
        root: prefix of the submodule that PEFT attaches it to.
        replaced: the parameters that it brings along whole (`modules_to_save`, trained biases).
        unused: keys that the family says inference never reads.
    """

    source: Path
    config: peft.LoraConfig
    root: str
    updates: tuple[Update, ...]
    replaced: Mapping[str, TensorRef]
    unused: tuple[str, ...]


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
    """What one merge needs to know of the model: filled by `_open`, read by the rest.

    `base` and `tensors` are by parameter name, tied ones once: as the checkpoint has them, and as the adapters'
    replaced ones leave them. `updates` go onto `tensors`.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    tied: Mapping[str, str]
    transposed: set[str]
    base: dict[str, TensorRef] = field(default_factory=dict)
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    updates: dict[str, list[Update]] = field(default_factory=dict)

    def delta(self, name: str) -> torch.Tensor:
        """The sum of a parameter's updates, float32."""
        first, *others = (update.delta(transposed=update.module in self.transposed) for update in self.updates[name])
        return sum(others, start=first)

    def merged(self, name: str) -> torch.Tensor:
        """A parameter of the merged model: float32 where it is adapted, as it is on disk elsewhere."""
        weight = self.tensors[name].load()
        return weight.float() + self.delta(name) if name in self.updates else weight


def merge(
    path: Path, adapter_paths: Sequence[Path], out: Path, *, on_tensor: Callable[[int, int], None] | None = None
) -> MergeReport:
    """Write the plain checkpoint of `path` with its own and the given adapters merged, in order, to the folder `out`.

    Tensors keep the dtype that they have on disk, but adapted ones in half precision become float32: rounding
    `W + ΔW` back would change logits by more than a wrong merge may, and ΔW is often below what the rounding takes.

    Raises:
        InputError: tensors are missing, left over, of the wrong shape, not finite, or an adapter changes nothing.
        CheckFailed: the merged model does not compute what PEFT computes with the adapter attached.
    """
    job = _open(path, adapter_paths)
    checkpoint = job.checkpoint
    with replaced_folder(out) as folder:
        _stream(job, folder / WEIGHTS, on_tensor)
        write_json(folder / "config.json", checkpoint.family.merged_config(checkpoint.config))
        copy_processor(checkpoint.path, folder)
        versus_adapter, versus_base = _prove(job, folder)
        report = MergeReport(
            adapter_tensors=sum(2 * len(adapter.updates) + len(adapter.replaced) for adapter in job.adapters),
            unused=sorted([*checkpoint.unused, *(key for adapter in job.adapters for key in adapter.unused)]),
            layers={
                name.removesuffix(".weight"): float(job.delta(name).norm() / job.tensors[name].load().float().norm())
                for name in job.updates
            },
            tied=dict(job.tied),
            inputs_sha256=input_hashes(path, adapter_paths),
            parameters=sum(math.prod(ref.shape) for ref in job.tensors.values()),
            max_abs_diff_vs_adapter=versus_adapter,
            max_abs_diff_vs_base=versus_base,
        )
        write_json(folder / "merge.json", asdict(report))
    return report


def attach(path: Path, adapter_paths: Sequence[Path]) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint's PyTorch model in float32 with its adapters attached by PEFT; only the last stays unmerged.

    Raises:
        InputError: as `merge`.
    """
    job = _open(path, adapter_paths)
    return job.checkpoint, _attached(job)


def _open(path: Path, adapter_paths: Sequence[Path]) -> _Merge:
    """Match every tensor with a parameter; list everything that is wrong, not the first."""
    checkpoint = open_checkpoint(path)
    model = build_empty(checkpoint)
    adapters = [_open_adapter(adapter_path, checkpoint, model) for adapter_path in adapter_paths]
    if not checkpoint.lora and checkpoint.family.embedded_lora(checkpoint.config) is not None:
        raise InputError(
            f"{path / 'config.json'}: asks for LoRA (lora_r), but the checkpoint holds no LoRA tensors; "
            "remove lora_r if the adapter is merged already"
        )
    if checkpoint.lora:
        adapters.insert(0, _embedded_adapter(checkpoint, model))
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    job = _Merge(checkpoint, tuple(adapters), aliases(model), transposed)
    problems = [*_match_base(job, model)]
    job.tensors.update(job.base)
    for adapter in adapters:
        problems += _match_adapter(job, adapter, model)
    if problems:
        raise InputError(_all(problems))
    return job


def _match_base(job: _Merge, model: nn.Module) -> Iterator[str]:
    """Fill `job.base`; what is wrong with it."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = set()
    for name, ref in job.checkpoint.tensors.items():
        canonical = job.tied.get(name, name)
        present.add(canonical)
        if canonical not in shapes:
            yield f"{ref}: no such tensor in a {job.checkpoint.family.model_type} of this config"
        elif ref.shape != shapes[canonical]:
            yield f"{ref}: shape {list(ref.shape)}, the config says {list(shapes[canonical])}"
        elif ref.dtype not in DTYPES:
            yield f"{ref}: dtype {ref.dtype}; save the checkpoint in one of {', '.join(DTYPES)}"
        elif canonical in job.base and not torch.equal(job.base[canonical].load(), ref.load()):
            yield f"{ref}: differs from {job.base[canonical].key}, which the config ties to it"
        else:
            job.base[canonical] = ref
    yield from (f"{job.checkpoint.path.name}: tensor {name} is missing" for name in shapes if name not in present)


def _match_adapter(job: _Merge, adapter: Adapter, model: nn.Module) -> Iterator[str]:
    """Put an adapter's updates and replaced parameters into `job`; what is wrong with them."""
    tied = {*job.tied, *job.tied.values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for update in adapter.updates:
        weight = f"{update.module}.weight"
        module = model.get_submodule(update.module)
        delta = (update.pair.b.shape[0], update.pair.a.shape[1])
        if not isinstance(module, nn.Linear | Conv1D):
            yield f"{update.pair.a}: adapts a {type(module).__name__}; only linear layers can be merged"
        elif weight in tied:
            yield f"{update.pair.a}: adapts {update.module}, which is tied; untie the base model first"
        elif delta != tuple(module.weight.T.shape if update.module in job.transposed else module.weight.shape):
            yield f"{update.pair.b}: B @ A is {list(delta)}, which does not fit {weight} {list(module.weight.shape)}"
        for ref in (update.pair.a, update.pair.b):
            if not torch.isfinite(ref.load()).all():
                yield f"{ref}: holds NaN or Inf"
        job.updates.setdefault(weight, []).append(update)
    for name, ref in adapter.replaced.items():
        if name in tied:
            yield f"{ref}: replaces {name}, which is tied; untie the base model first"
        elif ref.shape != tuple(parameters[name].shape):
            yield f"{ref}: shape {list(ref.shape)}, {name} is {list(parameters[name].shape)}"
        elif ref.dtype not in DTYPES:
            yield f"{ref}: dtype {ref.dtype}; save the adapter in one of {', '.join(DTYPES)}"
    yield from _no_effect(job, adapter)
    for name, ref in adapter.replaced.items():
        job.tensors[name] = ref
        job.updates.pop(name, None)


def _no_effect(job: _Merge, adapter: Adapter) -> Iterator[str]:
    """An adapter, or a half of it, that changes nothing."""
    if not adapter.updates and not adapter.replaced:
        yield f"{adapter.source.parent}: the adapter holds no tensors"
    pairs = [update.pair for update in adapter.updates]
    if pairs and not any(pair.b.load().any() and pair.a.load().any() for pair in pairs):
        yield f"{pairs[0].b.file}: the adapter changes nothing, every lora_B (or lora_A) is zero ({pairs[0].b.key}, …)"
    before = {name: job.tensors[name].load() for name in adapter.replaced if name in job.tensors}
    if before and all(torch.equal(adapter.replaced[name].load(), weight) for name, weight in before.items()):
        # modules_to_save: [projection] also matches projection.projection, and PEFT 0.21 then saves a copy of the inner
        # module that no forward pass, and so no training, ever touched.
        yield (
            f"{next(iter(adapter.replaced.values()))}: replaces {next(iter(before))} by what the base model has; "
            "if modules_to_save names a module around it, PEFT saved an untrained copy: name the inner module"
        )


def _all(problems: list[str], shown: int = 5) -> str:
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + rest


def _embedded_adapter(checkpoint: Checkpoint, model: nn.Module) -> Adapter:
    """The LoRA tensors that the checkpoint itself holds; their settings are in its config."""
    source = checkpoint.path / "config.json"
    settings = checkpoint.family.embedded_lora(checkpoint.config)
    if settings is None:
        key = next(iter(checkpoint.lora.values())).a.key
        raise InputError(f"{source}: no lora_r and lora_alpha, but the checkpoint holds LoRA tensors ({key}, …)")
    modules = dict(model.named_modules())
    unknown = [pair.a for name, pair in checkpoint.lora.items() if name not in modules]
    if unknown:
        raise InputError(_all([f"{ref}: no such module in the model" for ref in unknown]))
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=sorted(checkpoint.lora),
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in checkpoint.lora),
    )
    return Adapter(source, config, "", _updates(source, config, "", checkpoint.lora), {}, ())


def _open_adapter(path: Path, checkpoint: Checkpoint, model: nn.Module) -> Adapter:
    """Read a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) and find where it attaches."""
    source = path / "adapter_config.json"
    config = _adapter_config(source)
    stored = {key.removeprefix("base_model.model."): ref for key, ref in stored_tensors(path, ADAPTER_WEIGHTS).items()}
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]}

    def named(root: str) -> dict[str, TensorRef]:
        names = {key: checkpoint.family.rename(root + key) for key in stored}
        return {name: stored[key] for key, name in names.items() if name is not None}

    def unknown(root: str) -> list[TensorRef]:
        return [ref for name, ref in named(root).items() if name.partition(".lora_")[0] not in known]

    root = min(checkpoint.family.adapter_roots, key=lambda root: len(unknown(root)))
    if unknown(root):
        raise InputError(_all([f"{ref}: no such module in the base model" for ref in unknown(root)]))
    tensors = named(root)
    pairs = pair_lora({name: ref for name, ref in tensors.items() if ".lora_" in name})
    replaced = {name: ref for name, ref in tensors.items() if ".lora_" not in name}
    unused = tuple(ref.key for ref in stored.values() if ref not in tensors.values())
    return Adapter(source, config, root, _updates(source, config, root, pairs), replaced, unused)


def _adapter_config(source: Path) -> peft.LoraConfig:
    """PEFT's own reading of `adapter_config.json`, without what `Adapter.replaced` stands for."""
    settings = read_json(source)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{source}: peft_type is {settings.get('peft_type')!r}; only LORA can be merged")
    for key, kind in _UNSUPPORTED.items():
        if settings.get(key):
            raise InputError(f"{source}: {key}: {kind} cannot be merged by this version")
    if str(settings.get("init_lora_weights")).lower().startswith(_INITS_THAT_CHANGE_BASE):
        raise InputError(
            f"{source}: init_lora_weights: {settings['init_lora_weights']!r} changes the base weights: "
            "save the adapter with `path_initial_model_for_weight_conversion` first"
        )
    try:
        config = peft.LoraConfig.from_pretrained(str(source.parent))
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: PEFT cannot read it: {' '.join(str(error).split())}") from error
    config.modules_to_save, config.bias = None, "none"
    return config


def _updates(source: Path, config: peft.LoraConfig, root: str, pairs: Mapping[str, LoraPair]) -> tuple[Update, ...]:
    """Scales are `alpha / r`, or `alpha / √r` for rsLoRA; either may have a pattern for a module, seen from `root`."""

    def setting(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
        matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, default)  # PEFT `get_pattern_key`

    updates = []
    for module, pair in pairs.items():
        rank = setting(config.rank_pattern, module.removeprefix(root), config.r)
        alpha = setting(config.alpha_pattern, module.removeprefix(root), config.lora_alpha)
        if pair.a.shape[0] != rank:
            raise InputError(f"{pair.a}: rank {pair.a.shape[0]}, {source.name} says {rank}")
        updates.append(Update(module, pair, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return tuple(updates)


def _stream(job: _Merge, target: Path, on_tensor: Callable[[int, int], None] | None) -> None:
    """Write every parameter, one in memory at a time."""
    done = 0

    def merged(name: str, ref: TensorRef) -> torch.Tensor:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(done, len(job.tensors))
        if not torch.isfinite(ref.load()).all():
            raise InputError(f"{ref}: holds NaN or Inf")
        return job.merged(name)

    def entry(name: str, ref: TensorRef) -> Entry:
        dtype = "F32" if name in job.updates and ref.dtype in _HALF else ref.dtype
        return Entry(dtype, ref.shape, lambda: merged(name, ref))

    write_tensors(target, {name: entry(name, ref) for name, ref in sorted(job.tensors.items())})


def _attached(job: _Merge) -> nn.Module:
    """Base weights, and the adapters put on by PEFT itself: an account of the adapters that is not ours."""
    model = load_tensors(build_empty(job.checkpoint), job.base)
    previous = None
    for adapter in job.adapters:
        if previous is not None:
            previous.merge_and_unload()
        model.load_state_dict({name: ref.load().float() for name, ref in adapter.replaced.items()}, strict=False)
        previous = _attach(model, adapter) if adapter.updates else None
    return model.eval().requires_grad_(False)


def _attach(model: nn.Module, adapter: Adapter) -> peft.LoraModel:
    """Let PEFT put LoRA on the modules that it finds by itself, with the scales that it works out by itself."""
    refs = {
        f"{update.module.removeprefix(adapter.root)}.lora_{part}.weight": ref
        for update in adapter.updates
        for part, ref in (("A", update.pair.a), ("B", update.pair.b))
    }
    try:
        target = model.get_submodule(adapter.root.rstrip("."))
        attached = peft.LoraModel(target, adapter.config, "default")
        result: Any = peft.set_peft_model_state_dict(target, {name: ref.load().float() for name, ref in refs.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{adapter.source}: PEFT cannot attach it: {' '.join(str(error).split())}") from error
    file = adapter.source.name
    problems = [f"{refs[name]}: the target_modules of {file} leave it out" for name in result.unexpected_keys]
    absent = [name.replace(".default.", ".") for name in result.missing_keys if ".lora_" in name]
    problems += [f"{adapter.source}: target_modules ask for {name}, which the adapter does not hold" for name in absent]
    if problems:
        raise InputError(_all(problems))
    return attached


def _prove(job: _Merge, folder: Path) -> tuple[float | None, float | None]:
    """The largest differences of merged logits from attached and from base, on the same seeded random inputs."""
    if not job.adapters:
        return None, None
    merged = open_checkpoint(folder)
    family, config = job.checkpoint.family, job.checkpoint.config
    inputs = family.sample_inputs(config, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = family.reference(load_tensors(build_empty(merged), merged.tensors)).prefill(inputs).logits
        base = family.reference(load_tensors(build_empty(job.checkpoint), job.base)).prefill(inputs).logits
        adapted = family.reference(_attached(job)).prefill(inputs).logits
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
    """sha256 of everything that a merge reads, by `<folder>/<file>`, with more folders where two are named alike."""
    files = [path / "config.json", *_weight_files(path, WEIGHTS)]
    for adapter in adapter_paths:
        files += [adapter / "adapter_config.json", *_weight_files(adapter, ADAPTER_WEIGHTS)]
    hashes: dict[str, str] = {}
    for file in dict.fromkeys(file.absolute() for file in files):
        depth = next(depth for depth in range(2, len(file.parts) + 1) if "/".join(file.parts[-depth:]) not in hashes)
        hashes["/".join(file.parts[-depth:])] = sha256(file)
    return hashes


def _weight_files(folder: Path, whole: str) -> list[Path]:
    return sorted({ref.file for ref in stored_tensors(folder, whole).values()})
