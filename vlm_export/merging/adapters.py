"""Adapters: what is in a PEFT folder (or in a checkpoint that carries LoRA itself), and what PEFT makes of it.

PEFT decides which module each tensor belongs to, how the module computes with it, and what merging it gives: it is put
on a model without weights, and only the layers that are being merged are filled, one at a time. Only this module and
`adapter_settings.py` import peft, inside the functions that need it: that takes a second, and most commands do not.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vlm_export.errors import InputError, all_of, reason
from vlm_export.merging import adapter_places
from vlm_export.merging.adapter_settings import SETTINGS, in_todays_names, read_settings
from vlm_export.merging.low_rank import LowRank
from vlm_export.own_files import own_file
from vlm_export.recipe import Combination
from vlm_export.source.checkpoint import TRAINED_BESIDE_LORA, Checkpoint
from vlm_export.tensors import other_folders
from vlm_export.tensors.peft_keys import is_adapters, is_lora, module_of, plain_key
from vlm_export.tensors.stored import TensorRef, Weight, stored_tensors
from vlm_export.tensors.weight_files import ADAPTER_WEIGHTS, folder_of, weight_files

_NAME = "default"  # PEFT's name for the adapter in the model
_MOST_IN_FLOAT64 = 50_000_000  # numbers of a table: 400 MB, and as much again while its change is added
_A = re.compile(r"\.lora_(embedding_)?A(?=\.|$)")
_FACTOR = re.compile(r"\.lora_([AB]\.weight|embedding_[AB])$")
_BESIDE_FACTORS = re.compile(r"\.lora_magnitude_vector$|\.lora_B\.bias$")
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.default)(?=\.)")


@dataclass(frozen=True)
class Adapter:
    """An adapter, its tensors matched with the model's modules.

    Attributes:
        source: the file that its settings come from.
        config: a `peft.LoraConfig`.
        alphas: of each module that has LoRA, below `root`.
        root: prefix of the submodule that PEFT attaches it to.
        tensors: by the names that PEFT saves, below `root`.
        unused: keys that the family says inference never reads.
        notes: what a user must know of its settings, a sentence each.
    """

    source: Path
    config: Any
    alphas: Mapping[str, float]
    root: str
    tensors: Mapping[str, Weight]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def factors(self) -> list[tuple[Weight, Weight]]:
        """A and B of every module; none where something beside them (a bias, a magnitude) may have an effect."""
        if any(_BESIDE_FACTORS.search(name) for name in self.tensors):
            return []
        return list(self.pairs().values())

    def pairs(self) -> dict[str, tuple[Weight, Weight]]:
        """A and B by A's name in the whole model."""
        names = [(name, _A.sub(r".lora_\1B", name)) for name in self.tensors if _A.search(name)]
        return {self.root + a: (self.tensors[a], self.tensors[b]) for a, b in names if b in self.tensors}

    def products(self, model: nn.Module) -> tuple[dict[str, LowRank], list[str]]:
        """What it makes of each weight of `model` by the product of its factors alone, by the weight's name.

        Returns:
            The products, and the modules whose LoRA is none of one matrix: that of experts, or of several parameters.
        """
        found: dict[str, LowRank] = {}
        pairs = [(module_of(name), pair) for name, pair in self.pairs().items()]
        times = Counter(module for module, _ in pairs)
        for module, (a, b) in pairs:
            below = module.removeprefix(self.root)
            bare = self._bare_parameters(below)
            weight = f"{module}.{bare[0] if bare else 'weight'}"
            if times[module] > 1 or len(bare) > 1 or (bare and model.get_parameter(weight).ndim != 2):
                continue
            magnitude = self.tensors.get(f"{below}.lora_magnitude_vector")
            transposed = not bare and isinstance(model.get_submodule(module), (Conv1D, nn.Embedding))
            rank = a.shape[0]
            scale = self.alphas[below] / (math.sqrt(rank) if self.config.use_rslora else rank)
            found[weight] = LowRank(a, b, scale, magnitude, transposed)
        return found, [module for module in times if not any(name.startswith(f"{module}.") for name in found)]

    def _bare_parameters(self, module: str) -> list[str]:
        """The parameters of a module that its settings name one by one."""
        named = [key.rpartition(".") for key in self.config.target_parameters or ()]
        return [leaf for owner, _, leaf in named if module == owner or module.endswith(f".{owner}")]


