"""DDP by accelerate in two processes, by a loop of one's own and by the Trainer; the argument is a folder for the reports."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.steps import (
    Objective,
    adam,
    adapted,
    evaluated,
    half_of,
    healing,
    largest_difference,
    squares,
    take_steps,
    trained,
)
from tests.flows import test_trainer
from tests.methods import METHODS, Method
from tests.pico import MODELS
from tests.processes import leave

NAMES = ["llama", "bert", "mha", "moe", "conv"]
HEALED = ["llama", "bert"]
SAVED = "bert"  # with a head that is trained whole


def heads(name: str) -> dict[str, Any]:
    return {"init_weights": True, "task_type": None, "modules_to_save": ["lm_head" if name == "llama" else "classifier"]}


def compare(accelerator: Accelerator, model: Any, objective: Objective, folder: Path | None = None) -> dict[str, Any]:
    """The same training by two processes on two rows each, and by one on four."""
    wrapped, optimizer = accelerator.prepare(model, adam(model))
    assert isinstance(wrapped, DistributedDataParallel)
    alone = copy.deepcopy(model)
    rank, mean = accelerator.process_index, lambda loss: accelerator.reduce(loss, "mean")
    half: Any = (wrapped, objective, optimizer, half_of(rank), mean, accelerator.backward)
    report: dict[str, Any] = {"losses": take_steps(*half), "expected": take_steps(alone, objective, adam(alone))}
    report["difference"] = largest_difference(model.parameters(), alone.parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if "_delta" in name}
    ranks = [accelerator.gather(t.detach().flatten()[None]) for t in [*trained(model), *buffers.values()] if t.numel()]
    report["spread"] = max((both[0] - both[1]).abs().max().item() for both in ranks)
    report["broadcast"] = [name for name in buffers if name not in wrapped.parameters_to_ignore]
    if folder is not None:
        accelerator.save_state(str(folder / "state"))
        if accelerator.is_main_process:
            model.save_pretrained(str(folder))
            save_file({"output": evaluated(model, SAVED).contiguous()}, folder / "output.safetensors")
        went_on = take_steps(*half)
        accelerator.load_state(str(folder / "state"))
        report["resumed"] = [take_steps(*half), went_on]
    for prepared in (accelerator._models, accelerator._optimizers):
        prepared.clear()  # the next `save_state` is another model's
    return report


def train_by_trainer(method: Method, folder: Path) -> list[float]:
    """Six steps of two rows on each process, with a checkpoint in the middle, from which a second run goes on."""
    for run, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-3"))):
        model = test_trainer.adapted("llama", method, dropout=0.0, **method.steady)
        trainer = test_trainer.trainer("llama", folder / run, model, per_device_train_batch_size=2, save_steps=3)
        assert trainer.args.world_size == 2
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    report: dict[str, Any] = {"world": accelerator.num_processes, "models": {}, "trainer": {}}
    for kind, method in METHODS.items():
        for name in NAMES:
            # DDP makes ranks equal that start with other values
            model = adapted(method, name, seed=accelerator.process_index)
            place = folder / kind if name == SAVED else None
            report["models"][f"{kind}, {name}"] = compare(accelerator, model, squares(name), place)
        report["trainer"][kind] = train_by_trainer(method, folder / kind)
    for name in HEALED:
        targets = {key: value for key, value in MODELS[name].targets.items() if key == "target_modules"}
        model = adapted(METHODS["PELA"], name, seed=accelerator.process_index, **heads(name), **targets)
        report["models"][f"healing, {name}"] = compare(accelerator, model, healing(name))
    torch.manual_seed(0)
    resnet = test_trainer.trainer("resnet", folder / "resnet", per_device_train_batch_size=2, save_steps=6)
    resnet.train()
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
