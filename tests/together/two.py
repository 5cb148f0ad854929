"""What `test_training.py` asks of two processes that torchrun starts; the argument is a folder for the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model
from safetensors.torch import save_file

from peft_subspace import PelaConfig
from peft_subspace.task_vectors.locks import held
from peft_subspace.training import Healing, HealingTrainer, MergeArguments, MergeTrainer, Task
from tests.flows.test_trainer import arguments_for, examples
from tests.methods import METHODS, Method
from tests.pico import MODELS, output
from tests.processes import leave
from tests.training import ddp_merge

PATIENCE = 2
PICO = MODELS["mlp"]


def apart(rank: int, count: int) -> float:
    """An accuracy that rises for one process and falls for the other, which has a little more to say."""
    return 0.5 + 0.02 * count if rank == 0 else 0.5 - 0.03 * count


def run_of(
    method: Method,
    accelerator: Accelerator,
    folder: Path | None,
    evaluate: Callable[[int, int], float],
    pool: dict[str, str] | None = None,
    **fields: Any,
) -> MergeTrainer:
    """A run that looks after each step, with rows of its own in each process; `own` has what it has seen itself."""
    rank, own = accelerator.process_index, list[float]()

    def measured(_: Any) -> dict[str, float]:
        own.append(evaluate(rank, len(own)))
        return {"accuracy": own[-1]}

    torch.manual_seed(0)
    config = method.make(PICO, **{**method.steady, **({} if pool is None else {"pool": pool})})
    model = get_peft_model(PICO.model(), config)
    given = {
        "mask_steps": 6, "mask_lr": 0.5, "coefficient_steps": 6, "coefficient_lr": 0.1, "eval_every": 1, "eval_batches": 1,
        "patience": PATIENCE, "output_dir": None if folder is None else str(folder), **fields,
    }  # fmt: skip
    tasks = [Task("one", [PICO.batch(seed=10 * rank + seed) for seed in range(2)], output)]
    trainer = MergeTrainer(model, tasks, MergeArguments(**given), evaluate=measured, accelerator=accelerator, say=print)
    trainer.own = own  # type: ignore[attr-defined]
    return trainer


def refused(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was said"


def other_names(accelerator: Accelerator) -> str:
    trainer = run_of(METHODS["ATLAS"], accelerator, None, apart)
    trainer.evaluate = lambda _: {f"accuracy {accelerator.process_index}": 1.0}
    return refused(trainer.train)


def locked(accelerator: Accelerator, folder: Path) -> str:
    """As if another run had the folder."""
    folder.mkdir(exist_ok=True)
    trainer = run_of(METHODS["ATLAS"], accelerator, folder, apart)
    if not accelerator.is_main_process:
        return refused(trainer.train)
    with held(folder / "checkpoint.lock"):
        return refused(trainer.train)


def heal(folder: Path) -> tuple[list[dict[str, float]], list[float]]:
    """Three steps of PELA's healing; what the Trainer logs, and the first loss of this process alone."""
    torch.manual_seed(0)
    pico = MODELS["bert"]
    model = get_peft_model(pico.model(), PelaConfig(**{"r": 2, **pico.targets}))
    healing = Healing(alpha=1.0, beta=0.5, gamma=0.1)
    settings = arguments_for(folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no")
    trainer = HealingTrainer(healing=healing, model=model, args=settings, train_dataset=examples("bert"))
    own, compute = [], trainer.compute_loss

    def noted(*arguments: Any, **options: Any) -> Any:
        loss = compute(*arguments, **options)
        own.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = noted  # type: ignore[method-assign]
    trainer.train()
    assert trainer.args.world_size == 2
    return [entry for entry in trainer.state.log_history if "loss" in entry], own


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    report: dict[str, Any] = {"world": accelerator.num_processes}
    for name, method in METHODS.items():
        if not method.composes:
            continue
        for select in ("best", "metric"):
            key = f"{name}, {select}"
            trainer = run_of(method, accelerator, folder / key, apart, select=select)
            looks = [asdict(look) for look in trainer.train()]
            save_file(ddp_merge.tensors(trainer), folder / f"{key}-{rank}.safetensors")
            found = {"looks": looks, "own": trainer.own, "selected": asdict(trainer.selected)}  # type: ignore[attr-defined]
            report[key] = gather_object([found])
            report[f"{name}, pool"] = trainer.model.peft_config["default"].pool
    report["other names"] = gather_object([other_names(accelerator)])
    report["locked"] = gather_object([locked(accelerator, folder / "locked")])
    logged, own = heal(folder / "healing")
    report["healing"], report["own rows"] = logged, [losses[0] for losses in gather_object([own])]
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