@dataclass(frozen=True)
class Held:
    """A tensor in memory, where others are in files."""

    key: str
    tensor: torch.Tensor
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    def load(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """`value` as it is: what is in memory has no form on disk that it would be rounded to."""
        return value

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class Attached:
    """A model without weights, with an adapter that PEFT has put on it.

    Attributes:
        tensors: the adapter's, by the parameter that stands for each in `model`.
        layers: what PEFT put in the place of modules, by their names, where merging has something to compute.
    """

    model: nn.Module
    tensors: Mapping[nn.Parameter, Weight]
    layers: Mapping[str, nn.Module]

    def base_names(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under its name in the model without adapter; several have one name where PEFT keeps both."""
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not is_adapters(_WRAPPERS.sub("", f".{name}")):
                yield _WRAPPERS.sub("", name), parameter

    def layer_of(self, name: str) -> tuple[nn.Module | None, str]:
        """The layer that a parameter of the base model is in, if any, and its name inside the original module."""
        module, _, inner = name.rpartition(".")
        while module and module not in self.layers:
            module, _, outer = module.rpartition(".")
            inner = f"{outer}.{inner}"
        return self.layers.get(module), inner


def open_adapter(path: Path, checkpoint: Checkpoint, model: nn.Module) -> Adapter:
    """Read a PEFT folder, or the file of weights in one, and find where in the model it attaches.

    Raises:
        InputError: a kind that cannot be merged, tensors of modules that the model does not have, names that fit
            several of its parts or none, or a link that leads out of the folder.
    """
    source = folder_of(path) / SETTINGS
    if not own_file(source.parent, source.name) and (instead := other_folders.no_adapter(source.parent)):
        raise InputError(instead)
    config, notes = read_settings(source)
    stored = {plain_key(key): ref for key, ref in adapter_tensors(path).items()}
    return replace(_placed(source, config, stored, checkpoint, model), notes=notes)


def _placed(
    source: Path, config: Any, stored: Mapping[str, TensorRef], checkpoint: Checkpoint, model: nn.Module
) -> Adapter:
    """An adapter of these settings and tensors, by plain keys, where it belongs in the model."""
    name_of = checkpoint.family.names(checkpoint.config)
    place = adapter_places.find_place(stored, checkpoint.family.adapter_roots, model, name_of)
    tensors = {name: stored[key] for key, name in place.names.items() if name is not None}
    modules = {key: name for key, name in place.names.items() if name is not None and is_lora(key)}
    observed = {module_of(name).removeprefix(place.root): module_of(key) for key, name in modules.items()}
    settings = in_todays_names(source, config, adapter_places.candidates(model, name_of, place, observed))
    unused = tuple(stored[key].key for key, name in place.names.items() if name is None)
    below = {name.removeprefix(place.root): ref for name, ref in tensors.items()}
    return Adapter(source, settings.config, settings.alphas, place.root, below, unused)


def adapter_tensors(path: Path) -> dict[str, TensorRef]:
    """Every tensor of an adapter's folder by key: its weights, and what LLaVA's own trainer saves beside them.

    Raises:
        InputError: as of `stored_tensors`.
    """
    tensors = stored_tensors(path, ADAPTER_WEIGHTS)
    beside = _beside(path)
    return {**tensors, **stored_tensors(beside)} if beside else tensors


def adapter_files(path: Path) -> list[Path]:
    """The files that hold an adapter's tensors.

    Raises:
        InputError: as of `weight_files`.
    """
    beside = _beside(path)
    return [*weight_files(path, ADAPTER_WEIGHTS), *([beside] if beside else [])]


def _beside(path: Path) -> Path | None:
    return None if path.is_file() else own_file(path, TRAINED_BESIDE_LORA)


def embedded_adapter(checkpoint: Checkpoint, model: nn.Module) -> Adapter | None:
    """The LoRA tensors that a checkpoint itself holds; their settings are in its config.

    Raises:
        InputError: there are tensors without settings, or settings without tensors.
    """
    source = checkpoint.path / "config.json"
    settings = checkpoint.family.embedded_lora(checkpoint.config)
    if settings is None and not checkpoint.lora:
        return None
    beside = own_file(checkpoint.path, SETTINGS)
    if settings is None and beside:
        config, notes = read_settings(beside)
        config.modules_to_save = None  # these are in the place of the checkpoint's own
        stored = {plain_key(ref.key): ref for ref in checkpoint.lora.values()}
        return replace(_placed(beside, config, stored, checkpoint, model), notes=notes)
    if settings is None:
        key = next(iter(checkpoint.lora.values())).key
        raise InputError(
            f"{source}: no lora_r and lora_alpha, and yet LoRA tensors ({key}, …): put their adapter_config.json "
            "beside them"
        )
    if not checkpoint.lora:
        raise InputError(
            f"{source}: lora_r, and yet the checkpoint holds no LoRA tensors: remove it if they are merged already"
        )
    from peft import LoraConfig

    modules = dict(model.named_modules())
    targets = {name: module_of(name) for name in checkpoint.lora}
    unknown = [ref for name, ref in checkpoint.lora.items() if targets[name] not in modules]
    if unknown:
        raise InputError(all_of([f"{ref}: no such module in the model" for ref in unknown]))
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=sorted(set(targets.values())),
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in targets.values()),
    )
    alphas = dict.fromkeys(targets.values(), float(settings.alpha))
    return Adapter(source, config, alphas, "", checkpoint.lora, ())


def repetitions(found: Sequence[Adapter]) -> Iterator[str]:
    """Adapters that hold a LoRA which one before them holds too: merged twice, it changes twice as much as it should.

    One that was trained further differs everywhere; equal are copies, in another precision or with other names too.
    """
    for index, adapter in enumerate(found):
        for earlier in found[:index]:
            one, other = earlier.pairs(), adapter.pairs()
            equal = [name for name in one if name in other and _is_copy(one[name], other[name])]
            if equal:
                yield _repetition(earlier.source, adapter.source, module_of(equal[0]), len(equal))


def _repetition(earlier: Path, later: Path, module: str, count: int) -> str:
    which = f"LoRA of {module}" + (f" and {count - 1} more modules" if count > 1 else "")
    if earlier == later:
        return f"{later.parent}: the recipe's adapters list it twice, and it would be merged twice; list it once"
    if earlier.name != SETTINGS:
        return (
            f"{later.parent}: repeats what the checkpoint {earlier.parent} holds itself ({which}), and it would be "
            "merged twice; remove it from the recipe's adapters"
        )
    return (
        f"{later.parent}: repeats {earlier.parent} ({which}: A and B are equal), and it would be merged twice; "
        "remove one of the two from the recipe's adapters"
    )


def _is_copy(one: tuple[Weight, Weight], other: tuple[Weight, Weight]) -> bool:
    """Whether A and B, neither of them zero, are the same but for the rounding to another precision."""
    pairs = [(a.load(), b.load()) for a, b in zip(one, other, strict=True) if a.shape == b.shape]
    return len(pairs) == 2 and all(bool(a.any()) and _equal_if_rounded(a, b) for a, b in pairs)


def _equal_if_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    kinds = [torch.finfo(tensor.dtype) for tensor in (one, other)]
    step = max(kind.eps for kind in kinds)
    smallest = max(kind.tiny * kind.eps for kind in kinds)
    return torch.allclose(one.double(), other.double(), rtol=step, atol=smallest)


def attach(adapter: Adapter, model: nn.Module) -> Attached:
    """Let PEFT put an adapter on the modules of a model without weights, which it changes.

    Raises:
        InputError: PEFT refuses, or the modules that it finds and the adapter's tensors are not the same.
    """
    from peft import LoraModel, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    base = set(model.parameters())
    stand_ins = {
        name: nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)
        for name, weight in adapter.tensors.items()
    }
    try:
        with _advice_is_for_training():
            target = model.get_submodule(adapter.root.rstrip("."))
            LoraModel(target, copy.deepcopy(adapter.config), _NAME, low_cpu_mem_usage=True)
            inner = [name for name, _ in target.named_parameters(remove_duplicate=False) if ".base_layer." in name]
            wrapped = {name.replace(".base_layer.", "."): name for name in inner}  # a bias beside LoRA
            state = {wrapped.get(name, name): parameter for name, parameter in stand_ins.items()}
            set_peft_model_state_dict(target, state, ignore_mismatched_sizes=True, low_cpu_mem_usage=True)
    except KeyError as error:
        problem = "which the adapter does not hold"
        if error.args[0] in adapter.tensors:
            # modules_to_save: [projection] matches projection.projection too; nothing ever trained that inner copy
            problem = "inside another of modules_to_save, as an untrained copy: name the inner module alone, and train"
        raise InputError(f"{adapter.source}: asks for {adapter.root}{error.args[0]}, {problem}") from error
    except Exception as error:  # by what is wrong in the settings, whatever comes
        raise InputError(f"{adapter.source}: PEFT cannot attach it: {reason(error)}") from error
    tensors = {parameter: adapter.tensors[name] for name, parameter in stand_ins.items()}
    problems = [*_misplaced(adapter, target, tensors, base), *_unmergeable(adapter, target)]
    if problems:
        raise InputError(all_of(problems))
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if not inside and _is_one_of(module, BaseTunerLayer, TrainableTokensWrapper):
            layers[name] = module
    return Attached(model.eval().requires_grad_(False), tensors, layers)


def combine(given: Sequence[Adapter], combination: Combination, model: nn.Module) -> Adapter:
    """One adapter that is PEFT's weighted combination of several; `model` is only looked at.

    Raises:
        InputError: one of them does not fit the model, they are attached to different parts of it, hold more than
            LoRA's two factors, or PEFT refuses.
    """
    from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict

    _check_can_be_combined(given)
    for adapter in given:
        attach(adapter, copy.deepcopy(model))
    root = given[0].root
    target = _of_nothing(model.get_submodule(root.rstrip(".")))
    names = [f"adapter-{index}" for index in range(len(given))]  # PEFT looks for them between the dots of any path
    options = {key: getattr(combination, key) for key in ("density", "majority_sign_method", "svd_rank")}
    # With PEFT's usual beginning, which draws random numbers too, a seed gives what it gives its users.
    configs = [replace(copy.deepcopy(adapter.config), init_lora_weights=True) for adapter in given]
    try:
        with _advice_is_for_training(), torch.random.fork_rng(devices=[]), torch.no_grad():
            peft_model = LoraModel(target, {names[0]: configs[0]}, names[0])
            for name, config in zip(names[1:], configs[1:], strict=True):
                peft_model.peft_config[name] = config
                peft_model.inject_adapter(target, name)
            for name, adapter in zip(names, given, strict=True):
                values = {key: weight.load().float() for key, weight in adapter.tensors.items()}
                set_peft_model_state_dict(target, values, adapter_name=name)
            torch.manual_seed(combination.seed)
            peft_model.add_weighted_adapter(
                names, list(combination.weights), "combined", combination.type, svd_full_matrices=False, **options
            )
            state = get_peft_model_state_dict(target, adapter_name="combined", save_embedding_layers=False)
    except Exception as error:  # by what is wrong in it, whatever comes
        raise InputError(f"combination: PEFT refuses it: {reason(error)}") from error
    folders = " and ".join(adapter.source.parent.name for adapter in given)
    source = Path(f"{combination.type} of {folders}")
    tensors = {name: Held(f"{source}: {name}", tensor) for name, tensor in state.items()}
    ranks = {module_of(name): held.shape[0] for name, held in tensors.items() if _A.search(name)}
    pattern = {re.escape(name): rank for name, rank in ranks.items()}
    config = LoraConfig(  # both factors hold their share of the weights and scales, so that this one's is 1
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=given[0].config.fan_in_fan_out,
        init_lora_weights=False,
    )
    alphas = {name: float(rank) for name, rank in ranks.items()}
    return Adapter(source, config, alphas, root, tensors, tuple(key for adapter in given for key in adapter.unused))


def _check_can_be_combined(given: Sequence[Adapter]) -> None:
    for adapter in given:
        beside = [weight for name, weight in adapter.tensors.items() if not _FACTOR.search(name)]
        if beside:
            raise InputError(f"{beside[0]}: only LoRA's A and B can be combined; merge such adapters in sequence")
        if adapter.root != given[0].root:
            raise InputError(
                f"{adapter.source}: attached to {adapter.root or 'the whole model'}, the first one to "
                f"{given[0].root or 'the whole model'}; only adapters of the same part can be combined"
            )


def _of_nothing(model: nn.Module) -> nn.Module:
    """A copy with zeros in the place of weights, which take no memory: PEFT moves adapters to where the weights are."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def _misplaced(
    adapter: Adapter, target: nn.Module, tensors: Mapping[nn.Parameter, Weight], base: set[nn.Parameter]
) -> Iterator[str]:
    """Tensors that PEFT has no parameter for, or one of another shape, and parameters that got none."""
    parameters = dict(target.named_parameters(remove_duplicate=False))
    placed = set(parameters.values())
    saved_as = {name.replace(f".{_NAME}", ""): name for name in parameters}
    mismatched = set()
    for (parameter, weight), name in zip(tensors.items(), adapter.tensors, strict=True):
        if parameter not in placed:
            expected = saved_as.get(name, saved_as.get(f"{name}.weight", saved_as.get(_WRAPPERS.sub("", name))))
            if expected is None:
                yield f"{weight}: the target_modules of {adapter.source.name} leave it out"
            else:
                mismatched.add(expected)
                wanted = list(parameters[expected].shape)
                yield f"{weight}: shape {list(weight.shape)}; the model and {adapter.source.name} want {wanted}"
    for name, parameter in parameters.items():
        if f".{_NAME}" in name and name not in mismatched and not {parameter} & (tensors.keys() | base):
            name = adapter.root + name.replace(f".{_NAME}", "")
            yield f"{adapter.source}: its settings ask for {name}, which the adapter does not hold"


def _unmergeable(adapter: Adapter, target: nn.Module) -> Iterator[str]:
    """Layers whose LoRA has no bias to be merged into, and those that PEFT computes with and cannot merge."""
    for name, module in target.named_modules():
        layer: Any = module
        if not hasattr(layer, "lora_B"):
            continue
        original = layer.get_base_layer()
        if adapter.config.lora_bias and original.bias is None:
            yield f"{adapter.source}: lora_bias: {adapter.root}{name} has no bias that it could be merged into"
        if getattr(original, "groups", 1) > 1:
            yield (
                f"{adapter.source}: {adapter.root}{name} is a convolution in {original.groups} groups, which PEFT "
                "cannot merge; train without it in target_modules"
            )


def _is_one_of(value: object, *classes: type) -> bool:
    """`isinstance`, which does not tell mypy that a layer of PEFT's is no `nn.Module`."""
    return isinstance(value, classes)


def merged_parameters(layer: nn.Module, values: Mapping[nn.Parameter, Weight]) -> dict[str, torch.Tensor]:
    """What a layer of `Attached.layers` leaves when its adapter is merged: float32, by name in the original module.

    The layer itself stays as it is. PEFT computes it in float64, rounded once at the end, so that the order in which a
    processor adds decides nothing; a table too large for that is merged in float32.
    """
    filled: Any = copy.deepcopy(layer)
    sources = dict(layer.named_parameters(remove_duplicate=False))
    largest = max(parameter.numel() for parameter in sources.values())
    dtype = torch.float64 if largest <= _MOST_IN_FLOAT64 else torch.float32
    for name, _ in list(filled.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        value = values[sources[name]].load().to(dtype, copy=True)  # PEFT adds in place
        setattr(filled.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    with torch.no_grad(), _advice_is_for_training():
        if hasattr(filled, "unload_and_optionally_merge_module"):
            original = filled.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            filled.merge()
            original = filled.get_base_layer()
    return {name: parameter.detach().float() for name, parameter in original.named_parameters()}


def merging_changes(layer: nn.Module, name: str) -> bool:
    """Whether merging a layer changes the parameter `name` of its original module."""
    wrapped = [module.parameter_name for module in layer.modules() if hasattr(module, "parameter_name")]
    if wrapped:  # LoRA on bare parameters
        return name in wrapped
    return not name.endswith("bias") or any(getattr(layer, "lora_bias", {}).values())


@contextmanager
def _advice_is_for_training() -> Iterator[None]:
    """Within, PEFT's warnings are not shown: they are for those who train.

    What matters to a merge is checked here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
