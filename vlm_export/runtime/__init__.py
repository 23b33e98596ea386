"""Runs an exported repo with ONNX Runtime alone: neither torch nor transformers is imported."""

from __future__ import annotations

from vlm_export.runtime.conversation import Conversation
from vlm_export.runtime.model import Answer, Model
from vlm_export.runtime.options import Options

__all__ = ["Answer", "Conversation", "Model", "Options"]
