"""Healing by two processes; `test_healing.py` starts it with torchrun, the argument is a folder for the report."""

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

from peft_subspace import PelaConfig
from peft_subspace.training import Healing
from tests.pico import MODELS, SAMPLES

NAMES = ["llama", "bert"]


def heal(model: Any, rows: slice, name: str, reduce: Any, optimizer: Any, backward: Any) -> list[float]:
    """Four steps on some rows of the batch; the loss over all rows."""
    batch = {key: value[rows] for key, value in MODELS[name].batch().items()}
    healing, losses = Healing(task=0.0, gamma=0.1, mode="topk"), []
    for _ in range(4):
        loss, _ = healing(model, batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(reduce(loss.detach()).item())
    return losses


def compare(accelerator: Accelerator, name: str) -> dict[str, Any]:
    """The same healing by two processes on two rows each, and by one on four."""
    torch.manual_seed(accelerator.process_index)
    targets = {key: value for key, value in MODELS[name].targets.items() if key != "modules_to_save"}
    config = PelaConfig(r=2, modules_to_save=["lm_head" if name == "llama" else "classifier"], **targets)
    model = get_peft_model(MODELS[name].model(), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    alone = copy.deepcopy(model)
    again = torch.optim.Adam([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    half = SAMPLES // 2
    mine = slice(accelerator.process_index * half, (accelerator.process_index + 1) * half)
    losses = heal(wrapped, mine, name, lambda x: accelerator.reduce(x, "mean"), prepared, accelerator.backward)
    expected = heal(alone, slice(None), name, lambda x: x, again, Tensor.backward)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    ranks = [accelerator.gather(p.detach().flatten()[None]) for p in model.parameters() if p.requires_grad]
    spread = max((both[0] - both[1]).abs().max().item() for both in ranks)
    return {"losses": losses, "expected": expected, "difference": difference, "spread": spread}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    report = {"world": accelerator.num_processes, "models": {name: compare(accelerator, name) for name in NAMES}}
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
