"""Everything that a refused adapter must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.pico import MODELS, output


def mixed_model(name: str) -> nn.Module:
    """A pico model in train mode with trainable and frozen parameters, so that a lost flag shows."""
    model = MODELS[name].model().train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    return model


def state(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Module and parameter objects by name, their flags, and the outputs in eval mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    with torch.no_grad():
        outputs = output(model, batch)
    for name, module in model.named_modules():
        module.training = modes[name]
    return {
        "modules": {name: (type(module).__name__, id(module)) for name, module in model.named_modules()},
        "modes": modes,
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "values": {name: tensor.sum().item() for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "configs": sorted(getattr(model, "peft_config", {})),
        "attributes": sorted(vars(model)),
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "outputs": outputs.tolist(),
    }


@contextmanager
def unchanged(model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
    """Assert that the model after the block is the model before it."""
    before = state(model, batch)
    yield
    after = state(model, batch)
    for what, value in before.items():
        assert after[what] == value, what
