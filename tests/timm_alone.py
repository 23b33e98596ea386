"""timm's models without torchvision, which timm asks for and, for what is run here, never uses.

timm imports torchvision for data sets, augmentations and one type check, and transformers counts timm as missing where
torchvision is. torchvision's builds of PyPI are linked against CUDA and do not load beside a CPU build of torch
("operator torchvision::nms does not exist"), so the tests do without. Where torchvision is installed, nothing is done.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_ABSENT = "torchvision"


class _Name(type):
    """A class that has any attribute: another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Empty(ModuleType):
    """A module that has any name."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == _ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def use() -> None:
    """Make transformers' timm wrapper work in this process."""
    if find_spec(_ABSENT) is not None or "timm" in sys.modules:
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        timm = importlib.import_module("timm")
        data = importlib.import_module("timm.data")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == _ABSENT]:
            del sys.modules[name]
    from transformers.models.timm_wrapper import configuration_timm_wrapper, modeling_timm_wrapper
    from transformers.utils import import_utils

    import_utils.BACKENDS_MAPPING["timm"] = (lambda: True, "")
    vars(modeling_timm_wrapper)["timm"] = timm
    for name in ("ImageNetInfo", "infer_imagenet_subset"):
        vars(configuration_timm_wrapper)[name] = getattr(data, name)
