"""vlm_export.tensors.streaming: a model without weights computes what the loaded one does, a tensor at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm_export.tensors import streaming
from vlm_export.tensors.streaming import Streamed


class Mixed(nn.Module):
    """Ways to read a parameter: by its own module, by another one, in an expression, through a tie, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.position = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.empty(6))
        self.head = nn.Linear(6, 40)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids) + self.position.weight.reshape(1, 5, 6)
        hidden = self.convolution(hidden.transpose(1, 2)).transpose(1, 2) * self.scale
        ones = torch.ones(5, device=self.scale.device, dtype=self.scale.dtype)
        hidden = self.attention(hidden, hidden, hidden)[0] + ones[:, None]
        return self.head(hidden) + F.linear(hidden, self.embedding.weight)


@pytest.fixture
def models() -> tuple[Mixed, Mixed, dict[nn.Parameter, torch.Tensor]]:
    """A model in memory, one on the meta device, and the values of the latter's parameters."""
    torch.manual_seed(0)
    loaded = Mixed().eval()
    for parameter in loaded.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.device("meta"):
        empty = Mixed().eval()
    names = dict(loaded.named_parameters())
    return loaded, empty, {parameter: names[name].detach() for name, parameter in empty.named_parameters()}


IDS = torch.tensor([[0, 39, 7, 7, 1], [5, 4, 3, 2, 1]])


@torch.no_grad()
@pytest.mark.parametrize("part_elements", [1 << 24, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_the_loaded_model_does(
    models: tuple[Mixed, Mixed, dict[nn.Parameter, torch.Tensor]],
    dtype: torch.dtype,
    part_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "PART_ELEMENTS", part_elements)
    loaded, empty, values = models
    for parameter in loaded.parameters():
        parameter.copy_(parameter.to(dtype))
    with Streamed({parameter: lambda value=value: value.to(dtype) for parameter, value in values.items()}):
        streamed = empty(IDS)
    assert streamed.dtype == torch.float32
    torch.testing.assert_close(streamed, loaded(IDS), atol=1e-4, rtol=1e-4)
    assert all(parameter.is_meta for parameter in empty.parameters())


@torch.no_grad()
def test_one_tensor_is_alive_at_a_time(models: tuple[Mixed, Mixed, dict[nn.Parameter, torch.Tensor]]) -> None:
    _, empty, values = models
    alive, peaks = [0], []

    def source(value: torch.Tensor) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            copy = value.clone()
            alive[0] += copy.numel()
            peaks.append(alive[0])
            weakref.finalize(copy.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - copied))
            return copy

        copied = value.numel()
        return load

    with Streamed({parameter: source(value) for parameter, value in values.items()}):
        empty.head(torch.ones(1, 5, 6))
        empty.convolution(torch.ones(1, 6, 5))
        empty.embedding(IDS)
    assert alive == [0]
    assert len(peaks) == 5
    assert max(peaks) == values[empty.head.weight].numel() + values[empty.head.bias].numel()


@torch.no_grad()
def test_what_has_no_source_is_not_computed(
    models: tuple[Mixed, Mixed, dict[nn.Parameter, torch.Tensor]],
) -> None:
    _, empty, values = models
    del values[empty.scale]
    with (
        Streamed({parameter: lambda value=value: value for parameter, value in values.items()}),
        pytest.raises(RuntimeError, match="meta"),
    ):
        empty(IDS)


class Narrowing(nn.Module):
    """Asks for float32 in the ways that norms, rotations, attention and routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 6))
        self.register_buffer("frequencies", torch.linspace(0.1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.to(torch.float32) / x.float().square().mean()
        rotated = hidden @ (self.frequencies[:, None].float() * self.weight)
        kept = torch.zeros(5, 6, dtype=self.weight.dtype)
        kept[:] = F.softmax(rotated, dim=-1, dtype=torch.float32)
        return F.linear(kept, self.weight) + self.frequencies


@torch.no_grad()
def test_float64_throughout() -> None:
    torch.manual_seed(0)
    value, x = torch.randn(6, 6), torch.randn(5, 6)
    with torch.device("meta"):
        model = Narrowing()
    model.frequencies = torch.linspace(0.1, 1, 6)
    with Streamed({model.weight: lambda: value}, torch.float64):
        made = model(x)
    wide, weight, frequencies = x.double(), value.double(), model.frequencies.double()
    shares = ((wide / wide.square().mean()) @ (frequencies[:, None] * weight)).softmax(-1)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made, shares @ weight.T + frequencies, rtol=1e-14, atol=1e-14)


@torch.no_grad()
def test_products_of_experts_in_float64() -> None:
    torch.manual_seed(0)
    rows, matrices, offsets = torch.randn(7, 4), torch.randn(3, 4, 8), torch.tensor([2, 2, 7], dtype=torch.int32)
    empty = nn.Parameter(torch.empty(3, 4, 8, device="meta"))
    with Streamed({empty: lambda: matrices}, torch.float64):
        made = torch._grouped_mm(rows, empty, offs=offsets)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made.float(), torch._grouped_mm(rows, matrices, offs=offsets))
