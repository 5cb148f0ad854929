"""Training by two processes; `test_ddp.py` starts it with torchrun, the argument is a folder for the report."""

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

from tests.flows.test_trainer import adapted, trainer
from tests.methods import METHODS
from tests.pico import MODELS, SAMPLES, output

NAMES = ["llama", "bert", "mha", "moe", "conv"]
TRAINED = ["llama", "resnet"]


def targets(name: str) -> Tensor:
    shape = output(MODELS[name].model(), MODELS[name].batch()).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def train(model: Any, rows: slice, name: str, reduce: Any, optimizer: Any, backward: Any) -> list[float]:
    """Four steps on some rows of the batch; the loss over all rows."""
    batch, target, losses = MODELS[name].batch(), targets(name), []
    for _ in range(4):
        loss = (output(model, {key: value[rows] for key, value in batch.items()}) - target[rows]).square().mean()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(reduce(loss.detach()).item())
    return losses


def compare(accelerator: Accelerator, method: str, name: str) -> dict[str, Any]:
    """The same training by two processes on two rows each, and by one on four."""
    torch.manual_seed(accelerator.process_index)  # DDP makes the ranks equal
    config = METHODS[method].make(MODELS[name], init_weights=False, **MODELS[name].targets)
    model = get_peft_model(MODELS[name].model(), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    alone = copy.deepcopy(model)
    again = torch.optim.Adam([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    half = SAMPLES // 2
    mine = slice(accelerator.process_index * half, (accelerator.process_index + 1) * half)
    losses = train(wrapped, mine, name, lambda x: accelerator.reduce(x, "mean"), prepared, accelerator.backward)
    expected = train(alone, slice(None), name, lambda x: x, again, Tensor.backward)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    ranks = [accelerator.gather(p.detach().flatten()[None]) for p in model.parameters() if p.requires_grad]
    spread = max((both[0] - both[1]).abs().max().item() for both in ranks)
    broadcast = [name for name, _ in model.named_buffers() if name not in wrapped.parameters_to_ignore and "_delta" in name]
    frozen = [accelerator.gather(buffer.flatten()[None]) for name, buffer in model.named_buffers() if "_delta" in name]
    spread = max([spread, *((both[0] - both[1]).abs().max().item() for both in frozen if both.numel())])
    return {"losses": losses, "expected": expected, "difference": difference, "spread": spread, "broadcast": broadcast}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    report: dict[str, Any] = {"world": accelerator.num_processes, "models": {}}
    for method in METHODS:
        report["models"] |= {f"{method}, {name}": compare(accelerator, method, name) for name in NAMES}
    for name in TRAINED:
        ran = trainer(name, folder / name, adapted(name, dropout=0.0), per_device_train_batch_size=2, save_steps=6)
        assert ran.args.world_size == 2
        ran.train()
        report[name] = [entry["loss"] for entry in ran.state.log_history if "loss" in entry]
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
