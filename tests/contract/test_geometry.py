"""The operators that every method builds on, and what `describe` says of a layer, against the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_subspace.base import Geometry, describe
from peft_subspace.base.convolution import add_low_rank_convolution
from peft_subspace.functional import tucker
from tests.pico import LAYERS

CALLED = [name for name in LAYERS if name not in ("router", "experts", "conv, own forward", "embedding, scaled by one")]
CONVOLUTIONS = [name for name in CALLED if name.startswith(("conv", "transposed"))]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch, of such a base layer


def described(name: str) -> tuple[nn.Module, Geometry, Tensor]:
    """A layer without bias in float64, its geometry, and an input."""
    layer = LAYERS[name].model(torch.float64).layer
    if getattr(layer, "bias", None) is not None:
        layer.bias.zero_()
    return layer, describe(layer)["weight"], LAYERS[name].batch(torch.float64)["x"]


def random_factors(geometry: Geometry, rank: int = 2) -> tuple[Tensor, list[Tensor]]:
    """A core and a factor for every mode; modes smaller than the rank get their size."""
    ranks = [min(rank, size) for size in geometry.shape]
    factors = [torch.randn(size, r, dtype=torch.float64) for size, r in zip(geometry.shape, ranks, strict=True)]
    return torch.randn(ranks, dtype=torch.float64), factors


@pytest.mark.parametrize("name", CALLED)
def test_dense_is_the_layer(name: str) -> None:
    layer, geometry, x = described(name)
    weight = geometry.canonical(layer.weight)
    assert tuple(weight.shape) == geometry.shape
    assert torch.equal(geometry.native(weight), layer.weight)
    y = layer(x)
    torch.testing.assert_close(geometry.dense(x, weight, torch.zeros_like(y)), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLED)
def test_down_spatial_and_up_are_the_layer_in_steps(name: str) -> None:
    layer, geometry, x = described(name)
    core, factors = random_factors(geometry)
    if geometry.padding_idx is not None:
        factors[1][geometry.padding_idx] = 0  # as in the layer's own weight
    out = torch.randn_like(layer(x))
    z = geometry.down(x, factors[1])
    kernel = tucker.reconstruct(core, [None, None, *factors[2:]])
    if geometry.kernel:
        found = geometry.up(geometry.spatial(z, kernel, out), factors[0], out)
    else:
        found = geometry.up(z, factors[0] @ kernel, out)
    expected = geometry.dense(x, tucker.reconstruct(core, factors), out)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_gradients_of_the_low_rank_convolution(name: str, frozen: bool) -> None:
    """With respect to every input, against autograd on the dense weight; only the input's when the adapter is frozen."""
    layer, geometry, x = described(name)
    core, factors = random_factors(geometry)
    out = torch.randn_like(layer(x))
    inputs = [out, x, *(() if frozen else (core, *factors))]
    for tensor in inputs:
        tensor.requires_grad_()
    found = add_low_rank_convolution(geometry, out, x, core, factors, -0.7)
    expected = geometry.dense(x, -0.7 * tucker.reconstruct(core, factors), out)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, inputs, grad) for y in (found, expected))
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["conv, stride", "conv, groups, reflect", "transposed2d"])
def test_gradcheck_of_the_low_rank_convolution(name: str) -> None:
    layer, geometry, x = described(name)
    core, factors = random_factors(geometry)
    inputs = [tensor[:1, :, :5, :5].contiguous() if tensor is x else tensor for tensor in (x, core, *factors)]
    out = torch.randn_like(layer(inputs[0]))
    inputs = [tensor.requires_grad_() for tensor in (out, *inputs)]

    def call(out: Tensor, x: Tensor, core: Tensor, *factors: Tensor) -> Tensor:
        return add_low_rank_convolution(geometry, out, x, core, factors, 0.5)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    "name", ["conv2d", "conv3d", "conv, stride", "conv, pointwise, stride", "conv, groups", "transposed2d"]
)
def test_channels_last_stays_channels_last(name: str) -> None:
    layer, geometry, x = described(name)
    core, factors = random_factors(geometry)
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    out = torch.randn_like(layer(x))
    expected = add_low_rank_convolution(geometry, out, x, core, factors)
    found = add_low_rank_convolution(
        geometry, out.to(memory_format=memory_format), x.to(memory_format=memory_format), core, factors
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert found.is_contiguous(memory_format=memory_format) == (geometry.groups == 1)  # a group's channels are not adjacent
    assert expected.is_contiguous()


def test_what_is_not_supported_is_not_described() -> None:
    for module in (nn.LayerNorm(4), nn.EmbeddingBag(4, 4), nn.Bilinear(2, 2, 2), nn.Identity()):
        assert describe(module) == {}
