"""Load an exported repo: by ONNX Runtime, or by PyTorch where the graphs are missing or fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from vlm_export.apps.download import download, is_repo_id
from vlm_export.errors import InputError
from vlm_export.runtime.model import Backend, Engine, EngineFailed, Model
from vlm_export.runtime.onnx import OnnxEngine
from vlm_export.runtime.options import unknown_settings
from vlm_export.runtime.repo import GENERATION, open_repo
from vlm_export.runtime.single import SingleEngine


def load(
    model: Path | str,
    *,
    dtype: str | None = None,
    backend: Backend | Literal["auto"] = "auto",
    threads: int = 0,
    notify: Callable[[str], None] = warnings.warn,
    fallback: Callable[[], Engine] | None = None,
    fall_back_later: bool = True,
) -> Model:
    """Load an exported repo.

    Args:
        model: the repo's folder: configs, tokenizer, and graphs in `onnx/`; or its id on the Hub, of which the graphs
            of one dtype are fetched.
        dtype: if None, what a processor prefers (`dtypes.PREFERRED`) of those that did not fail `vlm-export verify`.
        backend: "onnx" alone, "torch" alone, or "auto": PyTorch where the graphs are missing or fail.
        threads: for each graph; 0 leaves it to ONNX Runtime.
        notify: given a line when it falls back, and for what generation_config.json asks for that is not applied.
        fallback: makes the PyTorch engine; by default of the merged checkpoint in the repo's work folder.
        fall_back_later: whether PyTorch takes over, for good, from graphs that load and fail later. A server has no use
            for that: one request would change it for all others.

    Raises:
        InputError: what the user can mend: a missing file, a setting that is not understood, no model to fall back to.
    """

    folder = download(model, dtype) if isinstance(model, str) and _is_of_the_hub(model) else Path(model)

    def torch_engine(reason: str = "") -> Engine:
        if fallback is not None:
            engine = fallback()
        else:
            from vlm_export.apps.pytorch_engine import beside

            engine = beside(folder, because=reason)
        if reason:
            notify(f"{reason}: captioning with PyTorch instead")
        return engine

    if backend == "torch":
        return Model(torch_engine())
    try:
        repo = open_repo(folder)
        engine: Engine = (SingleEngine if repo.layout == "single" else OnnxEngine)(repo, dtype, threads)
    except EngineFailed as error:
        if backend == "onnx":
            raise InputError(str(error)) from error
        return Model(torch_engine(str(error)))
    for name in unknown_settings(repo.generation):
        notify(f"{folder / GENERATION}: {name}: is not applied")
    return Model(engine, torch_engine if backend == "auto" and fall_back_later else None)


def _is_of_the_hub(model: str) -> bool:
    return is_repo_id(model) and not Path(model).is_dir()
