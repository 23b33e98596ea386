"""What lies in a folder that is not what it was named for, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from vlm_export.errors import InputError
from vlm_export.forms.reading import json_of

_SHOWN = 3


def no_model(folder: Path) -> str:
    """What a folder without `config.json` or weights is, as a sentence; nothing where that cannot be told."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: holds an adapter, not a model: list it under `adapters`, and name as `model` what it was "
            f"trained on{_trained_on(folder)}"
        )
    return _training_state(folder)


def no_adapter(folder: Path) -> str:
    """What a folder without `adapter_config.json` is, as a sentence; nothing where that cannot be told."""
    if (folder / "config.json").is_file():
        return (
            f"{folder}: holds a model (config.json) and no adapter_config.json: name it as `model` if it is merged "
            "already, or save the adapter with `save_pretrained`"
        )
    return _training_state(folder)


def _trained_on(folder: Path) -> str:
    try:
        base = (json_of(folder, "adapter_config.json") or {}).get("base_model_name_or_path")
    except InputError:
        return ""
    return f" ({base})" if isinstance(base, str) and base else ""


def _training_state(folder: Path) -> str:
    """What a folder that a trainer left is, as a sentence; nothing where it is none."""
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".distcp") or name.startswith("pytorch_model_fsdp") for name in names):
        return f"{folder}: holds FSDP's shards: gather them with `accelerate merge-weights` first"
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return f"{folder}: holds a state of DeepSpeed: make weights of it with its zero_to_fp32.py first"
    saved = [name for name in names if name.startswith("checkpoint-")]
    if saved:
        return f"{folder}: holds {', '.join(saved[-_SHOWN:])}: name one of these folders"
    if any(name.endswith(".gguf") for name in names):
        return f"{folder}: holds GGUF, which is already converted and quantized: start from the original weights"
    return ""
