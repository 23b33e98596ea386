"""Which families there are: each module of this package that is named after a `model_type`."""

from __future__ import annotations

import importlib

from transformers import CONFIG_MAPPING
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from vlm_export import families
from vlm_export.errors import InputError
from vlm_export.families._known import module_names as names
from vlm_export.families._known import not_supported
from vlm_export.spec.family import Family


def find_family(model_type: str, source: str, *, has_code: bool = False) -> Family:
    """The family of a `model_type`, whose module has `_` for its `-`; `source` is the file that named it.

    A type that was registered for a class of a repo's own code is of the family that the class builds on. `has_code`
    says that the file names such code.

    Raises:
        InputError: no family has that name.
    """
    module = str(model_type).replace("-", "_")
    if module in names():
        return _family(module)
    config_class = _registered(str(model_type))
    family = family_of(config_class) if config_class else None
    if family is None:
        raise InputError(f"{source}: {not_supported(model_type, has_code=has_code)}")
    return family


def family_of(config_class: type) -> Family | None:
    """The family of the nearest class that a config class is, or derives from, if there is one."""
    types = (str(vars(base).get("model_type")).replace("-", "_") for base in config_class.__mro__)
    module = next((model_type for model_type in types if model_type in names()), None)
    return _family(module) if module else None


def _registered(model_type: str) -> type | None:
    """The config class of a repo's own code that was registered for a type, if one was."""
    if model_type not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[model_type]
    return config_class if config_class.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME) else None


def _family(module: str) -> Family:
    return importlib.import_module(f"{families.__name__}.{module}").FAMILY
