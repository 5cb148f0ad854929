"""`set_scale`, `scale_layer` and `unscale_layer` as PEFT's LoRA layers have them, which diffusers calls. LoRA is the oracle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_subspace import SubspaceLayer, save_as_lora, to_lora
from tests.contract.test_contract import adapt, add, assert_far, assert_near, dense_output, layers
from tests.methods import METHODS, Method, each_method
from tests.pico import LAYERS, MODELS, output, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.filterwarnings("ignore:Merging .* BatchNorm statistics cannot be summed"),
]
ADDING = {name: method for name, method in METHODS.items() if not method.replaces_base}
each_adding = pytest.mark.parametrize("method", ADDING.values(), ids=ADDING)
DTYPE = torch.float64

# What a user, or diffusers, does with every adapted layer of a model with the adapters "default" and "other"
CALLS: dict[str, Callable[[Any], None]] = {
    "set": lambda layer: layer.set_scale("default", 0.5),
    "set twice": lambda layer: [layer.set_scale("default", 0.5), layer.set_scale("default", -2)],
    "set to zero": lambda layer: layer.set_scale("default", 0),
    "set of one that is not there": lambda layer: layer.set_scale("nobody", 3),
    "set both": lambda layer: [layer.set_scale("default", 0.5), layer.set_scale("other", 1.5)],
    "scale": lambda layer: layer.scale_layer(0.25),
    "scale by one": lambda layer: layer.scale_layer(1),
    "set and scale": lambda layer: [layer.set_scale("default", 0.5), layer.scale_layer(3)],
    "scale and set": lambda layer: [layer.scale_layer(3), layer.set_scale("default", 0.5)],
    "scale and unscale": lambda layer: [layer.scale_layer(3), layer.unscale_layer(1.5)],
    "scale and back": lambda layer: [layer.scale_layer(3), layer.set_scale("other", 2), layer.unscale_layer()],
}


def each_layer(model: nn.Module, call: Callable[[Any], Any]) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            call(module)


def factors_of_lora(call: Callable[[Any], None], active: list[str]) -> dict[str, float]:
    """What PEFT's LoRA makes of the calls: its scale as a multiple of its own."""
    model: Any = get_peft_model(MODELS["mlp"].model(), LoraConfig(r=2, lora_alpha=3, target_modules=["first"]))
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["first"]))
    model.base_model.set_adapter(active)
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    own = dict(layer.scaling)
    call(layer)
    return {name: layer.scaling[name] / own[name] for name in own}


def scaled(method: Method, name: str, factor: float) -> tuple[Any, dict[str, Tensor], Tensor]:
    pico = (LAYERS | MODELS)[name]
    model, batch = adapt(method, pico, DTYPE), pico.batch(DTYPE)
    expected = dense_output(model, batch, {"default": factor})
    each_layer(model, lambda layer: layer.set_scale("default", factor))
    return model, batch, expected


@each_adding
@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_every_layer_is_its_scaled_dense_definition(method: Method, name: str) -> None:
    """Forward, gradients and merging, for a factor that no layer could take for another."""
    factor = -0.625
    model, batch, expected = scaled(method, name, factor)
    plain = adapt(method, (LAYERS | MODELS)[name], DTYPE)
    found = output(model, batch)
    assert_near(found, expected)
    assert_far(found, run(plain, batch))
    parameters = [p for layer in layers(model).values() for p in layer.parameters() if p.requires_grad]
    others = [p for layer in layers(plain).values() for p in layer.parameters() if p.requires_grad]
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, parameters, grad)
    wanted = torch.autograd.grad(dense_output(plain, batch, {"default": factor}), others, grad)
    largest = max(float(gradient.norm()) for gradient in wanted)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert_near(mine, theirs, least=1e-4 * largest)
    model.merge_adapter()
    assert_near(run(model, batch), expected)
    model.unmerge_adapter()
    assert_near(run(model, batch), expected)
    each_layer(model, lambda layer: layer.unscale_layer())
    assert torch.equal(run(model, batch), run(plain, batch))


