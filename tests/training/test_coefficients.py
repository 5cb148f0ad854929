"""The trainer of coefficients: what each objective learns, gradient accumulation, a run that is resumed, accelerate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor

from peft_subspace import AtlasConfig
from peft_subspace.training import CoefficientTrainer, Entropy, InformationMaximization, Moment, Negation, Ufm
from peft_subspace.training.objectives import entropy_loss, information_maximization_loss
from tests.flows.test_trainer import arguments_for, examples
from tests.pico import MODELS
from tests.pools import pool_of
from tests.processes import REPOSITORY, run_python

ROWS = examples("bert")


def adapted(**fields: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(MODELS["bert"].model(seed=3), AtlasConfig(pool=pool_of(MODELS["bert"]), **fields))


def without_a_token(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A strong view: the last token is not looked at."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0
    return {**inputs, "attention_mask": mask}


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def measured(model: Any, rows: list[dict[str, Tensor]]) -> tuple[float, float, float]:
    """Cross-entropy, mean entropy, and that less the entropy of the mean."""
    batch = batch_of(rows)
    outputs = model.eval()(**batch)
    return float(outputs.loss), float(entropy_loss(outputs.logits)), float(information_maximization_loss(outputs.logits))


OBJECTIVES: dict[str, Any] = {
    "few labels": lambda: {},
    "negation": lambda: {"objective": Negation(), "control_dataset": ROWS[12:]},
    "entropy": lambda: {"objective": Entropy()},
    "information": lambda: {"objective": InformationMaximization()},
    "ufm": lambda: {"objective": Ufm(without_a_token, start=0.4, end=0.6, most=1)},
}


def trainer(folder: Path, name: str, model: Any = None, **arguments: Any) -> CoefficientTrainer:
    chosen = OBJECTIVES[name]()
    return CoefficientTrainer(
        model=adapted() if model is None else model,
        args=arguments_for(folder, **{"max_steps": 12, **arguments}),
        train_dataset=ROWS[:12],
        coefficient_lr=3e-2,
        **chosen,
    )


@pytest.mark.parametrize("name", ["few labels", "negation", "entropy", "information"])
def test_what_is_asked_for_is_learned(name: str, tmp_path: Path) -> None:
    before, run = adapted(), trainer(tmp_path, name)
    run.train()
    (target, entropy, information), after = measured(before, ROWS[:12]), measured(run.model, ROWS[:12])
    target_after = after[0]
    if name == "entropy":
        assert after[1] < 0.9 * entropy
    elif name == "information":
        assert after[2] < 1.1 * information < 0
    elif name == "few labels":
        assert target_after < 0.9 * target
    else:
        control, control_after = measured(before, ROWS[12:])[0], measured(run.model, ROWS[12:])[0]
        assert target_after - target > max(0.1, control_after - control)


def test_ufm_trusts_the_surest_row_of_each_class_and_fits_the_strong_view(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        sure = model.eval()(input_ids=batch_of(ROWS[:12])["input_ids"]).logits.softmax(-1)
    confidence, labels = sure.max(-1)
    best = {int(torch.where(labels == c, confidence, 0).argmax()): c for c in labels.unique().tolist()}
    run = trainer(tmp_path, "ufm", model, max_steps=3)
    run.train()
    assert run.objective.epoch == 0
    assert run.objective.trusted == best
    run = trainer(tmp_path, "ufm", max_steps=12)  # four epochs of three steps
    run.train()
    assert run.objective.epoch == 3
    batch = {name: value for name, value in batch_of(ROWS[:12]).items() if name != "labels"}
    moment = Moment(1.0, torch.arange(12))
    with torch.no_grad():
        losses = [float(run.objective(each, batch, moment)[0]) for each in (adapted().eval(), run.model.eval())]
    assert losses[1] < losses[0]


def test_coefficients_have_a_rate_of_their_own(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["classifier"], exclude_modules=["classifier"])
    run = trainer(tmp_path, "few labels", model, weight_decay=0.1)
    first, rest = run.create_optimizer().param_groups
    assert (first["lr"], rest["lr"]) == (3e-2, 1e-2)
    assert first["weight_decay"] == 0.1
    assert {p.numel() for p in first["params"]} == {2}
    assert len(rest["params"]) == 2


@pytest.mark.parametrize("name", ["negation", "entropy"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str, tmp_path: Path) -> None:
    """Means of equal parts, in another order of summation; plain steps of descent, because Adam magnifies a rounding."""
    models = []
    for size, parts in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 3}
        run = trainer(tmp_path, name, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant", **sizes)
        run.train()
        models.append(run.model)
    for a, b in zip(*(model.base_model.coefficients().values() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_is_the_run(name: str, tmp_path: Path) -> None:
    """Stopped within the second epoch of three steps: control batches and trusted rows go on where they were."""
    whole = trainer(tmp_path / "whole", name, max_steps=8, save_strategy="no")
    whole.train()
    part = trainer(tmp_path / "part", name, max_steps=8, save_steps=4)
    part.train()
    again = trainer(tmp_path / "part", name, max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    state = json.loads((tmp_path / "part" / "checkpoint-4" / "objective_state.json").read_text())
    assert state["calls"] == (4 if name == "negation" else 0)
    if name == "ufm":
        assert state["objective"]["epoch"] == 1
        assert again.objective.trusted == whole.objective.trusted
    pairs = zip(whole.model.base_model.coefficients().values(), again.model.base_model.coefficients().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loop_of_ones_own_with_accelerate() -> None:
    """Objectives are callables; nothing needs the trainer."""
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW(model.base_model.coefficient_groups(lr=3e-2))
    model, optimizer = accelerator.prepare(model, optimizer)
    ufm, batch = Ufm(without_a_token, start=0.4, most=1), batch_of(ROWS[:12])
    batch = {"input_ids": batch["input_ids"]}
    rows, losses = torch.arange(12), []
    with torch.no_grad():
        ufm.trust(rows, model(**batch).logits.softmax(-1), 0)
    for step in range(6):
        loss, _ = ufm(model, batch, Moment(step / 6, rows))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_negation_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Negation needs a control set: pass control_dataset"):
        CoefficientTrainer(model=adapted(), args=arguments_for(tmp_path), train_dataset=ROWS, objective=Negation())
    with pytest.raises(ValueError, match="Negation needs labelled inputs and a labelled control batch"):
        Negation()(adapted(), batch_of(ROWS[:4]), Moment())


def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    """Two forwards before one backward, through DDP."""
    script = REPOSITORY / "tests/training/ddp_coefficients.py"
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world"] == 2
    assert set(report["objectives"]) == {"Negation", "Entropy", "Ufm"}
    for name, found in report["objectives"].items():
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-4, abs=1e-5), name
        assert found["losses"][-1] < found["losses"][0], name
        assert found["difference"] < 1e-4, name
