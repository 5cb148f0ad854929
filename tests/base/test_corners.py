"""Cases that were wrong once and are not the business of one file alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_subspace import FloraConfig, save_as_lora


class Net(nn.Module):
    """The name of `lin` is also the ending of `block.lin`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["lin"](self.lin(x).relu())


def adapted(**fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(Net(), FloraConfig(**{"r": 2, "init_weights": False, "target_modules": "lin", **fields})).eval()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def test_a_weighted_sum_adds_up_repeated_names_and_can_be_loaded(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("b", FloraConfig(r=3, init_weights=False, target_modules="block.lin"))
    model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "twice")
    layer = model.base_model.model.lin
    torch.testing.assert_close(layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("default"))
    model.set_adapter("twice")
    model.save_pretrained(str(tmp_path), selected_adapters=["twice"])
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "twice")).eval()
    assert torch.equal(again(X), model(X)), "the target `lin` must not reach `block.lin`"
    with pytest.raises(ValueError, match="finite"):
        model.add_weighted_adapter(["default"], [math.nan], "broken")


def test_lora_names_this_layer_and_no_other(tmp_path: Path) -> None:
    model = adapted()
    save_as_lora(model, tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    torch.testing.assert_close(again(X), model(X))
    assert isinstance(again.base_model.model.block["lin"], nn.Linear)


def test_ranks_from_the_gradient_of_one_layer_do_not_reach_another() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 16, 3), "b": nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3)})})

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return model["b"]["conv"](model["conv"](batch).relu()).square().sum()

    model = get_peft_model(net, FloraConfig(r=8, target_modules=["conv"], init_weights="gradient"))
    model.initialize_from_gradients([torch.randn(2, 3, 8, 8)], loss)
    assert model.base_model.model["b"]["conv"].flora_delta["default"].core.shape == (8, 8, 2, 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.initialize_from_gradients([torch.randn(2, 3, 8, 8)], loss)


def test_a_refused_merge_merges_no_layer() -> None:
    model = adapted(target_modules=["lin", "block.lin"])
    before = model(X)
    with torch.no_grad():
        good = model.base_model.model.block["lin"].flora_delta["default"].core.clone()
        model.base_model.model.block["lin"].flora_delta["default"].core.fill_(math.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.model.lin.merged_adapters
    with torch.no_grad():
        model.base_model.model.block["lin"].flora_delta["default"].core.copy_(good)
    assert torch.equal(model(X), before)


def test_a_model_cast_while_merged_can_be_unmerged() -> None:
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_a_parametrized_weight_is_adapted_but_not_merged() -> None:
    net = nn.Sequential(OrderedDict(conv=nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))))
    model = get_peft_model(net, FloraConfig(r=2, target_modules=["conv"], init_weights=False)).eval()
    x = torch.randn(1, 4, 9)
    before = model(x)
    with model.disable_adapter():
        assert not torch.equal(model(x), before)
    with pytest.raises(ValueError, match="parametrize"):
        model.merge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "fields", [{"scale": math.nan}, {"scale": 0.0}, {"scale": "big"}, {"dropout": "a"}, {"init_weights": 0}]
)
def test_values_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        FloraConfig(**fields)


def test_a_mixed_batch_with_a_head_that_only_one_adapter_has() -> None:
    model = adapted(modules_to_save=["block.lin"])
    model.add_adapter("b", FloraConfig(r=3, init_weights=False, target_modules=["lin"], exclude_modules=["block.lin"]))
    with torch.no_grad():
        model.base_model.model.block["lin"].modules_to_save["default"].weight.zero_()
    names = ["default", "b", "__base__", "default", "b"]
    mixed = model.eval()(X, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(X)
        else:
            model.set_adapter(name)
            alone = model(X)
        torch.testing.assert_close(mixed[i], alone[i])


@pytest.mark.parametrize("name", ["half", "train", "keys"])
def test_an_adapter_named_like_an_attribute_is_refused(name: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match="attribute of every module"):
        get_peft_model(net, FloraConfig(r=2, target_modules=["block.lin"]), adapter_name=name)
    assert type(net.block["lin"]) is nn.Linear
