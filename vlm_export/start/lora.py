"""The LoRA of an adapter folder, or inside a checkpoint: what its settings and the shapes of its tensors say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.start.headers import Header
from vlm_export.start.parts import Placed

_DOWN = re.compile(r"\.lora_(A|embedding_A)(\.|$)")
_SAVED = re.compile(r"\.modules_to_save\.")
_KINDS = {"use_dora": "DoRA", "use_rslora": "rank-stabilized", "lora_bias": "with biases"}
_ALPHA = "lora_alpha"  # in adapter_config.json, and in the config.json of distilvit2's checkpoints


@dataclass(frozen=True)
class Lora:
    """LoRA weights.

    Attributes:
        ranks: those of its matrices, the most frequent first.
        alpha: as its settings say; None where they do not.
        kinds: variants of LoRA, such as DoRA.
        modules: how many of the model's modules it adapts, by the last part of their names.
        targets: `target_modules`, where its settings have one: names, or one regular expression.
        saved: the modules that are saved whole.
        new_tokens: how many rows of the token table were trained.
        parameters, size_bytes: of all its tensors, whole modules included.
    """

    ranks: tuple[int, ...]
    alpha: float | None
    kinds: tuple[str, ...]
    modules: Mapping[str, int]
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    new_tokens: int
    parameters: int
    size_bytes: int

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.ranks)) or "unknown"
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g}"
        count = sum(self.modules.values())
        named = ", ".join(f"{name} ({many})" if many > 1 else name for name, many in self.modules.items())
        more = [
            *self.kinds,
            *([f"saved whole: {', '.join(self.saved)}"] if self.saved else []),
            *([f"{self.new_tokens} rows of the token table"] if self.new_tokens else []),
        ]
        return "; ".join([f"rank {ranks}{alpha}, on {count} modules: {named}", *more])


def of_adapter(settings: Mapping[str, Any], headers: Sequence[Header]) -> Lora:
    """The LoRA of an adapter folder: `settings` are its `adapter_config.json`."""
    saved = settings.get("modules_to_save") or ()
    found = {key.split(".modules_to_save.")[0].rpartition(".")[2] for key in _keys(headers) if _SAVED.search(key)}
    bias = settings.get("bias")
    return Lora(
        _ranks(headers),
        _number(settings.get(_ALPHA)),
        (*(kind for key, kind in _KINDS.items() if settings.get(key)), *([f"bias: {bias}"] if _is_set(bias) else [])),
        _modules(headers),
        _targets(settings.get("target_modules")),
        tuple(sorted({*saved, *found})),
        _rows(settings.get("trainable_token_indices")),
        sum(header.parameters for header in headers),
        sum(header.size_bytes for header in headers),
    )


def inside(config: Mapping[str, Any], tensors: Iterable[Placed]) -> Lora | None:
    """The LoRA inside a checkpoint, with the settings that its `config.json` has; None where there is none."""
    own = [tensor for tensor in tensors if tensor.part == "LoRA"]
    if not own:
        return None
    parameters, size_bytes = (sum(getattr(each, name) for each in own) for name in ("parameters", "size_bytes"))
    return Lora(_ranks(own), _number(config.get(_ALPHA)), (), _modules(own), (), (), 0, parameters, size_bytes)


def _keys(headers: Iterable[Header]) -> list[str]:
    return [header.key for header in headers]


def _ranks(headers: Iterable[Header]) -> tuple[int, ...]:
    found = Counter(header.shape[0] for header in headers if _DOWN.search(header.key) and header.shape)
    return tuple(rank for rank, _ in found.most_common())


def _modules(headers: Iterable[Header]) -> dict[str, int]:
    keys = (key for key in _keys(headers) if _DOWN.search(key))
    return dict(Counter(_DOWN.split(key)[0].rpartition(".")[2] for key in keys).most_common())


def _targets(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _rows(value: Any) -> int:
    return sum(map(len, value.values())) if isinstance(value, Mapping) else len(value or ())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_set(bias: Any) -> bool:
    return bias not in (None, "none")
