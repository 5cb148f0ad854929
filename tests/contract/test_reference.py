"""A reference policy as TRL makes it: `add_adapter("ref", config)`, and every trained parameter copied.

What is not trained (a basis, a mask from a file) must then be that of the policy too, on a base with other bits as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.methods import METHODS, Method
from tests.pico import LAYERS, MODELS, run, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),  # PEFT, of every adapted input embedding
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, of transformers' second adapter
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


def same(base: nn.Module) -> nn.Module:
    return base


def bfloat16(base: nn.Module) -> nn.Module:
    return base.bfloat16()


def four_bits(base: nn.Module) -> nn.Module:
    """The values of a base in 4 bits, by row."""
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim >= 2:
                step = parameter.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
                parameter.copy_((parameter / step).round() * step)
    return base


CASES = [
    pytest.param(method, fields, id=f"{name} {'|'.join(fields)}")
    for name, method in METHODS.items()
    for fields in ({}, {"init_weights": False}, *method.stored)
] + [
    pytest.param(METHODS["SVFIT"], {"svd": "lowrank"}, id="SVFIT lowrank"),
    pytest.param(METHODS["SVFIT"], {"energy": 0.7, "r": None, "scale": "relative"}, id="SVFIT energy"),
]


def reference_of(model: Any, config: Any) -> None:
    """What TRL does."""
    model.add_adapter("ref", config)
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("changed", [same, bfloat16, four_bits], ids=lambda changed: changed.__name__)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("method", "fields"), CASES)
def test_a_copied_reference_is_the_policy(
    method: Method, fields: dict[str, Any], trainable: bool, changed: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    pico = MODELS["llama"]
    torch.manual_seed(10)
    policy = get_peft_model(pico.model(), method.make(pico, **{**pico.targets, **fields}))
    train(policy, pico.batch(), lr=0.1)
    policy.save_pretrained(str(tmp_path))
    base = changed(pico.model())
    batch = pico.batch(next(base.parameters()).dtype)
    if (changed is not same and method.fields.get("save_basis") is False) or (changed is four_bits and method.composes):
        with pytest.raises(ValueError, match=r"other bits|is not the base"):  # refused by name: nothing is wrong then
            PeftModel.from_pretrained(base, str(tmp_path), is_trainable=trainable)
        return
    model: Any = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=trainable).eval()
    expected = run(model, batch)
    for config in (model.peft_config["default"], copy.deepcopy(model.peft_config["default"])):
        reference_of(model, config)
        model.set_adapter("ref")
        assert torch.equal(run(model, batch), expected)
        model.set_adapter("default")
        assert torch.equal(run(model, batch), expected)
        model.delete_adapter("ref")


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_through_transformers(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    pico = MODELS["llama"]
    torch.manual_seed(10)
    policy = get_peft_model(pico.model(), method.make(pico, **{**pico.targets, **fields}))
    train(policy, pico.batch(), lr=0.1)
    policy.save_pretrained(str(tmp_path))
    model: Any = pico.model()
    model.load_adapter(str(tmp_path))
    expected = run(model.eval(), pico.batch())
    model.add_adapter(model.peft_config["default"], "ref")
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(run(model, pico.batch()), expected)


@pytest.mark.parametrize("name", [*LAYERS, "mha", "moe", "gpt2"])
@pytest.mark.parametrize("method", [METHODS["SVFIT"], METHODS["PELA"], METHODS["FLORA"]], ids=["SVFIT", "PELA", "FLORA"])
def test_every_kind_of_layer(method: Method, name: str, tmp_path: Path) -> None:
    if name in method.leaves:
        pytest.skip("the method refuses this layer")
    pico = (LAYERS | MODELS)[name]
    torch.manual_seed(10)
    get_peft_model(pico.model(), method.make(pico, **pico.targets, init_weights=False)).save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(four_bits(pico.model()), str(tmp_path), is_trainable=True).eval()
    expected = run(model, pico.batch())
    reference_of(model, model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(run(model, pico.batch()), expected)


def test_lora_is_the_control(tmp_path: Path) -> None:
    pico = MODELS["llama"]
    policy = get_peft_model(pico.model(), LoraConfig(r=2, **pico.targets, init_lora_weights=False))
    policy.save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(bfloat16(pico.model()), str(tmp_path), is_trainable=True).eval()
    expected = run(model, pico.batch())
    reference_of(model, model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(run(model, pico.batch()), expected)


def test_a_further_compressed_adapter_starts_at_the_weight(tmp_path: Path) -> None:
    """Its config came from a file, which is loaded by now; it has no factors to wait for."""
    method, pico = METHODS["PELA"], MODELS["llama"]
    get_peft_model(pico.model(), method.make(pico, **pico.targets)).save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(pico.model(), str(tmp_path)).eval()
    expected = run(model, pico.batch())
    model.add_adapter("fresh", model.peft_config["default"])
    model.set_adapter("fresh")
    torch.testing.assert_close(run(model, pico.batch()), expected)
