"""ZeRO-3 of DeepSpeed in two processes, by its engine and by the Trainer; the argument is a folder for the reports.

Every parameter is cut, small ones too, and gradients are not clipped: DeepSpeed 0.19 clips them to a norm of 1 if not told.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import save_file
from torch import Tensor

from tests.distributed.steps import ZERO_NAMES, adam, adapted, evaluated, half_of, squares, take_steps
from tests.flows import test_trainer
from tests.methods import METHODS, Method
from tests.processes import leave

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def take_engine_steps(engine: Any, name: str) -> list[float]:
    losses = []
    for _ in range(4):
        loss = squares(name)(engine, half_of(dist.get_rank()))
        engine.backward(loss)
        engine.step()
        total: Tensor = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def compare(method: Method, name: str) -> dict[str, Any]:
    model, alone = adapted(method, name), adapted(method, name)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=copy.deepcopy(CONFIG))
    cut = [tuple(p.shape) != tuple(p.ds_shape) for p in model.parameters()]
    losses = take_engine_steps(engine, name)
    expected = take_steps(alone, squares(name), adam(alone))
    return {"losses": losses, "expected": expected, "cut": all(cut)}


def train_by_trainer(method: Method, folder: Path) -> list[float]:
    """Six steps of two rows on each process, with a checkpoint in the middle, from which a second run goes on."""
    for run, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-3"))):
        model = test_trainer.adapted("llama", method, dropout=0.0, **method.steady)
        options: dict[str, Any] = {"deepspeed": copy.deepcopy(CONFIG), "max_grad_norm": 0.0, "save_steps": 3}
        trainer = test_trainer.trainer("llama", folder / run, model, per_device_train_batch_size=2, **options)
        assert trainer.args.world_size == 2
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(trainer.model_wrapped, DeepSpeedEngine)
        result = evaluated(trainer.model_wrapped.module, "llama")  # of shares: both processes take part
        if dist.get_rank() == 0:
            save_file({"output": result.contiguous()}, folder / run / "output.safetensors")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == 2
    report: dict[str, Any] = {"world": dist.get_world_size(), "models": {}, "trainer": {}}
    for kind, method in METHODS.items():
        report["models"] |= {f"{kind}, {name}": compare(method, name) for name in ZERO_NAMES}
    for kind, method in METHODS.items():
        report["trainer"][kind] = train_by_trainer(method, folder / kind)
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
