"""Run a model whose weights stay on disk: each operation reads the ones it is given, and drops them again.

A model is built without weights (`checkpoint.build_empty`), and its parameters stand for tensors elsewhere. Torch asks
a `TorchFunctionMode` before every operation; this one puts the values in the parameters' place for the length of that
operation, so no more than the largest tensor is in memory, whoever reads it. (accelerate's hooks load by module:
modules that read a parameter of another one, as PEFT's DoRA and some position tables do, would find nothing there.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

Source = Callable[[], torch.Tensor]
PART_ELEMENTS = 1 << 24  # 64 MiB in float32: what a wide matrix is converted and multiplied by at a time
_M_MMAP_THRESHOLD = -3  # malloc.h
_TENSOR: Any = torch.Tensor
_OF_THE_SHAPE = frozenset(
    {
        _TENSOR.dtype.__get__,
        _TENSOR.shape.__get__,
        _TENSOR.ndim.__get__,
        _TENSOR.requires_grad.__get__,
        _TENSOR.dim,
        _TENSOR.size,
        _TENSOR.numel,
        _TENSOR.is_floating_point,
    }
)


class Streamed(TorchFunctionMode):
    """While active, parameters on the meta device compute as float32 values of their sources.

    `sources` are by the identity of a parameter object, so that tied names need one, and must cover every parameter
    that is used: torch refuses to mix others with values.

    With float64 as `dtype`, whatever is float32 elsewhere is float64: buffers, inputs, and what the model's code itself
    asks to be computed in float32, as norms and rotations do.
    """

    def __init__(self, sources: dict[nn.Parameter, Source], dtype: torch.dtype = torch.float32):
        super().__init__()
        self._dtype = dtype
        self._sources = {id(parameter): source for parameter, source in sources.items()}
        self._parameters = tuple(sources)  # an identity is only one while its object lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._dtype is not torch.float32:
            func, args, kwargs = self._widened(func, args, kwargs)
        if func is torch._grouped_mm and self._dtype is torch.float64:
            func = _grouped_product
        if func == _TENSOR.dtype.__get__ and self._is_streamed(args[0]):
            return self._dtype
        if func in _OF_THE_SHAPE or not tree_any(self._is_streamed, (args, kwargs)):
            return func(*args, **kwargs)
        if func == _TENSOR.device.__get__:
            return torch.device("cpu")
        if func is F.linear and self._is_streamed(args[1]):
            return self._linear(*args, **kwargs)
        if func is F.embedding and self._is_streamed(args[1]):
            return func(args[0], self._sources[id(args[1])](), *args[2:], **kwargs).to(self._dtype)
        args, kwargs = tree_map(self._value, (args, kwargs))
        return func(*args, **kwargs)

    def _is_streamed(self, value: Any) -> bool:
        return id(value) in self._sources

    def _value(self, value: Any) -> Any:
        return self._sources[id(value)]().to(self._dtype) if self._is_streamed(value) else value

    def _widened(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """An operation in float64 in the place of one in float32; what it writes to stays what it is."""
        if func is _TENSOR.float:
            return _TENSOR.to, (args[0], self._dtype), {}
        if func in _OF_THE_SHAPE or func == _TENSOR.device.__get__ or _writes(func):
            return func, args, kwargs
        return func, *tree_map(self._wide, (args, kwargs))

    def _wide(self, value: Any) -> Any:
        if value is torch.float32:
            return self._dtype
        is_narrow = isinstance(value, torch.Tensor) and not self._is_streamed(value) and value.dtype is torch.float32
        return value.to(self._dtype) if is_narrow else value

    def _linear(self, inputs: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        """A linear layer, in parts of its output: a head in half precision never exists as a whole in float32."""
        inputs, bias, weight = self._value(inputs), self._value(bias), self._sources[id(weight)]()
        if weight.numel() <= PART_ELEMENTS:
            return F.linear(inputs, weight.to(self._dtype), bias)
        output = inputs.new_empty(*inputs.shape[:-1], len(weight))
        for rows in row_parts(weight):
            output[..., rows] = F.linear(inputs, weight[rows].to(self._dtype), None if bias is None else bias[rows])
        return output


def _grouped_product(rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    """`torch._grouped_mm`, which takes no float64: each expert's matrix times the rows up to its offset."""
    output = rows.new_zeros(len(rows), matrices.shape[-1])
    bounds = [0, *offs.tolist()]
    for matrix, start, end in zip(matrices, bounds[:-1], bounds[1:], strict=True):
        output[start:end] = rows[start:end] @ matrix
    return output


def _writes(func: Any) -> bool:
    """Whether an operation changes its first argument."""
    return func is _TENSOR.__setitem__ or (func.__name__.endswith("_") and not func.__name__.endswith("__"))


def row_parts(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension, each of about `PART_ELEMENTS` elements, at least a row."""
    rows = max(1, PART_ELEMENTS * len(tensor) // max(1, tensor.numel()))
    return (slice(start, start + rows) for start in range(0, len(tensor), rows))


def return_freed_memory() -> None:
    """Tell glibc to give blocks of a MiB and more back as soon as they are freed, from now on.

    It raises its limit for doing so to 32 MiB by itself, and then keeps hundreds of MiB of freed weights and logits
    (measured: 930 MiB at the peak of a 1.7 B decoder's forward, in place of 750). Other allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
