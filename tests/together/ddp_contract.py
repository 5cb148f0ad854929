"""DDP where processes start apart, and with activation checkpointing; the argument is the file for the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.steps import adam, half_of, squares, take_steps
from tests.methods import METHODS, Method
from tests.pico import MODELS, run
from tests.processes import leave

NAMES = ["bert", "mha"]
SHARED: dict[str, tuple[dict[str, Any], ...]] = {  # coefficients that layers have in common
    "ATLAS": ({"granularity": "task"},),
    "CONCRETE": ({"learn_coefficients": "task"},),
}


def everywhere(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def spread(tensor: Tensor) -> float:
    """How far apart the processes are."""
    first, second = everywhere(tensor.detach().float())
    return (first - second).abs().max().item()


def on_other_bases(method: Method, name: str) -> dict[str, float]:
    """Outputs before and after a step of DDP, of adapters that were put on another base in each process."""
    pico = MODELS[name]
    torch.manual_seed(0)
    fields = {"init_weights": False, **pico.targets, **method.steady}
    model = get_peft_model(pico.model(seed=dist.get_rank()), method.make(pico, **fields)).train()
    before = spread(run(model.eval(), pico.batch()))
    wrapped: Any = DistributedDataParallel(model.train(), find_unused_parameters=True)
    take_steps(wrapped, squares(name), adam(model), half_of(dist.get_rank()), count=2)
    return {"before": before, "after": spread(run(model.eval(), pico.batch()))}


def drift(method: Method, reentrant: bool, **fields: Any) -> dict[str, Any]:
    """Six steps with activation checkpointing and without a search for unused parameters: how far apart the processes are."""
    pico = MODELS["llama"]
    torch.manual_seed(0)
    model = get_peft_model(
        pico.model(), method.make(pico, **{"init_weights": False, **pico.targets, **method.steady, **fields})
    )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    wrapped: Any = DistributedDataParallel(model.train(), find_unused_parameters=False)
    try:
        take_steps(wrapped, squares("llama"), adam(model), half_of(dist.get_rank()), count=6)
    except ValueError as error:
        return {"error": str(error)}
    return {"spread": max(spread(p) for p in model.parameters() if p.requires_grad)}


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    report: dict[str, Any] = {"bases": {}}
    for kind, method in METHODS.items():
        if not method.composes:  # whose coefficients belong to the base that is in their config
            for name in NAMES:
                report["bases"][f"{kind}, {name}"] = on_other_bases(method, name)
    report["checkpointing"] = {
        f"{kind}, {fields}, {reentrant}": drift(METHODS[kind], reentrant, **fields)
        for kind, fields in ((kind, fields) for kind in METHODS for fields in ({}, *SHARED.get(kind, ())))
        for reentrant in (False, True)
    }
    if dist.get_rank() == 0:
        path.write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
