"""What the modules of a model were called by earlier versions of transformers.

An adapter's settings name modules as the version that trained it did. The library's tables translate the names of
tensors, from any version's to today's; read backwards, they give what a module of today may have been called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

Names = Mapping[str, str]  # a module's name today → its name in another version
_PROBE = ".lora_A.weight"  # what is renamed like the weight of the module that it adapts
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def namings(model: nn.Module, name_of: Callable[[str], str | None]) -> Iterator[Names]:
    """Every set of names that the tables know for the modules of `model`, today's first, each once.

    Args:
        model: with or without weights.
        name_of: a tensor's name in a checkpoint or adapter of any version → today's (`Family.names`).
    """
    leaves = [name for name, module in model.named_modules() if name and not any(module.children())]
    kinds = {_INDEX.sub("#", name): name for name in reversed(leaves)}  # layers are named alike
    steps = list(_backwards(model, list(kinds.values())))
    seen: list[Names] = []
    for chosen in product((False, True), repeat=len(steps)):
        rename = _all_of([step for step, is_chosen in zip(steps, chosen, strict=True) if is_chosen])
        earlier = {kind: rename(name) for kind, name in kinds.items()}
        if any(name_of(earlier[kind] + _PROBE) != name + _PROBE for kind, name in kinds.items()):
            continue
        found = _with_containers({leaf: _as(leaf, earlier[_INDEX.sub("#", leaf)]) for leaf in leaves})
        if found not in seen:
            seen.append(found)
            yield found


def _backwards(model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[str], str]]:
    """The renamings of each class of transformers in the model, the last first, that change one of its modules."""
    outer: list[str] = []
    for prefix, module in model.named_modules():
        inside = any(not known or prefix.startswith(f"{known}.") for known in outer)
        if inside or not isinstance(module, PreTrainedModel):
            continue
        outer.append(prefix)
        for step in reversed(get_model_conversion_mapping(module)):
            backwards = step.reverse_transform() if isinstance(step, WeightRenaming) else None
            if isinstance(backwards, WeightRenaming):
                rename = _below(prefix, backwards)
                if any(rename(name) != name for name in names):
                    yield rename


def _below(prefix: str, step: WeightRenaming) -> Callable[[str], str]:
    start = f"{prefix}." if prefix else ""

    def rename(name: str) -> str:
        if not name.startswith(start):
            return name
        renamed, _ = step.rename_source_key(f"{name.removeprefix(start)}.weight")
        return start + renamed.removesuffix(".weight")

    return rename


def _all_of(steps: Sequence[Callable[[str], str]]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for step in steps:
            name = step(name)
        return name

    return rename


def _as(leaf: str, earlier: str) -> str:
    """An earlier name with the indices that a leaf's name has today."""
    indices = iter(_INDEX.findall(leaf))
    return _INDEX.sub(lambda found: next(indices, found[0]), earlier)


def _with_containers(leaves: Names) -> dict[str, str]:
    """The modules around the leaves too, where the leaves say how those were called."""
    found = dict(leaves)
    for leaf, earlier in leaves.items():
        name, _, inner = leaf.rpartition(".")
        while name and earlier.endswith(f".{inner}"):
            earlier = earlier.removesuffix(f".{inner}")
            found.setdefault(name, earlier)
            name, _, inner = name.rpartition(".")
    return found
