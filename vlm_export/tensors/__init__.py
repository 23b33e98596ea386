"""Tensors on disk: read under any writer's names, written as safetensors, streamed through a model that has none."""
