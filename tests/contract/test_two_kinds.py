"""Two kinds of adapters on one model, as transformers takes them: one wrapper around the other. Control: LoRA and LoHa."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor

from tests.methods import METHODS
from tests.pico import LAYERS, MODELS, Pico, run, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, of every second adapter
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]
OURS = ["FLORA", "SVFIT", "PELA", "ATLAS", "CONCRETE"]
PAIRS = [*itertools.permutations(["LORA", *OURS], 2), ("LORA", "LOHA"), ("LOHA", "LORA")]
each_pair = pytest.mark.parametrize(("first", "second"), PAIRS)
TARGETS = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"]},
    "llama, tied": {"target_modules": ["embed_tokens"]},
    "resnet": {"target_modules": "all-conv"},
    "moe": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["router"]},
}


def config(kind: str, pico: Pico, targets: dict[str, Any]) -> Any:
    if kind == "LORA":
        return LoraConfig(r=2, init_lora_weights=False, **targets)
    if kind == "LOHA":
        return LoHaConfig(r=2, init_weights=False, **targets)
    method = METHODS[kind]
    return method.make(pico, **targets, init_weights=False, **method.steady)


def alone(kind: str, pico: Pico, targets: dict[str, Any]) -> tuple[Any, Tensor]:
    """The only adapter of a model, and what it computes."""
    torch.manual_seed(10 + len(kind))
    model: Any = get_peft_model(pico.model(), config(kind, pico, targets)).eval()
    return model, run(model, pico.batch())


@each_pair
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, tied", "resnet"])
def test_loaded_through_transformers(first: str, second: str, name: str, tmp_path: Path) -> None:
    """Each computes what it does alone; off, the base; the second can go and come again."""
    pico = MODELS[name]
    of_peft = {"LORA", "LOHA"} & {first, second}
    if (name in ("resnet", "moe") and of_peft) or ("LOHA" in of_peft and name != "llama"):
        pytest.skip("PEFT's own: no statistics of BatchNorm, LoHa no Conv1D and embeddings")
    expected = {}
    for kind in (first, second):
        model, expected[kind] = alone(kind, pico, TARGETS[name])
        model.save_pretrained(str(tmp_path / kind))
    base = run(pico.model(), pico.batch())
    model = pico.model()
    for kind in (first, second):
        model.load_adapter(str(tmp_path / kind), kind.lower() + "_1")
    model.eval()
    for kind in (second, first, second):
        model.set_adapter(kind.lower() + "_1")
        assert torch.equal(run(model, pico.batch()), expected[kind]), kind
    model.disable_adapters()
    assert torch.equal(run(model, pico.batch()), base)
    model.enable_adapters()
    model.delete_adapter(first.lower() + "_1")
    model.set_adapter(second.lower() + "_1")
    assert torch.equal(run(model, pico.batch()), expected[second])
    model.load_adapter(str(tmp_path / first), "again")
    model.set_adapter("again")
    assert torch.equal(run(model, pico.batch()), expected[first])


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(OURS, 2)))
def test_a_parameter_takes_one_kind(first: str, second: str, tmp_path: Path) -> None:
    """PEFT finds its wrapper again by the parameter's name alone; the second kind is refused and the model stays as it was."""
    pico, expected = MODELS["moe"], {}
    for kind in (first, second):
        model, expected[kind] = alone(kind, pico, TARGETS["moe"])
        model.save_pretrained(str(tmp_path / kind))
    model = pico.model()
    model.load_adapter(str(tmp_path / first), "first_1")
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"experts.*: the adapters \['first_1'\] on this module are of another kind"):
        model.load_adapter(str(tmp_path / second), "second_1")
    assert set(model.state_dict()) == keys
    model.set_adapter("first_1")
    assert torch.equal(run(model, pico.batch()), expected[first])


@each_pair
def test_added_trained_and_saved(first: str, second: str, tmp_path: Path) -> None:
    """Only the active one moves. The outer one can be saved and loaded alone (the inner one's keys have its wrapper in)."""
    pico = MODELS["llama"]
    model: Any = pico.model()
    for kind in (first, second):
        model.add_adapter(config(kind, pico, TARGETS["llama"]), kind.lower() + "_1")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, pico.batch())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(f".{second.lower()}_1" in key for key in changed)
    expected = run(model, pico.batch())
    model.save_pretrained(str(tmp_path))
    loaded = pico.model()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(run(loaded, pico.batch()), expected)


@each_pair
@pytest.mark.parametrize("name", ["conv2d", "linear", "embedding", "router", "conv, groups"])
def test_injected_on_every_kind_of_layer(first: str, second: str, name: str) -> None:
    pico = LAYERS[name]
    of_peft = {"LORA", "LOHA"} & {first, second}
    if of_peft and (name in ("router", "conv, groups", "embedding") or (name == "conv2d" and "LOHA" in of_peft)):
        pytest.skip("PEFT's own: LoRA fails on a router's tuple and asks LoHa's conv for `groups`, LoHa has no embeddings")
    expected = {kind: alone(kind, pico, pico.targets) for kind in (first, second)}
    model: Any = pico.model()
    for kind in (first, second):
        inject_adapter_in_model(config(kind, pico, pico.targets), model, kind.lower() + "_1")
        copied(expected[kind][0], model, kind.lower() + "_1")
    for kind in (second, first):
        activate(model, [kind.lower() + "_1"])
        assert torch.equal(run(model, pico.batch()), expected[kind][1])


def copied(source: Any, model: Any, name: str) -> None:
    """Tensors of the adapter "default" of one model into an adapter of another."""
    mine = {key: value for key, value in model.state_dict().items() if f".{name}" in key}
    theirs = [value for key, value in source.state_dict().items() if ".default" in key]
    assert len(mine) == len(theirs)
    with torch.no_grad():
        for value, other in zip(mine.values(), theirs, strict=True):
            value.copy_(other)


def activate(model: Any, names: list[str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if "LOHA" not in pair])
def test_both_active_add_up_or_are_refused(first: str, second: str, tmp_path: Path) -> None:
    """Merged one after the other they make the weight that the sum is compared with."""
    pico = MODELS["llama"]
    targets = {"target_modules": ["q_proj"]}
    model, updates = pico.model(torch.float64), []
    key = "model.layers.0.self_attn.q_proj"
    for kind in (first, second):
        one, _ = alone(kind, pico, targets)
        updates.append(one.double().get_base_model().get_submodule(key).get_delta_weight("default").detach())
        one.float().save_pretrained(str(tmp_path / kind))
        model.load_adapter(str(tmp_path / kind), kind.lower() + "_1")
    model.double().eval().set_adapter([first.lower() + "_1", second.lower() + "_1"])
    layer = model.get_submodule(key)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    inner = layer.get_base_layer()

    def call() -> Tensor:
        return layer(x)

    if second in ("LORA", "FLORA"):
        torch.testing.assert_close(call(), x @ (inner.weight + sum(updates)).T, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=rf"{first.lower()}_1.* of different kinds.*Activate one at a time"):
            call()


@pytest.mark.parametrize(("first", "second"), [("FLORA", "SVFIT"), ("LORA", "FLORA"), ("PELA", "FLORA")])
def test_peft_models_take_one_kind(first: str, second: str) -> None:
    """PEFT refuses a second kind itself, before anything is changed."""
    pico = MODELS["llama"]
    model, expected = alone(first, pico, TARGETS["llama"])
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", config(second, pico, TARGETS["llama"]))
    assert set(model.state_dict()) == keys
    assert torch.equal(run(model, pico.batch()), expected)
