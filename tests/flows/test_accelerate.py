"""accelerate: prepare, save_state and load_state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from tests.methods import Method, each_method
from tests.pico import MODELS, loss, output

NAMES = ["llama", "bert", "resnet", "moe"]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def adapted(method: Method, name: str, **fields: Any) -> PeftModel:
    return get_peft_model(MODELS[name].model(), method.make(MODELS[name], **{**MODELS[name].targets, **fields}))


def values(model: nn.Module) -> dict[str, Any]:
    return {key: tensor.tolist() for key, tensor in get_peft_model_state_dict(model).items()}


def run(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, loader: Any) -> list[float]:
    """One epoch; the losses."""
    model.train()
    losses = []
    for batch in loader:
        value = loss(model, batch)
        accelerator.backward(value)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
@each_method
def test_a_state_comes_back_whole(method: Method, name: str, accelerator: Accelerator, tmp_path: Path) -> None:
    """Parameters, BatchNorm statistics, optimizer, scheduler and random numbers (dropout)."""
    model = adapted(method, name, dropout=0.0 if name == "moe" else 0.2)  # experts and routers have no dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    batches = [MODELS[name].batch(seed=i) for i in range(4)]
    prepared = accelerator.prepare(model, optimizer, scheduler, DataLoader(batches, batch_size=None))
    run(accelerator, *prepared)
    accelerator.save_state(str(tmp_path))
    saved = values(model)
    losses, end = run(accelerator, *prepared), values(model)
    assert end != saved
    accelerator.load_state(str(tmp_path))
    assert values(model) == saved
    assert run(accelerator, *prepared) == losses
    assert values(model) == end
    # and the base is what it was
    base = MODELS[name].model().state_dict()
    found = model.unload().state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in base.items() if not key.startswith("classifier"))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
@each_method
def test_a_model_that_was_loaded_and_never_used_saves_its_values(
    method: Method, name: str, options: dict[str, Any], accelerator: Accelerator, tmp_path: Path
) -> None:
    trained = adapted(method, name, init_weights=False)
    trained.save_pretrained(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(MODELS[name].model(), tmp_path / "adapter", **options)
    model = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    saved = load_file(tmp_path / "state" / "model.safetensors")
    expected = {key: tensor for key, tensor in trained.state_dict().items() if key in saved}
    assert any(f"{method.config.method.lower()}_delta" in key for key in expected)
    assert set(saved) == set(model.state_dict())
    for key, tensor in expected.items():
        assert torch.equal(saved[key], tensor), key
    fresh = adapted(method, name)
    fresh.load_state_dict(saved)
    batch = MODELS[name].batch()
    assert torch.equal(output(fresh.eval(), batch), output(trained.eval(), batch))


@each_method
def test_unwrapped_and_saved(method: Method, accelerator: Accelerator, tmp_path: Path) -> None:
    model = adapted(method, "llama", init_weights=False)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(str(tmp_path), state_dict=accelerator.get_state_dict(prepared))
    loaded = PeftModel.from_pretrained(MODELS["llama"].model(), tmp_path)
    assert torch.equal(output(loaded, MODELS["llama"].batch()), output(model.eval(), MODELS["llama"].batch()))
