"""Merge adapters into plain weights, and prove that the merged model is the adapted one.

Steps: match every tensor of checkpoint and adapters with the model (all that does not match is reported at once); let
PEFT merge each adapted layer, in float32, tensor by tensor into `merged/`; then compare what was written with base +
adapter run by PEFT, layer by layer and as a whole (`prove.py`), the weights of both read from disk operation by
operation. What is in memory at a time is a few times the largest tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vlm_export.atomic import atomic_folder
from vlm_export.errors import InputError, all_of
from vlm_export.files import MERGE_REPORT, sha256, write_json
from vlm_export.merging import adapters, vocabulary
from vlm_export.merging.adapter_settings import SETTINGS
from vlm_export.merging.adapters import Adapter
from vlm_export.merging.prove import Proof, prove
from vlm_export.merging.states import Merged, Step, Version, origin_of
from vlm_export.merging.values import equal, finite, parts
from vlm_export.merging.vocabulary import Resized
from vlm_export.models.library import aliases
from vlm_export.preprocessing import copy_processor
from vlm_export.recipe import Combination
from vlm_export.source.checkpoint import Checkpoint, build_empty, open_checkpoint
from vlm_export.source.companions import GENERATION, GENERATION_FILE, Choice, Companions, check_tokenizer, gathered
from vlm_export.source.generation_rules import unheeded
from vlm_export.source.quantized import base_weights
from vlm_export.tensors.safetensors_writer import DTYPES, Entry, write_tensors
from vlm_export.tensors.stored import TensorRef, Weight
from vlm_export.tensors.streaming import return_freed_memory
from vlm_export.tensors.weight_files import WEIGHTS, folder_of, is_pickle, weight_files


@dataclass(frozen=True)
class MergeReport:
    """`merge.json`. Without an adapter there is nothing to prove, and no differences.

    Attributes:
        layers: module → ‖ΔW‖ / ‖W‖, null where W is zero.
        rounding_error: module → what rounding W + ΔW to the form of W on disk (half precision, 8 or 4 bits) would
            add, as a share of ‖ΔW‖. It is not rounded: adapted weights are written in float32.
        unchanged_if_rounded: module → share of its values that would be W's again.
        max_relative_diff_vs_adapter, max_relative_diff_vs_base: of logits, as a share of the largest one.
        max_layer_error: the worst layer's difference from PEFT's, as a share of what a row of its weight computes.
        worst_layer: that layer.
        weights_by_hand: how many merged weights were compared with W + s·B·A, computed without PEFT.
        not_by_hand: modules whose LoRA is none of one matrix (of experts, of several parameters), and was not.
        companions: which of tokenizer, template, processor and rules are not the model's own, where it has them.
        commits: by a key of the recipe, what came of the Hub, as `org/model@…`.
    """

    adapter_tensors: int
    unused: list[str]
    layers: dict[str, float | None]
    rounding_error: dict[str, float]
    unchanged_if_rounded: dict[str, float]
    tied: dict[str, str]
    inputs_sha256: dict[str, str]
    parameters: int
    max_relative_diff_vs_adapter: float | None
    max_relative_diff_vs_base: float | None
    max_layer_error: float | None
    worst_layer: str | None
    weights_by_hand: int
    not_by_hand: list[str]
    companions: str
    warnings: list[str]
    commits: dict[str, str] = field(default_factory=dict)
    schema: int = 2


@dataclass(frozen=True)
class _Change:
    """What merging did to one parameter: the numbers of `MergeReport`."""

    ratio: float | None
    rounding_error: float | None
    unchanged_if_rounded: float | None


def merge(
    path: Path,
    adapter_paths: Sequence[Path],
    out: Path,
    *,
    combination: Combination | None = None,
    dequantized: bool = False,
    beside: Choice | None = None,
    commits: Mapping[str, str] = MappingProxyType({}),
    on_tensor: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the plain checkpoint of `path` with its own and the given adapters merged to the folder `out`.

    The given ones are merged in order, or as the one that `combination` makes of them. `dequantized` says that the base
    may be quantized weights, read as what they stand for. `beside` says whose tokenizer and processor are taken, and
    `commits` what came of the Hub, for the report.

    Tensors keep the dtype that they have on disk, but adapted ones in half precision become float32: rounding
    `W + ΔW` back would change logits by more than a wrong merge may, and ΔW is often below what the rounding takes.

    Raises:
        InputError: tensors are missing, left over, of the wrong shape, not finite, or an adapter changes nothing.
        CheckFailed: the merged model does not compute what PEFT computes with the adapter attached.
    """
    return_freed_memory()
    with gathered(path, adapter_paths, beside) as companions:
        base, steps = _open(path, adapter_paths, combination, dequantized)
        last = steps[-1].after if steps else base
        check_tokenizer(companions.folder, last.checkpoint)
        with atomic_folder(out) as folder:
            merging = " and ".join(dict.fromkeys(str(step.adapter.source) for step in steps))
            changes = _stream(last, folder / WEIGHTS, on_tensor, merging)
            write_json(folder / "config.json", last.checkpoint.family.merged_config(last.checkpoint.config))
            copy_processor(companions.folder, folder)
            seen = prove(base, steps, folder) if steps else None
            inputs = input_hashes(path, adapter_paths, companions)
            pickles = [file for file in _inputs(path, adapter_paths) if is_pickle(file)]
            report = _report(base, steps, changes, seen, companions, inputs, pickles)
            report = replace(report, commits=dict(commits))
            write_json(folder / MERGE_REPORT, asdict(report))
    return report


