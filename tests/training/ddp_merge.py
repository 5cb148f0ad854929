"""A merge that several processes learn; `test_merge_trainer.py` starts it with torchrun, and calls `learn` for one process.

The argument is a folder: for the pool that is there, for the checkpoints, and for what each process has learned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import save_file

from peft_subspace import ConcreteConfig
from peft_subspace.training import MergeArguments, MergeTrainer, Task
from tests.pico import MODELS, output
from tests.processes import leave

BATCHES = 4


def learn(folder: Path, accelerator: Accelerator, sampled: bool, resume: bool = False) -> MergeTrainer:
    """A mask and coefficients of layers, on two batches a step of two tasks.

    A sample's noise belongs to the bits of the logits, which one process and two do not share: only without it they compare.
    """
    pico = MODELS["mlp"]
    pool = {path.stem: str(path) for path in sorted((folder / "pool").iterdir())}
    config = ConcreteConfig(pool=pool, learn_coefficients="layer", stochastic=sampled)
    batches = [[pico.batch(seed=BATCHES * k + seed) for seed in range(BATCHES)] for k in range(2)]
    tasks = [Task(f"task{k}", given, output) for k, given in enumerate(batches)]
    arguments = MergeArguments(
        mask_steps=4, mask_lr=0.1, inner_lr=0.1, coefficient_steps=4, coefficient_lr=0.05, eval_every=2, save_every=2,
        accumulation=2 // accelerator.num_processes, output_dir=str(folder / f"learned-{accelerator.num_processes}-{sampled}"),
    )  # fmt: skip
    trainer = MergeTrainer(get_peft_model(pico.model(), config), tasks, arguments, accelerator=accelerator)
    trainer.train(resume=resume)
    return trainer


def tensors(trainer: MergeTrainer) -> dict[str, Any]:
    """What was learned, by place."""
    return {str(place): tensor.detach().clone() for place, tensor in enumerate((*trainer.masks, *trainer.coefficients))}


def main(folder: Path) -> None:
    """Learn without noise and with it; then go on from the last checkpoint: nothing is left to do, and the same is there."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name in ("plain", "sampled", "resumed"):
        trainer = learn(folder, accelerator, sampled=name != "plain", resume=name == "resumed")
        save_file(tensors(trainer), folder / f"{name}-{accelerator.process_index}.safetensors")
        losses = [look.mean for look in trainer.history]
        (folder / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(losses))
        accelerator.wait_for_everyone()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
