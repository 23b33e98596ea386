"""Runs an exported repo with ONNX Runtime alone: neither torch nor transformers is imported, unless it must fall back.

model = load(Path("build/shapes-captioner/repo"))
model.generate([Image.open("photo.jpg")], options=Options(num_beams=3)).text
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from vlm_export.errors import InputError
from vlm_export.runtime.model import Answer, Engine, EngineFailed, Model
from vlm_export.runtime.onnx import OnnxEngine
from vlm_export.runtime.options import Options
from vlm_export.runtime.repo import open_repo

__all__ = ["Answer", "Model", "Options", "load"]


def load(
    folder: Path,
    *,
    dtype: str | None = None,
    backend: Literal["auto", "onnx", "torch"] = "auto",
    threads: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> Model:
    """Load an exported repo.

    Args:
        dtype: q8 where there is one, else int8, else fp32, if None.
        backend: "onnx" alone, "torch" alone, or "auto": PyTorch where the graphs are missing or fail.
        threads: for each graph; 0 leaves it to ONNX Runtime.
        notify: given a line when it falls back.

    Raises:
        InputError: what the user can mend: a missing file, a setting that is not understood, no model to fall back to.
    """

    def spare(reason: str) -> Engine:
        from vlm_export.runtime import pytorch

        engine = pytorch.beside(folder, because=reason)
        notify(f"{reason}: captioning with PyTorch instead")
        return engine

    if backend == "torch":
        from vlm_export.runtime import pytorch

        return Model(pytorch.beside(folder, because=""))
    try:
        return Model(OnnxEngine(open_repo(folder), dtype, threads), spare if backend == "auto" else None)
    except EngineFailed as error:
        if backend == "onnx":
            raise InputError(str(error)) from error
        return Model(spare(str(error)))