def _report(
    base: Version,
    steps: Sequence[Step],
    changes: Mapping[str, _Change],
    seen: Proof | None,
    companions: Companions,
    inputs_sha256: dict[str, str],
    pickles: Sequence[Path],
) -> MergeReport:
    last = steps[-1].after if steps else base
    worst = seen.worst if seen else None
    return MergeReport(
        adapter_tensors=sum(len(step.adapter.tensors) for step in steps),
        unused=sorted([*base.checkpoint.unused, *(key for step in steps for key in step.adapter.unused)]),
        layers={module: change.ratio for module, change in changes.items()},
        rounding_error={
            module: change.rounding_error for module, change in changes.items() if change.rounding_error is not None
        },
        unchanged_if_rounded={
            module: change.unchanged_if_rounded
            for module, change in changes.items()
            if change.unchanged_if_rounded is not None
        },
        tied=aliases(last.build()),
        inputs_sha256=inputs_sha256,
        parameters=sum(math.prod(weight.shape) for weight in last.weights.values()),
        max_relative_diff_vs_adapter=seen.versus_adapter if seen else None,
        max_relative_diff_vs_base=seen.versus_base if seen else None,
        max_layer_error=worst.error if worst else None,
        worst_layer=worst.name if worst else None,
        weights_by_hand=seen.by_hand if seen else 0,
        not_by_hand=[*seen.not_by_hand] if seen else [],
        companions=companions.chosen,
        warnings=[
            *base.checkpoint.notes,
            *_not_heeded(companions, base.checkpoint),
            *(note for step in steps for note in step.adapter.notes),
            *(f"{file}: a pickle, of which only the tensors were read; prefer safetensors" for file in pickles),
            *(seen.warnings if seen else ()),
        ],
    )


def _not_heeded(companions: Companions, checkpoint: Checkpoint) -> Iterator[str]:
    found = unheeded(replace(checkpoint, path=companions.folder))
    if found:
        rules = ", ".join(f"{name}: {value}" for name, value in found.items())
        source = companions.origins[GENERATION] / GENERATION_FILE
        where = source if source.is_file() else checkpoint.path / "config.json"
        yield f"{where}: {rules}: transformers.js generates greedily and does not heed this; it is not published"


def attach(
    path: Path,
    adapter_paths: Sequence[Path],
    *,
    combination: Combination | None = None,
    dequantized: bool = False,
) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint's PyTorch model in float32, in memory, its adapters attached by PEFT; all but the last are merged.

    Raises:
        InputError: as `merge`.
    """
    base, steps = _open(path, adapter_paths, combination, dequantized)
    if not steps:
        model = base.build()
        return base.checkpoint, _fill(model, base.values(model))
    return steps[-1].before.checkpoint, _fill(steps[-1].attached.model, steps[-1].values)


def _fill(model: nn.Module, values: Mapping[nn.Parameter, Weight]) -> nn.Module:
    """Give a model without weights its values; shared parameters stay shared."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in filled:
                value = values[parameter].load().to(torch.float32, copy=True)
                filled[parameter] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, filled[parameter])
    return model


def _open(
    path: Path, adapter_paths: Sequence[Path], combination: Combination | None, dequantized: bool
) -> tuple[Version, list[Step]]:
    """Match every tensor with a parameter; list everything that is wrong, not the first."""
    checkpoint = _with_its_own_heads(base_weights(open_checkpoint(path), dequantized=dequantized))
    model = build_empty(checkpoint)
    embedded = adapters.embedded_adapter(checkpoint, model)
    given = [adapters.open_adapter(adapter_path, checkpoint, model) for adapter_path in adapter_paths]
    found = [embedded, *given] if embedded else given
    weights: dict[str, TensorRef] = {}
    problems = [*_match_base(checkpoint, model, weights)]
    problems += [problem for adapter in found for problem in _unusable(adapter)]
    problems = problems or [*adapters.repetitions(found)]  # of tensors that can be compared
    if problems:
        raise InputError(all_of(problems))
    base, model = _resized(Version(checkpoint, weights), model, found)
    if combination is not None:
        found[-len(given) :] = [adapters.combine(given, combination, model)]
    steps: list[Step] = []
    for adapter in found:
        steps.append(_step(steps[-1].after if steps else base, adapter))
    if steps:
        last = steps[-1].after.weights.items()
        origins = {name: (origin_of(weight), isinstance(weight, Merged)) for name, weight in last}
        vocabulary.check_new_rows(found, origins)
    return base, steps


