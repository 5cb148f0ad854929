"""What the scripts of this folder share: training by two processes on half of the batch each, and by one on all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_subspace.training import Healing
from tests.methods import Method
from tests.pico import MODELS, SAMPLES, output

ZERO_NAMES = ["llama", "bert", "moe"]  # here, because `zero.py` cannot be imported without DeepSpeed
# with its four steps of Adam: a random mask on routers sends tokens elsewhere (one process alone does the same)
RISES = ("CONCRETE, moe",)
Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, slice], Tensor]


def adapted(method: Method, name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> PeftModel:
    """A random adapter on a pico model, in train mode; the same values in every process with the same seed."""
    torch.manual_seed(seed)
    config = method.make(MODELS[name], **{"init_weights": False, **MODELS[name].targets, **method.steady, **fields})
    return get_peft_model(MODELS[name].model(dtype), config).train()


def squares(name: str, dtype: torch.dtype = torch.float32) -> Objective:
    """The mean squared distance to a fixed target over some rows: a mean of the halves' means is the mean of all."""
    batch = MODELS[name].batch(dtype)
    with torch.random.fork_rng():
        shape = output(MODELS[name].model(), MODELS[name].batch()).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def objective(model: nn.Module, rows: slice) -> Tensor:
        found = output(model, {key: value[rows] for key, value in batch.items()})
        return (found.float() - target[rows]).square().mean()

    return objective


def healing(name: str) -> Objective:
    """PELA's, without labels: no loss asks for the head, of which DDP waits for a gradient all the same."""
    batch, loss = MODELS[name].batch(), Healing(task=0.0, gamma=0.1, mode="topk")
    return lambda model, rows: loss(model, {key: value[rows] for key, value in batch.items()})[0]


def half_of(rank: int) -> slice:
    """The rows of one of two processes."""
    return slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(trained(model), lr=1e-2)


def take_steps(
    model: nn.Module,
    objective: Objective,
    optimizer: Any,
    rows: slice = slice(None),
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
    backward: Callable[[Tensor], None] = Tensor.backward,
    count: int = 4,
) -> list[float]:
    """The losses over all rows, of which this process has some; `mean` averages over the processes."""
    losses = []
    for _ in range(count):
        loss = objective(model, rows)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(mean(loss.detach()).item())
    return losses


def largest_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs if a.numel())


def evaluated(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output in eval mode for all rows."""
    with torch.no_grad():
        return output(model.eval(), MODELS[name].batch(dtype)).clone()
