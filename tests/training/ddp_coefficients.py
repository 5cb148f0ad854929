"""Objectives by two processes; `test_coefficients.py` starts it with torchrun, the argument is a folder for the report."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from peft_subspace import AtlasConfig
from peft_subspace.training import Entropy, Moment, Negation, Ufm
from tests.pico import MODELS, SAMPLES
from tests.pools import vector_of, write_vector
from tests.processes import leave


def halved(inputs: Any) -> dict[str, Tensor]:
    """A strong view: the last tokens are not looked at."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -2:] = 0
    return {**inputs, "attention_mask": mask}


def learn(model: Any, objective: Any, rows: slice, optimizer: Any, backward: Any, reduce: Any) -> list[float]:
    """Four steps on some rows of two batches, one of them the control set; the loss over all rows."""
    labels = torch.tensor([0, 1, 2, 3])[:SAMPLES]
    batch, control = ({key: value[rows] for key, value in MODELS["bert"].batch(seed=seed).items()} for seed in (0, 1))
    batch, control = ({**each, "labels": labels[rows]} for each in (batch, control))
    losses = []
    for _ in range(4):
        loss, _ = objective(model, batch, Moment(0.0, torch.arange(SAMPLES)[rows], control))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(reduce(loss.detach()).item())
    return losses


def compare(accelerator: Accelerator, objective: Any, pool: dict[str, str]) -> dict[str, Any]:
    """The same steps by two processes on half of the rows each, and by one on all."""
    model = get_peft_model(MODELS["bert"].model(), AtlasConfig(pool=pool)).train()
    alone = copy.deepcopy(model)
    optimizer, again = (torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, alone))
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    half = SAMPLES // 2
    mine = slice(accelerator.process_index * half, (accelerator.process_index + 1) * half)
    losses = learn(wrapped, objective, mine, prepared, accelerator.backward, lambda x: accelerator.reduce(x, "mean"))
    expected = learn(alone, objective, slice(None), again, Tensor.backward, lambda x: x)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return {"losses": losses, "expected": expected, "difference": max((a - b).abs().max().item() for a, b in pairs)}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    own = folder / f"pool-{accelerator.process_index}"
    own.mkdir()
    vectors = [vector_of(MODELS["bert"].model(), seed) for seed in range(2)]
    pool = {f"task{t}": write_vector(own / f"{t}.safetensors", vector) for t, vector in enumerate(vectors)}
    ufm = Ufm(halved, start=0.0)  # every row is sure: a mean over all rows is the mean of the halves' means
    report = {type(one).__name__: compare(accelerator, one, pool) for one in (Negation(), Entropy(), ufm)}
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps({"world": accelerator.num_processes, "objectives": report}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