def _resized(base: Version, model: nn.Module, found: Sequence[Adapter]) -> tuple[Version, nn.Module]:
    """The version and its model with as many tokens in its table as the adapters were trained with."""
    rows = vocabulary.rows_of(found, base.checkpoint, model)
    if rows == base.checkpoint.family.text_config(base.checkpoint.config).vocab_size:
        return base, model
    checkpoint = replace(base.checkpoint, config=vocabulary.with_rows(base.checkpoint, rows))
    resized = build_empty(checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in resized.named_parameters()}
    weights = {
        name: weight if weight.shape == shapes[name] else Resized(weight, rows) for name, weight in base.weights.items()
    }
    return Version(checkpoint, weights), resized


def _with_its_own_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a tie between two tensors that are both there and differ: so transformers loads them.

    Raises:
        InputError: the family has no config without the tie.
    """
    tied = aliases(build_empty(checkpoint))
    found: dict[str, TensorRef] = {}
    apart: dict[str, tuple[TensorRef, TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        other = found.setdefault(tied.get(name, name), ref)
        if other is not ref and other.shape == ref.shape and not equal(other, ref):
            apart[name] = (ref, other)
    if not apart:
        return checkpoint
    alone = replace(checkpoint, config=_untied(checkpoint.config))
    ref, other = next(iter(apart.values()))
    if apart.keys() & aliases(build_empty(alone)).keys():
        raise InputError(
            f"{ref}: differs from {other.key}, and a {checkpoint.family.model_type} cannot have tie_word_embeddings: "
            "false; keep one of the two"
        )
    note = (
        f"{checkpoint.path / 'config.json'}: tie_word_embeddings: true, but {ref.key} differs from {other.key}: "
        "they stay apart, as transformers loads them"
    )
    return replace(alone, notes=(*checkpoint.notes, note))


def _match_base(checkpoint: Checkpoint, model: nn.Module, weights: dict[str, TensorRef]) -> Iterator[str]:
    """Fill `weights` with the checkpoint's tensors by parameter name; yield what is wrong with them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = aliases(model)
    present = set()
    for name, ref in checkpoint.tensors.items():
        canonical = tied.get(name, name)
        present.add(canonical)
        if canonical not in shapes:
            yield f"{ref}: no such tensor in a {checkpoint.family.model_type} of this config"
        elif ref.shape != shapes[canonical]:
            yield f"{ref}: shape {list(ref.shape)}, the config says {list(shapes[canonical])}"
        elif ref.dtype not in DTYPES:
            yield f"{ref}: dtype {ref.dtype}; save the checkpoint in one of {', '.join(DTYPES)}"
        elif canonical in weights and not equal(weights[canonical], ref):
            yield f"{ref}: differs from {weights[canonical].key}, which the config ties to it"
        else:
            weights[canonical] = ref
    yield from (f"{checkpoint.path.name}: tensor {name} is missing" for name in shapes if name not in present)


def _unusable(adapter: Adapter) -> Iterator[str]:
    """What is wrong with an adapter, whatever the model."""
    if not adapter.tensors:
        yield f"{adapter.source.parent}: the adapter holds no tensors"
    for weight in adapter.tensors.values():
        if weight.dtype not in DTYPES:
            yield f"{weight}: dtype {weight.dtype}; save the adapter in one of {', '.join(DTYPES)}"
        elif not finite(weight.load()):
            yield f"{weight}: holds NaN or Inf"
    factors = adapter.factors()
    if factors and not any(a.load().any() and b.load().any() for a, b in factors):
        yield f"{factors[0][1]}, …: the adapter changes nothing, every lora_B (or lora_A) is zero"


