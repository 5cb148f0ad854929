"""Mixed precision: float32, bfloat16 and float16 with a scaler, under autocast and with a base in the narrow dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from tests.methods import Method, each_method
from tests.pico import MODELS, loss

pytestmark = pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense")  # depthwise convolutions
NAMES = ["llama", "bert", "conv"]
# Relative error of the losses: roundings of 2^-9 (bfloat16) or 2^-11 (float16) in every layer, forward and backward.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}
each_narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def adapted(method: Method, name: str, rounded: torch.dtype = torch.float32, dtype: torch.dtype | None = None) -> Any:
    """The base's weights are rounded to one dtype and kept in it, or in another."""
    model = MODELS[name].model(rounded).to(dtype or rounded)
    torch.manual_seed(10)
    return get_peft_model(model, method.make(MODELS[name], init_weights=False, **MODELS[name].targets, **method.steady)).train()


def train(
    model: nn.Module,
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    scale: float = 2.0**10,
    steps: int = 4,
    autocast: bool = True,
) -> Any:
    """The losses, the optimizer's parameters and the scaler, which only float16 needs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast and dtype != torch.float32):
            value = loss(model, batch)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
    return losses, parameters, scaler


@each_method
@pytest.mark.parametrize("name", NAMES)
@each_narrow
def test_autocast_trains_as_float32_does(method: Method, name: str, dtype: torch.dtype) -> None:
    batch = MODELS[name].batch()
    expected, _, _ = train(adapted(method, name), batch, torch.float32)
    losses, parameters, scaler = train(adapted(method, name), batch, dtype)
    assert losses == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert losses != expected, "autocast was on"
    assert losses[-1] < losses[0]
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
    assert not scaler.is_enabled() or scaler.get_scale() == 2.0**10, "no step overflowed"


@each_method
@pytest.mark.parametrize("name", ["llama", "conv"])  # not bert: its head, trained whole, would have gradients in float16
@each_narrow
def test_a_narrow_base_trains_a_float32_adapter(method: Method, name: str, dtype: torch.dtype) -> None:
    """As a base in float32 with the same, rounded, weights does; without autocast."""
    expected, _, _ = train(adapted(method, name, dtype, torch.float32), MODELS[name].batch(), torch.float32)
    losses, parameters, _ = train(adapted(method, name, dtype), MODELS[name].batch(dtype), dtype, autocast=False)
    assert losses == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert losses != expected
    assert {p.dtype for p in parameters} == {torch.float32}


@each_method
def test_a_step_that_overflows_is_left_out(method: Method) -> None:
    """The scaler sees infinite gradients of the adapter, changes nothing and lowers its scale until they are finite."""
    model = adapted(method, "llama")
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    _, _, scaler = train(model, MODELS["llama"].batch(), torch.float16, scale=2.0**60, steps=1)
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
