"""transformers' Trainer: checkpoints, resuming, the best model at the end, gradient checkpointing."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, output, train

State = dict[str, Tensor]


def examples(name: str, count: int = 24) -> list[dict[str, Tensor]]:
    """Rows with labels: the next token, or a class."""
    pico = MODELS[name]
    rows = []
    for i in range(count // 4):
        batch = pico.batch(seed=i)
        labels = batch["input_ids"] if name == "llama" else torch.randint(4, (4,))
        rows += [{**{key: value[j] for key, value in batch.items()}, "labels": labels[j]} for j in range(4)]
    return rows


def adapted(name: str, method: Method = METHODS["FLORA"], **fields: Any) -> PeftModel:
    torch.manual_seed(3)
    base = MODELS[name].model(seed=3)
    return get_peft_model(base, method.make(MODELS[name], **{"dropout": 0.1, **MODELS[name].targets, **fields}))


def arguments_for(folder: Path, **arguments: Any) -> TrainingArguments:
    """Six short steps on the CPU, every one logged; anything else by name."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "seed": 5,
            "dataloader_pin_memory": False,
            **arguments,
        }
    )


def trainer(name: str, folder: Path, model: Any = None, method: Method = METHODS["FLORA"], **arguments: Any) -> Trainer:
    args = arguments_for(folder, **arguments)
    rows = examples(name)
    return Trainer(adapted(name, method) if model is None else model, args, train_dataset=rows, eval_dataset=rows[:8])


def state(model: Any) -> State:
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@each_method
@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_resuming_ends_where_an_uninterrupted_run_ends(method: Method, name: str, tmp_path: Path) -> None:
    """With dropout, a head that is trained whole (bert, resnet) and BatchNorm statistics (resnet)."""
    whole = trainer(name, tmp_path / "whole", method=method, save_steps=3)
    start = state(whole.model)
    whole.train()
    end = state(whole.model)
    assert any(not torch.equal(start[key], end[key]) for key in end)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {path.name for path in checkpoint.iterdir()}
    assert not (checkpoint / "model.safetensors").exists()

    resumed = trainer(name, tmp_path / "resumed", method=method, save_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(state(resumed.model), end)
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in whole.state.log_history if "loss" in entry
    ]
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors")
    assert_same(saved, {key: tensor.contiguous() for key, tensor in end.items()})


@each_method
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_the_best_model_comes_back_at_the_end(method: Method, name: str, tmp_path: Path) -> None:
    """By a metric that is best at the third evaluation."""
    ran = trainer(
        name,
        tmp_path,
        method=method,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="closeness",
        greater_is_better=True,
    )
    evaluations = itertools.count(1)
    ran.compute_metrics = lambda prediction: {"closeness": -abs(next(evaluations) - 3)}
    ran.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in ran.state.log_history if "eval_loss" in entry}
    assert losses[3] != losses[6]
    assert ran.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert_same(state(ran.model), load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors"))
    assert ran.evaluate()["eval_loss"] == pytest.approx(losses[3], rel=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # the name that 5.0 knows
@each_method
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method: Method, use_reentrant: bool, tmp_path: Path) -> None:
    plain = trainer("llama", tmp_path / "plain", adapted("llama", method, dropout=0.0), save_strategy="no")
    plain.train()
    checkpointed = trainer(
        "llama",
        tmp_path / "checkpointed",
        adapted("llama", method, dropout=0.0),
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    checkpointed.train()
    expected = state(plain.model)
    for key, tensor in state(checkpointed.model).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(expected[key], tensor) for key, tensor in state(adapted("llama", method)).items())


@each_method
def test_what_the_trainer_saves_is_loaded_by_peft(method: Method, tmp_path: Path) -> None:
    done = trainer("bert", tmp_path, method=method, save_strategy="no")
    done.train()
    done.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(MODELS["bert"].model(seed=3), tmp_path / "final").eval()
    batch = MODELS["bert"].batch()
    assert torch.equal(output(loaded, batch), output(done.model.eval(), batch))
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert config["peft_type"] == method.config.method
    assert config["inference_mode"] is True
    assert done.model.peft_config["default"].inference_mode is False


@each_method
@pytest.mark.parametrize("name", ["llama", "resnet", "moe", "mha"])
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_twin_trains_on_alone(method: Method, name: str, twin_of: Any) -> None:
    """In the middle of training, in train mode, with gradients about."""
    batch = MODELS[name].batch()
    model = adapted(name, method, dropout=0.0)
    train(model, batch, steps=2)
    model.train()
    output(model, batch).square().mean().backward()
    twin = twin_of(model)
    assert twin.training
    assert_same(state(twin), state(model))
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in twin.named_parameters()} == flags
    before = state(model)
    losses = train(twin, batch)
    assert_same(state(model), before)  # nothing is shared
    assert losses == train(model, batch)
    assert_same(state(twin), state(model))
