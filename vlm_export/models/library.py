"""What the library knows of a model without weights: the names of its tensors, and which of them are one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

# What stands for a module's weight, or beside it: an adapter's tensors, and those of packed integers.
_PART = re.compile(r"\.(lora_|token_adapter\.|base_layer\.|(qweight|qzeros|scales|g_idx)$)")


@contextmanager
def without_weights() -> Iterator[None]:
    """What is built within has its parameters on the meta device, where nothing fills them, and real buffers.

    transformers would fill them all the same, each by a dozen calls that compute nothing.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def library_names(model: PreTrainedModel) -> Callable[[str], str | None]:
    """For families that are a class of transformers: a checkpoint's tensor name → the name in that class's module tree.

    What the library itself does when it loads: names of transformers 4 and of other frameworks' ports become those of
    transformers 5, and a bare base model's get the prefix that the class has. LoRA tensors are renamed like the weight
    of the module that they adapt, packed integers like the weight that they are. `model` may be without weights.
    Tensors that the library would fuse, split or transpose keep their names, and so are reported as unknown; those that
    it passes over, such as layers that predict further tokens, are None.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def rename(key: str) -> str | None:
        part = _PART.search(key)
        probe = f"{key[: part.start()]}.weight" if part else key
        renamed, _ = rename_source_key(probe, renamings, [], model.base_model_prefix, names)
        if renamed not in names and any(pattern.search(renamed) for pattern in ignored):
            return None
        return renamed.removesuffix(".weight") + key[part.start() :] if part else renamed

    return rename


def aliases(model: nn.Module) -> dict[str, str]:
    """Every parameter name that shares storage with an earlier one (a tied head) → that one's name."""
    first: dict[int, str] = {}
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if canonical != name:
            result[name] = canonical
    return result
