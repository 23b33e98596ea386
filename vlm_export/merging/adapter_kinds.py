"""Which kinds of adapters can be merged, by their settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kinds that merging cannot describe, or that need more than the adapter's own tensors.
UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
INITS_THAT_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refusal(settings: Mapping[str, Any]) -> str | None:
    """Why an adapter of these settings cannot be merged, and what to do; None where it can."""
    if settings.get("peft_type") != "LORA":
        return f"peft_type is {settings.get('peft_type')!r}; only LORA can be merged"
    for key, kind in UNSUPPORTED.items():
        if settings.get(key):
            return f"{key}: {kind} cannot be merged by this version"
    if str(settings.get("init_lora_weights")).lower().startswith(INITS_THAT_CHANGE_BASE):
        return (
            f"init_lora_weights: {settings['init_lora_weights']!r} changes the base weights: "
            "save the adapter with `path_initial_model_for_weight_conversion` first"
        )
    return None