@each_adding
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=["one", "two"])
@pytest.mark.parametrize("name", ["llama", "batch norm"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_calls_do_what_they_do_to_lora(method: Method, call: str, active: list[str], name: str) -> None:
    factors = factors_of_lora(CALLS[call], active)
    model, batch = adapt(method, MODELS[name], DTYPE), MODELS[name].batch(DTYPE)
    add(model, method)
    model.base_model.set_adapter(active)
    expected = dense_output(model, batch, {adapter: factors[adapter] for adapter in active})
    with model.disable_adapter():
        base = run(model, batch)
    each_layer(model, CALLS[call])
    assert_near(run(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), base)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_near(run(copied, batch), expected)
    model.merge_adapter(active)
    if name == "llama":  # BatchNorm statistics of several adapters cannot be summed
        assert_near(run(model, batch), expected)


@each_adding
def test_a_mixed_batch(method: Method) -> None:
    pico = MODELS["llama"]
    model, batch = adapt(method, pico, DTYPE), pico.batch(DTYPE)
    add(model, method)
    expected = {name: dense_output(model, batch, {name: factor}) for name, factor in (("default", 0.5), ("other", -2.0))}
    with model.disable_adapter():
        expected["__base__"] = run(model, batch)
    each_layer(model, lambda layer: [layer.set_scale("default", 0.5), layer.set_scale("other", -2)])
    names = ["other", "default", "__base__", "default"]
    mixed = run(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        assert_near(mixed[row], expected[name][row])


@each_adding
def test_exports_and_sums_have_the_scale_and_files_do_not(method: Method, tmp_path: Path) -> None:
    pico = MODELS["llama"]
    model, _, expected = scaled(method, "llama", 0.5)
    model.float().save_pretrained(str(tmp_path / "own"))
    own = run(PeftModel.from_pretrained(pico.model(), str(tmp_path / "own")).eval(), pico.batch())
    assert_near(own, run(adapt(method, pico), pico.batch()), 1e-6)
    if method.exports:
        save_as_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(pico.model(), str(tmp_path / "lora")).eval()
        assert_near(run(lora, pico.batch()), expected, 1e-4)  # float32 through a whole model
        assert to_lora(model).tensors
    if method.sums:
        model.add_weighted_adapter(["default"], [1.0], "sum")
        model.set_adapter("sum")
        assert_near(run(model, pico.batch()), expected, 1e-4)


@each_adding
def test_prune_and_changes_of_the_scale_in_training(method: Method) -> None:
    """A weight that is kept between calls is composed anew; ranks that are lowered leave the scale as it is."""
    pico = MODELS["llama"]
    model, batch = adapt(method, pico, DTYPE), pico.batch(DTYPE)
    for factor in (0.5, 2.0, 0.5, 1.0):
        each_layer(model, lambda layer, factor=factor: layer.set_scale("default", 1.0))
        expected = dense_output(model, batch, {"default": factor})
        each_layer(model, lambda layer, factor=factor: layer.set_scale("default", factor))
        assert_near(run(model, batch), expected)
        assert_near(output(model.train(), batch).detach() if not method.composes else run(model, batch), expected)
        model.eval()
    if hasattr(model.base_model, "prune"):
        each_layer(model, lambda layer: layer.set_scale("default", 0.5))
        before = run(model, batch)
        model.prune(tolerance=1e-6)
        model.double()
        assert_near(run(model, batch), before, 1e-4)


@each_method
def test_what_has_no_meaning_is_refused_by_name(method: Method) -> None:
    model, batch = adapt(method, MODELS["llama"]), MODELS["llama"].batch()
    before = run(model, batch)
    layer = next(module for module in model.modules() if isinstance(module, SubspaceLayer))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"{layer.key}.*'default' would be {scale}.*finite"):
            layer.set_scale("default", scale)
    with pytest.raises(ValueError, match=r"divide by zero.*None sets the scale back"):
        layer.unscale_layer(0)
    if method.replaces_base:
        for call in (lambda: layer.set_scale("default", 0.5), lambda: layer.scale_layer(2), lambda: layer.unscale_layer(2)):
            with pytest.raises(ValueError, match=rf"{layer.key}: the adapter 'default' \(pela\) stands in for the base"):
                call()
        layer.set_scale("default", 1.0)  # what diffusers does where no weights are given
        layer.scale_layer(1.0)
        layer.unscale_layer()
    assert torch.equal(run(model, batch), before)


# diffusers itself ------------------------------------------------------------------------------------------------------------


def unet(diffusers: Any) -> Any:
    torch.manual_seed(0)
    down, up = ["DownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]
    blocks = {"down_block_types": down, "up_block_types": up}
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    return diffusers.UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=16, attention_head_dim=2).eval()


@pytest.mark.parametrize("kind", ["LORA", "FLORA", "SVFIT"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_sets_and_fuses(kind: str) -> None:
    """Two adapters with weights, and a fused scale, against the same sums of the dense updates."""
    diffusers = pytest.importorskip("diffusers")
    model, x = unet(diffusers), torch.randn(1, 4, 8, 8)
    words = torch.randn(1, 5, 16)
    targets = {"target_modules": ["conv1", "to_q", "to_v"]}
    for name in ("one", "two"):
        if kind == "LORA":
            config: Any = LoraConfig(r=4, init_lora_weights=False, **targets)
        else:
            config = METHODS[kind].config(r=4, init_weights=False, **targets)
        model.add_adapter(config, adapter_name=name)

    def call(one: Any) -> Tensor:
        with torch.no_grad():
            return one(x, 1, words).sample

    def by_hand(weights: dict[str, float]) -> Tensor:
        plain = unet(diffusers)
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                for adapter, weight in weights.items():
                    plain.get_submodule(name).weight.data += weight * own[name, adapter]
        return call(plain)

    own = {
        (name, adapter): module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for adapter in ("one", "two")
    }
    near = {"rtol": 1e-3, "atol": 1e-4}  # float32 through a whole model
    model.set_adapters(["one", "two"])
    torch.testing.assert_close(call(model), by_hand({"one": 1, "two": 1}), **near)
    model.set_adapters(["one", "two"], weights=[0.5, -0.25])
    torch.testing.assert_close(call(model), by_hand({"one": 0.5, "two": -0.25}), **near)
    model.set_adapters(["one"], weights=[0.5])
    torch.testing.assert_close(call(model), by_hand({"one": 0.5}), **near)
    model.set_adapters("one")
    before = call(model)
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(call(model), by_hand({"one": 0.5}), **near)
    model.unfuse_lora()
    diffusers.utils.peft_utils.unscale_lora_layers(model, 0.5)
    torch.testing.assert_close(call(model), before, **near)
