"""An operation in place behind an adapted layer, as in Conv-BN-ReLU(inplace=True) and residual `y += x`: it may write there."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import peft_subspace
from tests.methods import METHODS, Method, each_method
from tests.pico import LAYERS, Pico

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch, of such a base layer
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),  # depthwise convolutions
]
DTYPE = torch.float64


def adapted(method: Method, pico: Pico) -> Any:
    torch.manual_seed(10)
    base = pico.model(DTYPE)
    return get_peft_model(base, method.make(pico, **pico.targets, init_weights=False, **method.steady)).double().train()


def gradients(model: Any, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    result = call()
    weights = torch.linspace(-1, 1, result.numel(), dtype=DTYPE).view(result.shape)
    (result * weights).sum().backward()
    return result.detach(), {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert any(gradient is not None and bool(gradient.any()) for gradient in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@each_method
def test_behind_a_layer(method: Method, name: str, channels_last: bool) -> None:
    """Forward and backward are those of the same operations out of place."""
    if name in method.leaves:
        pytest.skip("the method refuses this layer: test_what_a_method_cannot_take_is_refused_by_name")
    pico = LAYERS[name]
    model, batch = adapted(method, pico), pico.batch(DTYPE)
    x = batch["x"]
    if channels_last and x.ndim != 4:
        pytest.skip("has no channels last")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x = x.requires_grad_(True) if x.is_floating_point() else x

    def in_place() -> Tensor:
        y = model(x)
        y += 0.25
        return y.mul_(3).relu_()

    expected = gradients(model, lambda: torch.relu((model(x) + 0.25) * 3))
    assert_same(gradients(model, in_place), expected)
    with torch.no_grad():
        torch.testing.assert_close(in_place(), expected[0])


class Residual(nn.Module):
    """Conv-BN-ReLU, conv, a residual sum and ReLU, as in ResNet: all in place or none."""

    def __init__(self, width: int, in_place: bool, groups: int = 1) -> None:
        super().__init__()
        self.in_place = in_place
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 1)
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.norm(self.first(x))))
        if self.in_place:
            y += x
        else:
            y = y + x
        return self.act(y)


class Family(nn.Module):
    """What VGG (conv-ReLU), ResNet (residual) and MobileNetV3 (hard swish, squeeze and excitation, a head) have in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.vgg = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(in_place), nn.Conv2d(8, 8, 3, stride=2, padding=1))
        self.hard = nn.Hardswish(in_place)
        self.residual, self.grouped = Residual(8, in_place), Residual(8, in_place, groups=4)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.gate = nn.SiLU(in_place), nn.Hardsigmoid(in_place)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU6(in_place), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.residual(self.hard(self.vgg(x))))
        x = x * self.gate(self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


@each_method
def test_conv_families(method: Method) -> None:
    pico = Pico(lambda: Family(False), lambda: {"x": torch.randn(4, 3, 8, 8)}, {"target_modules": ["all-conv", "all-linear"]})
    x, found = pico.batch(DTYPE)["x"], []
    for in_place in (True, False):
        torch.manual_seed(0)
        base = Family(in_place).to(DTYPE).requires_grad_(False)
        torch.manual_seed(10)
        config = method.make(pico, **pico.targets, init_weights=False, **method.steady)
        model: Any = get_peft_model(base, config).double().train()
        found.append(gradients(model, lambda model=model: model(x)))
    assert_same(*found)


def functions() -> list[type[torch.autograd.Function]]:
    found: dict[str, type[torch.autograd.Function]] = {}
    for module in pkgutil.walk_packages(peft_subspace.__path__, "peft_subspace."):
        if module.name.endswith(("__main__", "triton_kernels")):
            continue
        for name, one in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(one, torch.autograd.Function) and one.__module__.startswith("peft_subspace"):
                found[name] = one
    return list(found.values())


def test_no_autograd_function_returns_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that the layers of all methods call; torch forbids to write into such an output."""
    views, called = [], set()

    def watch(one: Any, forward: Any) -> Any:
        def watched(ctx: Any, *args: Any) -> Any:
            result = forward(ctx, *args)
            called.add(one.__name__)
            if result._is_view():
                views.append(one.__name__)
            return result

        return staticmethod(watched)

    for one in functions():
        monkeypatch.setattr(one, "forward", watch(one, one.forward))
    for method in METHODS.values():
        for name in sorted({*LAYERS} - method.leaves):
            model = adapted(method, LAYERS[name])
            model(**LAYERS[name].batch(DTYPE))
    assert called >= {"_AddConvolution", "_AddLowRank", "_ScaleRows", "_ScaleColumns", "_Composed"}
    assert views == []
