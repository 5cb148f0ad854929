"""The original model for a while, without touching anything that the user has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """The original model for a while: adapters and trained copies of modules off, eval mode, no gradients.

    Nothing that PEFT's `disable_adapter` would touch is touched (it switches `requires_grad` of the active adapter off and on,
    also where the user had frozen it). The random state is put back, so that a model that draws inside its forward (the mask of
    a masked autoencoder) draws the same for the student, as long as nothing else draws before it.
    """
    switches: list[Any] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [switch._disable_adapters for switch in switches]
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for switch in switches:
            switch._disable_adapters = True
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for switch, disabled in zip(switches, before, strict=True):
            switch._disable_adapters = disabled
        for module, mode in modes.items():
            module.training = mode
