"""A process that lives long: adapters come and go a hundred times, and nothing is left of them."""

from __future__ import annotations

import cProfile
import gc
import pstats
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.methods import Method, each_method
from tests.pico import MODELS, Pico, run

pytestmark = pytest.mark.filterwarnings("ignore:PELA leaves", "ignore:Already found a `peft_config`")
ROUNDS = 100


def adapted(method: Method, pico: Pico) -> Any:
    everything = {"target_modules": None} if method.composes else {}  # with holders
    return get_peft_model(pico.model(), method.make(pico, init_weights=False, **{**pico.targets, **everything})).eval()


def kept(model: nn.Module) -> dict[str, int]:
    """How many hooks, names and other entries every module keeps, and how many bytes there are of tensors."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (list, dict, set, tuple)):
                found[f"{name}.{attribute}"] = len(value)
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return {**found, "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)}


@each_method
def test_a_hundred_loads_and_deletes(method: Method, tmp_path: Path) -> None:
    """Every name is a new one. What a load costs is counted in calls, of which a growing list has more each time."""
    pico, calls = MODELS["mha"], list[int]()
    model, batch = adapted(method, pico), pico.batch()
    model.save_pretrained(str(tmp_path))
    before: dict[str, int] = {}
    for number in range(ROUNDS):
        name = f"number{number}"
        with cProfile.Profile() as profile:
            model.load_adapter(str(tmp_path), name)
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
        if number % 20 == 1:
            model.set_adapter(name)
            run(model, batch)
            model.set_adapter("default")
        model.delete_adapter(name)
        if number == 1:
            before = kept(model)
    assert kept(model) == before
    assert max(calls[-5:]) <= 1.01 * min(calls[2:12])


@each_method
@pytest.mark.parametrize("merge", [False, True])
def test_the_base_is_left_without_a_trace(method: Method, merge: bool) -> None:
    """And what somebody else has told DDP stays."""
    pico = MODELS["vit"]
    plain = pico.model()
    before = {name: set(vars(module)) for name, module in plain.named_modules()}
    model = adapted(method, pico)
    model.base_model.model._ddp_params_and_buffers_to_ignore = [
        *getattr(model.base_model.model, "_ddp_params_and_buffers_to_ignore", ()),
        "somebody.else",
    ]
    base = model.merge_and_unload() if merge else model.unload()
    assert base._ddp_params_and_buffers_to_ignore == ["somebody.else"]
    del base._ddp_params_and_buffers_to_ignore
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
