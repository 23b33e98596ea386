"""Turn a fine-tuned vision-language model into a repo that stock transformers.js loads, and prove it says the same.

The command line (`vlm-export --help`) and the walk behind it (`vlm_export.pipeline`) convert. What runs an exported
repo in Python is here:

    model = load(Path("build/shapes-captioner/repo"))
    model.generate([Image.open("photo.jpg")], options=Options(num_beams=3)).text
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_export.apps.load import load
    from vlm_export.runtime import Answer, Conversation, Model, Options

__all__ = ["Answer", "Conversation", "Model", "Options", "__version__", "load"]
__version__ = "0.1.0"

# ONNX Runtime reports to its maker from the moment that it is imported, here and in Node, unless this says otherwise
# by then (seen in 1.31.1; `disable_telemetry_events` comes too late). Every process that is started inherits it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Xet's client reports every transfer to the server that it was made with (seen in hf_xet of huggingface_hub 2.4).
os.environ["HF_XET_TELEMETRY_ENABLED"] = "0"


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported at their first use: ONNX Runtime takes longer than a command's help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.apps.load" if name == "load" else f"{__name__}.runtime"), name)
