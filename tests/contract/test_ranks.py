"""A rank that is a number is an upper bound, as LoRA lets it pass; a list is taken as it is."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.methods import METHODS, Method
from tests.pico import LAYERS, MODELS, Pico, run, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch, of such a base layer
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),
]
RANKED = {name: method for name, method in METHODS.items() if any(field.name == "r" for field in fields(method.config))}
ADDING = {name: method for name, method in RANKED.items() if not method.replaces_base}
each_ranked = pytest.mark.parametrize("method", RANKED.values(), ids=RANKED)
each_adding = pytest.mark.parametrize("method", ADDING.values(), ids=ADDING)


class Heads(nn.Module):
    """A wide layer, a router of four experts and a head of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.router, self.head = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(x))
        return self.head(x * self.router(x).softmax(-1).sum(-1, keepdim=True)) + self.router(x).sum(-1, keepdim=True)


HEADS = Pico(Heads, lambda: {"x": torch.randn(4, 32)}, {"target_modules": ["wide", "router", "head"]})


@each_adding
@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_is_too_small(method: Method, name: str) -> None:
    """Every kind of layer takes any number, and can use all of what it was lowered to."""
    pico = LAYERS[name]
    made = method.make(pico, **{**pico.targets, "r": 1000, "init_weights": False})
    model: Any = get_peft_model(pico.model(torch.float64), made).double().eval()
    base, batch = pico.model(torch.float64), pico.batch(torch.float64)
    assert not torch.equal(run(model, batch), run(base, batch))
    for layer in dict(model.base_model.named_subspace_layers()).values():
        for delta in layer.deltas("default").values():
            for parameter in delta.parameters():
                assert all(size <= max(delta.geometry.shape) * max(1, delta.geometry.groups) for size in parameter.shape)


@each_adding
def test_all_linear_with_the_default_rank_on_small_layers(method: Method) -> None:
    fields = {"target_modules": "all-linear"}
    get_peft_model(Heads(), LoraConfig(**fields))  # which takes it
    model = get_peft_model(HEADS.model(), method.config(**fields))
    losses = train(model, HEADS.batch())
    assert losses[-1] < losses[0]


@each_ranked
def test_what_was_lowered_is_said(method: Method, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once in the log; in the config and on the card, also of an adapter that was loaded and is saved again."""
    if method.config.method == "PELA":
        pico, given = LAYERS["conv, patches"], {"target_modules": ["layer"], "r": 4}  # of 3 channels
    else:
        pico, given = HEADS, {**HEADS.targets, "r": 8}
    with caplog.at_level(logging.WARNING, logger="peft_subspace"):
        model = get_peft_model(pico.model(), method.make(pico, **given))
    (record,) = caplog.records
    assert "is an upper bound, lowered to fit" in record.message
    lowered = model.peft_config["default"].lowered_ranks
    assert set(lowered) == ({"layer"} if pico is not HEADS else {"router", "head"})
    model.save_pretrained(str(tmp_path / "one"))
    caplog.clear()
    PeftModel.from_pretrained(pico.model(), str(tmp_path / "one")).save_pretrained(str(tmp_path / "two"))
    assert not caplog.records
    for folder in ("one", "two"):
        assert f"lowered to fit {len(lowered)} smaller weight" in (tmp_path / folder / "README.md").read_text()


@each_ranked
def test_nothing_is_said_where_all_fit(method: Method, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(MODELS["llama"].model(), method.make(MODELS["llama"], **MODELS["llama"].targets, r=2))
    assert model.peft_config["default"].lowered_ranks == {}
    assert not caplog.records