def _step(before: Version, adapter: Adapter) -> Step:
    """Put an adapter on a version, and find what every parameter is afterwards.

    Raises:
        InputError: the adapter does not fit, or it changes nothing.
    """
    model = before.build()
    tied = aliases(model)
    base = before.values(model)
    attached = adapters.attach(adapter, model)
    values = {**base, **attached.tensors}
    weights: dict[str, Weight] = {}
    replaced: dict[str, tuple[Weight, Weight]] = {}
    for name, parameter in attached.base_names():
        value = values[parameter]
        if parameter in attached.tensors:
            replaced[name] = before.weights[tied.get(name, name)], value
        elif name in replaced:  # what PEFT keeps of the module in whose place it put another
            continue
        layer, inner = attached.layer_of(name)
        merging = layer is not None and adapters.merging_changes(layer, inner)
        weights[name] = Merged(layer, inner, values, value) if layer is not None and merging else value
    originals = set(map(id, before.checkpoint.tensors.values()))
    untrained = (id(weight) in originals and equal(weight, value) for weight, value in replaced.values())
    if adapter.config.modules_to_save and replaced and all(untrained):
        name, (_, weight) = next(iter(replaced.items()))
        raise InputError(f"{weight}, …: replaces {name} by what the base model has: it was never trained")
    after = _tie(before.checkpoint, tied, weights)
    return Step(before, adapter, attached, values, tuple(replaced.values()), after)


def _tie(checkpoint: Checkpoint, tied: Mapping[str, str], weights: dict[str, Weight]) -> Version:
    """The version with one weight for parameters that are tied and still equal.

    Where they no longer are, its config says that they are not tied.

    Raises:
        InputError: the adapter separates tied weights, and the family has no config without the tie.
    """
    apart = [
        alias
        for alias, name in tied.items()
        if weights[alias] is not weights[name] and not equal(weights[alias], weights[name])
    ]
    if apart:
        checkpoint = replace(checkpoint, config=_untied(checkpoint.config))
        still = aliases(build_empty(checkpoint))
        if set(apart) & still.keys():
            raise InputError(
                f"{checkpoint.path / 'config.json'}: the adapter separates {apart[0]} from {tied[apart[0]]}, which "
                f"a {checkpoint.family.model_type} cannot: untie them in the base model first"
            )
        tied = still
    return Version(checkpoint, {name: weight for name, weight in weights.items() if name not in tied})


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose language model has a head of its own: models with a vocabulary are told so, at every level."""
    result = {key: _untied(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return result | {"tie_word_embeddings": False} if {"vocab_size", "tie_word_embeddings"} & config.keys() else result


def _stream(
    last: Version, target: Path, on_tensor: Callable[[int, int], None] | None, merging: str
) -> dict[str, _Change]:
    """Write every parameter, one in memory at a time.

    Returns what happened to those that adapters were merged into, by module; `merging` says which adapters.

    Raises:
        InputError: one is not finite.
    """
    changes: dict[str, _Change] = {}
    done = 0

    def make(name: str, weight: Weight) -> torch.Tensor:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(done, len(last.weights))
        value = weight.load()
        origin = origin_of(weight)
        if not finite(value):
            if origin is weight or not finite(origin.load()):
                raise InputError(f"{origin}: holds NaN or Inf")
            raise InputError(f"{merging}: makes NaN or Inf of {name}: look at lora_alpha, and at combination.weights")
        if origin is not weight:
            changes[name.removesuffix(".weight")] = _change(origin, value)
        return value

    def entry(name: str, weight: Weight) -> Entry:
        return Entry(weight.dtype, weight.shape, lambda: make(name, weight))

    write_tensors(target, {name: entry(name, weight) for name, weight in sorted(last.weights.items())})
    return changes


def _change(origin: Weight, merged: torch.Tensor) -> _Change:
    change = size = error = 0.0
    unchanged = 0
    rounded = origin.rounded(merged)
    for before, after, back in zip(parts(origin.load()), parts(merged), parts(rounded), strict=True):
        change += float((after - before.float()).norm()) ** 2
        size += float(before.float().norm()) ** 2
        error += float((back.float() - after).norm()) ** 2
        unchanged += int((back == before).sum())
    rounds = rounded.dtype.itemsize < merged.dtype.itemsize or error > 0
    return _Change(
        ratio=math.sqrt(change / size) if size else None,
        rounding_error=math.sqrt(error / change) if rounds and change else None,
        unchanged_if_rounded=unchanged / merged.numel() if rounds else None,
    )


def _inputs(path: Path, adapter_paths: Sequence[Path]) -> Iterator[Path]:
    """Every file that a merge reads."""
    yield from (folder_of(path) / "config.json", *weight_files(path))
    for adapter in adapter_paths:
        yield from (folder_of(adapter) / SETTINGS, *adapters.adapter_files(adapter))


def input_hashes(path: Path, adapter_paths: Sequence[Path], companions: Companions) -> dict[str, str]:
    """sha256 of everything that a merge reads, by `<folder>/<file>`, with more folders where two are named alike."""
    hashes: dict[str, str] = {}
    for file in dict.fromkeys(file.absolute() for file in [*_inputs(path, adapter_paths), *companions.files]):
        depth = next(depth for depth in range(2, len(file.parts) + 1) if "/".join(file.parts[-depth:]) not in hashes)
        hashes["/".join(file.parts[-depth:])] = sha256(file)
    return hashes
