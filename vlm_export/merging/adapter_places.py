"""Where in a model an adapter was attached: to all of it or to a part, under the names of any version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vlm_export.errors import InputError, all_of
from vlm_export.merging.adapter_settings import Written
from vlm_export.merging.module_names import Names, namings
from vlm_export.tensors.peft_keys import module_of
from vlm_export.tensors.stored import Weight

NameOf = Callable[[str], str | None]
_ADVICE = "attach the adapter to the whole model with PEFT, and save it again"


@dataclass(frozen=True)
class Place:
    """Where an adapter belongs.

    Attributes:
        root: prefix of the names of the module that PEFT attaches it to, today's.
        written_root: what keys and settings leave out in front of theirs.
        names: an adapter's key → the name in the whole model, or None for what inference never reads.
    """

    root: str
    written_root: str
    names: Mapping[str, str | None]


def find_place(stored: Mapping[str, Weight], roots: Sequence[str], model: nn.Module, name_of: NameOf) -> Place:
    """The place where every tensor has a module or parameter that it fits; `roots` are the likely ones.

    Raises:
        InputError: there is none, or there are several.
    """
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]}

    def place(root: str, written: str) -> Place:
        names = {key: name_of(written + key) for key in stored}
        inside = all(name is None or name.startswith(root) for name in names.values())
        return Place(root if inside else "", written, names)

    def unknown(place: Place) -> list[Weight]:
        return [stored[key] for key, name in place.names.items() if name is not None and module_of(name) not in known]

    likely = [place(root, root) for root in roots]
    best = min(likely, key=lambda place: len(unknown(place)))
    if not unknown(best):
        return best
    parts = [place(*roots) for roots in _parts(model, name_of)]
    found = {tuple(part.names.values()): part for part in reversed(parts) if not unknown(part)}
    fitting = [part for part in found.values() if _fits(part, stored, model)] or list(found.values())
    if len(fitting) > 1:
        fits = " and ".join(part.root.rstrip(".") or part.written_root.rstrip(".") for part in reversed(fitting))
        raise InputError(f"{next(iter(stored.values()))}: fits several parts of the model ({fits}); {_ADVICE}")
    if not fitting:
        raise InputError(all_of([f"{ref}: no such module in the base model" for ref in unknown(best)]))
    return fitting[0]


def candidates(model: nn.Module, name_of: NameOf, place: Place, observed: Names) -> Iterator[Written]:
    """The names that an adapter's settings may be written in, the likeliest first.

    Args:
        model: the whole model that the adapter is for.
        name_of: a tensor's name in a checkpoint or adapter of any version → today's (`Family.names`).
        place: where in it the adapter was attached.
        observed: the modules that it adapts, below the place's root, by today's name: what its keys call them.
    """
    adapted = frozenset(observed)
    today = _below(place.root, place.root, {name: name for name, _ in model.named_modules()})
    if _agree(today, observed):
        yield Written(today, adapted)
    others: list[Written] = []
    for naming in namings(model, name_of):
        names = _below(place.root, place.written_root, naming)
        written = Written(names, adapted)
        if _agree(names, observed):
            yield written
        else:
            others.append(written)
    yield Written({**today, **observed}, adapted)
    yield from others


def _agree(names: Names, observed: Names) -> bool:
    return all(names.get(name) == written for name, written in observed.items())


def _below(root: str, written_root: str, names: Names) -> Names:
    return {
        name.removeprefix(root): written.removeprefix(written_root)
        for name, written in names.items()
        if name.startswith(root) and written.startswith(written_root) and name != root
    }


def _parts(model: nn.Module, name_of: NameOf) -> Sequence[tuple[str, str]]:
    """Prefixes of the models inside the model, today's, and what each may have been; and of those around them."""
    inner = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    found: dict[tuple[str, str], None] = {}
    for naming in namings(model, name_of):
        for name in inner:
            written = naming.get(name)
            if written is None:
                continue
            found.setdefault((f"{name}.", f"{written}."))
            outer, _, last = written.rpartition(".")
            if outer and last == "model":  # of a model with a head, which has the same one inside
                found.setdefault(("", f"{outer}."))
    return list(found)


def _fits(place: Place, stored: Mapping[str, Weight], model: nn.Module) -> bool:
    """Whether each A takes what its module takes, and each B gives what it gives."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, name in place.names.items():
        if name is None:
            continue
        shape = stored[key].shape
        if name in parameters and shape != tuple(parameters[name].shape):
            return False
        taken, given = _sides(modules.get(module_of(name)))
        sides = {
            "lora_A": (1, taken),
            "lora_B": (0, given),
            "lora_embedding_A": (1, taken),
            "lora_embedding_B": (0, given),
        }
        for part, (axis, side) in sides.items():
            if side is not None and f".{part}." in f"{name}." and shape[axis : axis + 1] != (side,):
                return False
    return True


def _sides(module: nn.Module | None) -> tuple[int | None, int | None]:
    """How many features a module takes and gives, as LoRA's A and B have them; None where that is not told."""
    match module:
        case nn.Linear():
            return module.in_features, module.out_features
        case Conv1D():
            return module.nx, module.nf
        case nn.Embedding():
            return module.num_embeddings, module.embedding_dim
    return None, None
