"""Turn a fine-tuned vision-language model into a repo that stock transformers.js loads, and prove it says the same."""

import os

__version__ = "0.1.0"

# ONNX Runtime reports to its maker from the moment that it is imported, here and in Node, unless this says otherwise
# by then (seen in 1.31.1; `disable_telemetry_events` comes too late). Every process that is started inherits it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
