"""`vlm-export env`: what a bug report needs to say of a machine. No secrets: of a token, whether there is one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from vlm_export import __version__, hub
from vlm_export.errors import InputError
from vlm_export.machine import available_memory, free_disk
from vlm_export.start.caches import Cache, caches
from vlm_export.web import chromium, node_runtime

_PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "optimum", "timm", "onnx", "onnx-ir", "onnxscript", "onnxsim"),
    *("onnxruntime", "huggingface-hub", "tokenizers", "safetensors", "numpy", "pillow"),
)
# Of a processor, those that decide how fast, and sometimes how exact, 8-bit and 16-bit arithmetic is.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve", "bf16"),
)
# Variables that change what this package does, and hold no secret.
_VARIABLES = (
    *("VLM_EXPORT_CACHE", "VLM_EXPORT_STRUCTURES", "VLM_EXPORT_WORK", "CHROMIUM", "XDG_CACHE_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
)
_CPUINFO = Path("/proc/cpuinfo")
_SECONDS = 20  # for a program to say its version
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Environment:
    """A machine, as a bug report describes it.

    Attributes:
        packages: versions by name; None of those that are not installed.
        features: those of `_FEATURES` that the processor has; None where the system does not tell.
        node, npm, chromium: path and version, or why there is none.
        token: whether a Hub token is set.
        variables: those of `_VARIABLES` that are set.
    """

    vlm_export: str
    python: str
    system: str
    packages: Mapping[str, str | None]
    processor: str
    cores: int
    features: tuple[str, ...] | None
    memory_bytes: int
    available_memory_bytes: int
    free_disk_bytes: int
    node: str
    npm: str
    chromium: str
    token: bool
    variables: Mapping[str, str]
    caches: tuple[Cache, ...]


def environment() -> Environment:
    """This machine. Starts Node, npm and Chromium once each, to ask for their versions."""
    name, features = _processor()
    return Environment(
        __version__,
        platform.python_version(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        {package: _version(package) for package in _PACKAGES},
        name,
        psutil.cpu_count() or 1,
        features,
        psutil.virtual_memory().total,
        available_memory(),
        free_disk(Path()),
        _program(node_runtime.find_node),
        _program(lambda: shutil.which("npm")),
        _program(chromium.find_chromium),
        hub.has_token(),
        {name: _CREDENTIALS.sub("", value) for name in _VARIABLES if (value := os.environ.get(name))},
        tuple(caches()),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, tuple[str, ...] | None]:
    """Its name, and the features that Linux lists; elsewhere None."""
    if not _CPUINFO.is_file():
        return platform.processor() or platform.machine(), None
    lines = (line.partition(":") for line in _CPUINFO.read_text(encoding="utf-8").splitlines())
    values = {key.strip().lower(): value.strip() for key, _, value in lines}
    flags = values.get("flags", values.get("features", "")).split()
    return values.get("model name", platform.machine()), tuple(name for name in _FEATURES if name in flags)


def _program(find: Callable[[], str | None]) -> str:
    """The path of a program and what it says of its version; why there is none, if it is missing or does not start."""
    try:
        path = find()
        if path is None:
            return "not on PATH"
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_SECONDS)
    except InputError as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start: {error}"
    said = (done.stdout.strip() or done.stderr.strip() or "says no version").splitlines()[0]
    return f"{said} ({path})"
