"""What every method owes to PEFT and to its users, over (method x model x dtype). A new method is a row in tests/methods.py."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from peft_subspace import SubspaceLayer
from peft_subspace.base.batch_norm import STATISTICS, BatchNormLayer
from tests.methods import METHODS, Method
from tests.pico import LAYERS, MODELS, Pico, loss, output, run, train
from tests.pools import fine_tuned

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),  # PEFT, of every adapted input embedding
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch, of such a base layer
    pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense"),  # depthwise convolutions
]
each_model = pytest.mark.parametrize("name", MODELS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WITHOUT_EXPERTS = [name for name in MODELS if "target_parameters" not in MODELS[name].targets]
WITHOUT_WHOLE_MODULES = [name for name in MODELS if name not in ("bert", "resnet")]  # those train a head too
EXACT = 1e-10  # relative, in float64: hundreds of roundings of 1e-16, and room for a deep model


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


# Helpers -----------------------------------------------------------------------------------------------------------------


def config(method: Method, pico: Pico, **fields: Any) -> Any:
    return method.make(pico, **{**pico.targets, **fields})


def adapt(method: Method, pico: Pico, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model with a random adapter "default"."""
    model = pico.model(dtype)
    torch.manual_seed(10)
    return wide(get_peft_model(model, config(method, pico, **{"init_weights": False, **fields})), dtype).eval()


def add(model: Any, method: Method, name: str = "other", seed: int = 11, **fields: Any) -> None:
    """A second random adapter: of another size, and absent from every second layer."""
    torch.manual_seed(seed)
    first = model.peft_config["default"]
    targets = {"target_modules": sorted(model.base_model.targeted_module_names)[::2], "task_type": first.task_type}
    targets["modules_to_save"] = first.modules_to_save
    if first.target_parameters:
        targets["target_parameters"] = sorted(model.base_model.targeted_parameter_names)[::2]
    pool = {"pool": first.pool} if method.composes else {}
    model.add_adapter(name, method.config(**{**method.other, **pool, **targets, "init_weights": False, **fields}))
    wide(model, next(model.get_base_model().parameters()).dtype)


def skip_left(method: Method, name: str) -> None:
    if name in method.leaves:
        pytest.skip("the method refuses this layer: test_what_a_method_cannot_take_is_refused_by_name")


def skip_replacing(method: Method) -> None:
    if method.replaces_base:
        pytest.skip("adapters that stand in for the base do not add up: test_one_at_a_time_where_the_base_is_replaced")


def skip_without_sums(method: Method) -> None:
    skip_replacing(method)
    if not method.sums:
        pytest.skip("a weighted sum is no adapter of the method: test_a_sum_that_is_no_adapter_is_refused")


def wide(model: Any, dtype: torch.dtype) -> Any:
    """Adapters are float32; comparisons in float64 need them in float64 too."""
    return model.double() if dtype == torch.float64 else model


def layers(model: Any) -> dict[str, SubspaceLayer]:
    return dict(model.base_model.named_subspace_layers())


def dense_output(model: Any, batch: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The base model with W + sum of weight * dW in place of W: the definition that everything is compared with."""
    names = {id(module): name for name, module in model.named_modules()}
    replaced: dict[str, Any] = {}
    for layer in layers(model).values():
        for container, (_, geometry) in layer.geometries.items():
            owner, name = layer._locate(container)
            total = getattr(owner, name)
            for adapter, weight in weights.items():
                if layer.has_adapter(adapter):
                    total = total + weight * geometry.native(layer.dense_update(container, adapter))
                    if (shift := layer.deltas(adapter)[container].delta_bias()) is not None:
                        bias = replaced.get(f"{names[id(owner)]}.bias", owner.bias)
                        replaced[f"{names[id(owner)]}.bias"] = bias + weight * shift
            replaced[f"{names[id(owner)]}.{name}"] = total

    def call(**inputs: Tensor) -> Any:
        return torch.func.functional_call(model, replaced, (), inputs, tie_weights=False)

    with model.disable_adapter():
        return output(call, batch)  # type: ignore[arg-type]


def assert_near(found: Tensor, expected: Tensor, tolerance: float = EXACT, least: float = 0.0) -> None:
    """Difference relative to the size of what is expected, or to `least` if that is larger."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(least))
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.1e}"


def assert_far(found: Tensor, other: Tensor) -> None:
    """Two outputs differ by more than roundings: guards a comparison against comparing the base with itself."""
    assert float((found.double() - other.double()).norm().detach() / other.double().norm()) > 1e-3


# The start, training, and the definition -------------------------------------------------------------------------------------


@each_model
@each_dtype
def test_starts_at_the_base(method: Method, name: str, dtype: torch.dtype) -> None:
    pico = MODELS[name]
    base, batch = pico.model(dtype), pico.batch(dtype)
    expected = run(base, batch)
    model = get_peft_model(base, config(method, pico))
    found = run(model, batch)
    assert found.dtype == dtype
    if not method.starts_at_base:
        exact = dense_output(copy.deepcopy(model).double(), pico.batch(torch.float64), {"default": 1.0})
        assert_near(found, exact, 1e-5 if dtype == torch.float32 else 0.1)  # through a whole model
        assert_far(found, expected)
    else:
        assert torch.equal(found, expected)


@each_model
@each_dtype
def test_training_lowers_the_loss_and_leaves_the_base_alone(method: Method, name: str, dtype: torch.dtype) -> None:
    pico = MODELS[name]
    model, batch = get_peft_model(pico.model(dtype), config(method, pico, **method.steady)), pico.batch(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = train(model, batch, steps=6)
    assert losses[-1] < losses[0]
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, value in model.state_dict().items():
        statistics = f"{method.config.method.lower()}_batch_norm" in key
        assert torch.equal(value, before[key]) == (key not in trained and not statistics), key
    assert all(f".{method.config.method.lower()}_" in key or "modules_to_save" in key for key in trained)


def test_what_a_method_cannot_take_is_refused_by_name(method: Method) -> None:
    for name in sorted(method.leaves):
        with pytest.raises(ValueError, match="layer"):
            adapt(method, LAYERS[name])


@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_is_its_dense_definition(method: Method, name: str) -> None:
    """Forward, gradients and merging against W + dW in float64."""
    skip_left(method, name)
    pico = (LAYERS | MODELS)[name]
    model, batch = adapt(method, pico, torch.float64), pico.batch(torch.float64)
    base = run(pico.model(torch.float64), batch)
    parameters = [p for layer in layers(model).values() for p in layer.parameters() if p.requires_grad]
    found, expected = output(model, batch), dense_output(model, batch, {"default": 1.0})
    assert_far(expected, base)
    assert_near(found, expected)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, parameters, grad) for y in (found, expected)]
    largest = max(float(gradient.norm()) for gradient in gradients[1])
    for mine, wanted in zip(*gradients, strict=True):  # softmax does not see a bias of keys: its gradient is all roundings
        assert_near(mine, wanted, least=1e-4 * largest)
    model.merge_adapter()
    assert_near(run(model, batch), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "router"])  # a rounding may pick another expert
def test_bfloat16_is_near_the_dense_definition(method: Method, name: str) -> None:
    """Against float64 on the same bfloat16 weights: five roundings of 2^-9 in a row (input, factors, products, sum)."""
    skip_left(method, name)
    pico = LAYERS[name]
    model, batch = adapt(method, pico, torch.bfloat16), pico.batch(torch.bfloat16)
    exact = dense_output(copy.deepcopy(model).double(), pico.batch(torch.float64), {"default": 1.0})
    found = run(model, batch)
    assert found.dtype == torch.bfloat16
    assert_near(found, exact, 5 * 2**-9)


@pytest.mark.parametrize("shape", [(6, 9, 9), (6, 7, 8)], ids=str)
@pytest.mark.parametrize("name", ["conv2d", "conv, groups", "conv, depthwise", "transposed2d", "conv2d, reflect"])
def test_convolutions_take_a_sample_without_a_batch(method: Method, name: str, shape: tuple[int, ...]) -> None:
    skip_left(method, name)
    model, x = adapt(method, LAYERS[name], torch.float64), torch.randn(shape, dtype=torch.float64)
    assert_near(run(model, {"x": x}), run(model, {"x": x[None]})[0])


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8)], ids=str)
def test_linear_layers_take_any_batch(method: Method, shape: tuple[int, ...]) -> None:
    model, x = adapt(method, LAYERS["linear"], torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = dense_output(model, {"x": torch.eye(8, dtype=torch.float64)}, {"default": 1.0})
    bias = dense_output(model, {"x": torch.zeros(8, dtype=torch.float64)}, {"default": 1.0})
    torch.testing.assert_close(run(model, {"x": x}), x @ (weight - bias) + bias, rtol=EXACT, atol=EXACT)


def test_fused_encoder_layer_does_not_pass_by_the_adapter(method: Method) -> None:
    """In eval mode without gradients torch reads the children's weights, if nothing tells it not to."""
    pico = MODELS["encoder"]
    base, batch = run(pico.model(), pico.batch()), pico.batch()
    for module in ("linear1", "linear2", "self_attn"):
        model = adapt(method, pico, target_modules=[module])
        assert_far(run(model, batch), base)
        assert_near(run(model, batch), output(model, batch).detach(), 1e-6)  # float32, two kernels


@pytest.mark.parametrize("name", ["mha", "batch norm", "moe"])
def test_an_error_inside_a_layer_leaves_nothing_behind(method: Method, name: str) -> None:
    """The weight, or the statistics, that stand in during a call are taken away again."""
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    before = run(model, batch)
    wrapped = [module for module in model.modules() if isinstance(module, (SubspaceLayer, BatchNormLayer))]
    owners = [layer.get_base_layer() for layer in wrapped]
    attributes = [set(vars(owner)) for owner in owners]
    for layer in wrapped:
        with pytest.raises(Exception, match=r".*"):
            layer(torch.zeros(1, 2), *[torch.zeros(3)] * 2)
    assert [set(vars(owner)) for owner in owners] == attributes
    assert torch.equal(run(model, batch), before)


# Files -------------------------------------------------------------------------------------------------------------------


def test_a_new_process_computes_the_same_bits(method: Method, tmp_path: Path) -> None:
    """Train, save, load in another process, for every model and dtype. One process: importing PEFT costs seconds."""
    expected = {}
    wide: Any = [(name, dtype, {}) for name in MODELS for dtype in (torch.float32, torch.bfloat16)]
    for number, (name, dtype, fields) in enumerate([*wide, *(("llama", torch.float32, fields) for fields in method.stored)]):
        pico, key = MODELS[name], f"{name}|{str(dtype).removeprefix('torch.')}|{number}"
        model = get_peft_model(pico.model(dtype), config(method, pico, **fields))
        train(model, pico.batch(dtype))
        expected[key] = run(model, pico.batch(dtype)).contiguous()
        model.save_pretrained(str(tmp_path / key))
    script = Path(__file__).with_name("reload.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    found = load_file(tmp_path / "outputs.safetensors")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@each_model
def test_saving_twice_gives_the_same_bytes_and_only_the_adapter(method: Method, name: str, tmp_path: Path) -> None:
    model = adapt(method, MODELS[name])
    for folder in ("a", "b"):
        model.save_pretrained(str(tmp_path / folder))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    mine = {f".{name}." for name in model.peft_config["default"].modules_to_save or ()} | {f".{method.config.method.lower()}_"}
    embedding = {".embed_tokens.base_layer."}  # PEFT saves an input embedding whole when it is adapted
    assert [key for key in keys if not any(part in key for part in mine | embedding)] == []


@each_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_is_exact(method: Method, name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    pico = MODELS[name]
    model, batch = adapt(method, pico), pico.batch()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(run(loaded, batch), run(model, batch))
    loaded.load_adapter(str(tmp_path), "again", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    assert torch.equal(run(loaded, batch), run(model, batch))


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_copies_are_whole(method: Method, name: str, copied: Any, merged: bool) -> None:
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    before = run(model, batch)
    if merged:
        model.merge_adapter()
    twin = copied(model)
    assert torch.equal(run(twin, batch), run(model, batch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if merged:
        twin.unmerge_adapter()
    assert torch.equal(run(twin, batch), before)


# Several adapters --------------------------------------------------------------------------------------------------------


@each_model
def test_two_adapters_switch_and_add_up(method: Method, name: str) -> None:
    """The second acts on every second layer only; where it is absent the layer is the base's, or the first's alone."""
    pico, dtype = MODELS[name], torch.float64
    model, batch = adapt(method, pico, dtype), pico.batch(dtype)
    alone = run(model, batch)
    add(model, method)
    assert torch.equal(run(model, batch), alone), "adding does not activate"
    for active, weights in (("other", {"other": 1.0}), ("default", {"default": 1.0})):
        model.set_adapter(active)
        assert_near(run(model, batch), dense_output(model, batch, weights))
    assert torch.equal(run(model, batch), alone)
    if name not in WITHOUT_WHOLE_MODULES or method.replaces_base:
        return  # PEFT refuses two heads at once; two stand-ins: test_one_at_a_time_where_the_base_is_replaced
    model.base_model.set_adapter(["default", "other"])
    both = run(model, batch)
    assert_far(both, alone)
    assert_near(both, dense_output(model, batch, {"default": 1.0, "other": 1.0}))


@pytest.mark.parametrize("name", WITHOUT_WHOLE_MODULES)
def test_one_at_a_time_where_the_base_is_replaced(method: Method, name: str) -> None:
    if not method.replaces_base:
        pytest.skip("adapters of this method add up: test_two_adapters_switch_and_add_up")
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    before = run(model, batch)
    add(model, method)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"'default', 'other'.* one at a time"):
        run(model, batch)
    with pytest.raises(ValueError, match=r"'default', 'other'.* one at a time"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"weighted sum is no adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    model.set_adapter("default")
    assert torch.equal(run(model, batch), before)


@each_model
def test_a_frozen_adapter_beside_a_trained_one(method: Method, name: str) -> None:
    """Both are active; the gradients of the trained one are what they are with both trained."""
    if method.replaces_base or name not in WITHOUT_WHOLE_MODULES:
        pytest.skip("two stand-ins, or two heads, cannot be active at once")
    batch, found = MODELS[name].batch(), []
    for frozen in (False, True):
        model = adapt(method, MODELS[name])
        add(model, method)
        model.base_model.set_adapter(["default", "other"])
        for key, parameter in model.named_parameters():
            if frozen and ".default" in key:
                parameter.requires_grad_(False)
        torch.manual_seed(5)
        loss(model.train(), batch).backward()
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
        found.append({key: p.grad for key, p in model.named_parameters() if ".other" in key})
    assert any(gradient is not None and bool(gradient.any()) for gradient in found[0].values())
    for key, gradient in found[1].items():
        if gradient is not None or found[0][key] is not None:
            torch.testing.assert_close(gradient, found[0][key], msg=lambda text, key=key: f"{key}: {text}")


@each_model
def test_only_the_active_adapter_trains(method: Method, name: str) -> None:
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    add(model, method)
    model.set_adapter("other")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, batch)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".other." in key for key in changed)


@each_model
def test_disabling_gives_back_the_base(method: Method, name: str) -> None:
    pico = MODELS[name]
    batch, base = pico.batch(), run(pico.model(), pico.batch())
    model = get_peft_model(pico.model(), config(method, pico))
    train(model, batch)
    adapted = run(model, batch)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), base)
    assert torch.equal(run(model, batch), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, batch), base), "disabling unmerges"


@each_model
def test_deleting_an_adapter_leaves_the_other(method: Method, name: str) -> None:
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    alone = run(model, batch)
    add(model, method)
    model.delete_adapter("other")
    assert torch.equal(run(model, batch), alone)
    assert not any(".other" in key for key in model.state_dict())
    add(model, method, "third")
    model.set_adapter("third")
    third = run(model, batch)
    model.delete_adapter("default")
    assert model.active_adapters == ["third"]
    assert torch.equal(run(model, batch), third)


@pytest.mark.parametrize("name", WITHOUT_WHOLE_MODULES)  # PEFT leaves a trained head in place
def test_unload_gives_back_the_base(method: Method, name: str) -> None:
    pico = MODELS[name]
    base, batch = pico.model(), pico.batch()
    keys, expected, types = set(base.state_dict()), run(base, batch), [type(module) for module in base.modules()]
    model = get_peft_model(base, config(method, pico))
    train(model, batch)
    unloaded = model.unload()
    assert set(unloaded.state_dict()) == keys
    assert [type(module) for module in unloaded.modules()] == types
    assert torch.equal(run(unloaded, batch), expected)


# A mixed batch -----------------------------------------------------------------------------------------------------------

NAMES = ["other", "default", "__base__", "default"]


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_each_sample_can_have_its_own_adapter(method: Method, name: str) -> None:
    pico, dtype = MODELS[name], torch.float64
    model, batch = adapt(method, pico, dtype), pico.batch(dtype)
    add(model, method)
    mixed = run(model, batch, adapter_names=NAMES)
    expected = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        expected[adapter] = run(model, batch)
    with model.disable_adapter():
        expected["__base__"] = run(model, batch)
    for row, adapter in enumerate(NAMES):
        assert_near(mixed[row], expected[adapter][row])
    assert_far(expected["default"], expected["other"])
    assert torch.equal(run(model, batch), expected["other"]), "the hooks are gone"


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_an_adapter_for_each_sample(method: Method, name: str, beams: int) -> None:
    """In float64, because another batch size rounds otherwise and beams of equal score would change places."""
    pico = MODELS[name]
    task = "CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"
    model = adapt(method, pico, torch.float64, task_type=task)
    add(model, method)
    ids = pico.batch()["input_ids"]
    options = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=ids, **options)
    assert not torch.equal(alone["default"], alone["__base__"])
    for row, adapter in enumerate(NAMES):
        assert torch.equal(mixed[row], alone[adapter][row]), (row, adapter)


def test_a_mixed_batch_that_cannot_be_is_refused(method: Method) -> None:
    pico = MODELS["mlp"]
    model, batch = adapt(method, pico), pico.batch()
    with pytest.raises(ValueError, match=r"non-existing adapter.*bogus.*Loaded: default"):
        run(model, batch, adapter_names=["bogus"] * 4)
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        run(model, batch, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="training mode"):
        run(model.train(), batch, adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        run(model, batch, adapter_names=["default"] * 4)
    experts = adapt(method, MODELS["moe"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="does not work with target_parameters"):
        run(experts, MODELS["moe"].batch(), adapter_names=["default"] * 4)
    router = adapt(method, MODELS["moe"], target_modules=["router"], target_parameters=None)
    with pytest.raises(
        ValueError, match="should be the same as the number of inputs, but got 4 and 24"
    ):  # tokens of all samples
        run(router, MODELS["moe"].batch(), adapter_names=["default"] * 4)


# Merging -----------------------------------------------------------------------------------------------------------------


def base_parameters(model: Any) -> dict[str, Tensor]:
    """Everything that is not the adapter's, by name; the objects themselves."""
    mine = {
        id(p)
        for layer in layers(model).values()
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in mine}


@each_model
@each_dtype
def test_merge_and_unmerge_are_exact(method: Method, name: str, dtype: torch.dtype) -> None:
    pico = MODELS[name]
    model, batch = adapt(method, pico, dtype), pico.batch(dtype)
    before, objects = run(model, batch), base_parameters(model)
    values = {key: p.clone() for key, p in objects.items()}
    model.merge_adapter()
    for layer in layers(model).values():
        for container, (_, geometry) in layer.geometries.items():
            owner, weight = layer._locate(container)
            original = layer._base_weight(container)
            exact = original.double() + geometry.native(layer.dense_update(container, "default")).double()
            error = (getattr(owner, weight).double() - exact).abs()  # one rounding: half a unit in the last place
            assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()
    model.unmerge_adapter()
    after = base_parameters(model)
    assert all(after[key] is objects[key] for key in objects), "the Parameter objects themselves come back"
    assert all(torch.equal(after[key], values[key]) for key in objects)
    assert torch.equal(run(model, batch), before)


@each_model
@each_dtype
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")  # PEFT, of a second merge
@pytest.mark.filterwarnings("ignore:Merging .* BatchNorm statistics cannot be summed")
def test_merging_one_by_one_equals_merging_together(method: Method, name: str, dtype: torch.dtype) -> None:
    skip_replacing(method)
    model = adapt(method, MODELS[name], dtype)
    add(model, method)
    model.merge_adapter(["default", "other"])
    together = {key: p.clone() for key, p in base_parameters(model).items()}
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert all(torch.equal(p, together[key]) for key, p in base_parameters(model).items())


@each_model
def test_merge_and_unload_leaves_a_plain_model(method: Method, name: str) -> None:
    pico = MODELS[name]
    base, batch = pico.model(), pico.batch()
    keys, types = set(base.state_dict()), [type(module) for module in base.modules()]
    model = adapt(method, pico)
    adapted = run(model, batch)
    model.merge_adapter()
    merged = run(model, batch)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert set(plain.state_dict()) == keys
    assert [type(module) for module in plain.modules()] == types
    assert torch.equal(run(plain, batch), merged)
    assert_near(merged, adapted, 1e-5)  # float32: another order of sums, through a whole model


def test_a_tied_partner_keeps_its_own_weight(method: Method) -> None:
    model = adapt(method, MODELS["llama, tied"], target_modules=["embed_tokens"])
    inner = model.get_base_model()
    embedding, head = inner.model.embed_tokens, inner.lm_head
    original = head.weight
    assert embedding.base_layer.weight is original
    values = original.clone()
    model.merge_adapter()
    assert head.weight is original
    assert torch.equal(head.weight, values)
    assert not torch.equal(embedding.base_layer.weight, values)
    model.unmerge_adapter()
    assert embedding.base_layer.weight is original
    assert torch.equal(original, values)


@each_model
@pytest.mark.parametrize(("value", "place"), [(float("nan"), 0), (float("inf"), -1)])
def test_safe_merge_refuses_nan_and_changes_nothing(method: Method, name: str, value: float, place: int) -> None:
    """Neither the broken layer nor those before it."""
    if method.saturates and value == float("inf"):
        pytest.skip("the method makes finite weights of infinite parameters")
    model = adapt(method, MODELS[name])
    broken = [layer for layer in model.modules() if isinstance(layer, SubspaceLayer)][place]
    with torch.no_grad():
        next(next(iter(broken.deltas("default").values())).parameters()).fill_(value)
    before = base_parameters(model)
    values = {key: p.clone() for key, p in before.items()}
    with pytest.raises(ValueError, match=r"NaNs detected.*default"):
        model.merge_adapter(safe_merge=True)
    after = base_parameters(model)
    assert all(after[key] is before[key] and torch.equal(after[key], values[key]) for key in before)
    assert not any(layer.merged for layer in layers(model).values())
    model.merge_adapter()
    assert broken.merged, "without safe_merge nobody looks"


def test_merging_nothing_and_unmerging_nothing(method: Method) -> None:
    model = adapt(method, MODELS["mlp"])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()
    layer = next(iter(layers(model).values()))
    assert layer.merged_adapters == ["default"]


# Weighted sums -----------------------------------------------------------------------------------------------------------

MIXES = {"one": [1.0, 0.0, 0.0], "negative": [0.7, -1.3, 0.5]}


def three_adapters(method: Method, pico: Pico, dtype: torch.dtype) -> Any:
    """Of two sizes and on different layers; together their ranks exceed the small modes of most weights."""
    model = adapt(method, pico, dtype)
    add(model, method)
    torch.manual_seed(12)
    model.add_adapter("third", config(method, pico, init_weights=False))
    return wide(model, dtype).eval()


@pytest.mark.parametrize("name", WITHOUT_WHOLE_MODULES)
@pytest.mark.parametrize("mix", MIXES)
def test_add_weighted_adapter_is_the_sum(method: Method, name: str, mix: str) -> None:
    skip_without_sums(method)
    pico, dtype = MODELS[name], torch.float64
    model, batch = three_adapters(method, pico, dtype), pico.batch(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = dict(zip(("default", "other", "third"), MIXES[mix], strict=True))
    expected = dense_output(model, batch, weights)
    active = run(model, batch)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert torch.equal(run(model, batch), active), "it is not activated"
    wide(model, dtype)  # new parameters are float32
    model.set_adapter("sum")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert_near(run(model, batch), expected, 1e-5)  # float32 values of the new adapter
    model.merge_adapter()
    assert_near(run(model, batch), expected, 1e-5)


def test_a_sum_that_is_no_adapter_is_refused(method: Method) -> None:
    if method.sums:
        pytest.skip("sums of this method are adapters: test_add_weighted_adapter_is_the_sum")
    model, batch = adapt(method, MODELS["mlp"]), MODELS["mlp"].batch()
    before = run(model, batch)
    add(model, method)
    with pytest.raises(ValueError, match=r"weighted sum is no adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(run(model, batch), before)


@pytest.mark.parametrize("name", [*LAYERS, "mha", "moe"])
def test_combine_is_exact(method: Method, name: str) -> None:
    """The tensors of the sum, before they are rounded to float32."""
    skip_without_sums(method)
    pico = (LAYERS | MODELS)[name]
    model = three_adapters(method, pico, torch.float64)
    for layer in layers(model).values():
        for container, (_, geometry) in layer.geometries.items():
            deltas = [layer.deltas(adapter)[container] for adapter in ("default", "third")]
            weight = partial(layer._canonical_weight, container)
            fields, tensors = layer.delta_cls.combine(deltas, [0.7, -1.3])
            found = layer.delta_cls(geometry, method.make(pico, **fields)).double()
            assert found.state_dict().keys() == tensors.keys()
            found.prepare(weight, deltas)
            found.load_state_dict({name: tensor.double() for name, tensor in tensors.items()})
            assert_near(found.delta_weight(weight), 0.7 * deltas[0].delta_weight(weight) - 1.3 * deltas[1].delta_weight(weight))


@pytest.mark.parametrize("name", WITHOUT_WHOLE_MODULES)
def test_a_weighted_sum_can_be_saved(method: Method, name: str, tmp_path: Path) -> None:
    skip_without_sums(method)
    pico = MODELS[name]
    model, batch = three_adapters(method, pico, torch.float32), pico.batch()
    expected = dense_output(model, batch, {"default": 0.7, "other": -1.3, "third": 0.5})
    model.add_weighted_adapter(["default", "other", "third"], [0.7, -1.3, 0.5], "sum")
    model.set_adapter("sum")
    found = run(model, batch)
    assert_near(found, expected, 1e-4)  # float32 through a whole model
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path / "sum"))
    assert torch.equal(run(loaded, batch), found)


def test_weighted_sums_that_cannot_be_are_refused(method: Method) -> None:
    skip_without_sums(method)
    model = adapt(method, MODELS["mlp"])
    for adapters, weights, name, kind, message in (
        (["bogus"], [1.0], "sum", "linear", "bogus.*not loaded.*default"),
        (["default"], [1.0], "default", "linear", "exists already"),
        (["default"], [1.0, 2.0], "sum", "linear", "1 adapters and 2 weights"),
        ([], [], "sum", "linear", "0 adapters"),
        (["default"], [1.0], "sum", "svd", "svd.*Accepted: 'linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, name, combination_type=kind)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="modules_to_save"):
        adapt(method, MODELS["bert"]).add_weighted_adapter(["default"], [1.0], "sum")


# Choosing layers ---------------------------------------------------------------------------------------------------------


def signatures(model: Any) -> dict[str, Any]:
    """Shapes and numbers of every Delta, by layer."""

    def signature(delta: nn.Module) -> Any:
        shapes = {key: tuple(value.shape) for key, value in delta.state_dict().items()}
        return shapes, [value for value in vars(delta).values() if isinstance(value, float)]

    return {name: [signature(delta) for delta in layer.deltas("default").values()] for name, layer in layers(model).items()}


PATTERNS = {  # key -> the layers that it reaches
    "model.layers.1.mlp.up_proj": ["model.layers.1.mlp.up_proj"],
    "up_proj": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
    r"layers\.1\..*[qk]_proj": ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"],
}


def test_patterns_reach_the_layers_that_they_name(method: Method) -> None:
    plain = signatures(adapt(method, MODELS["llama"]))
    assert set(method.patterns) == set(method.config.patterns)
    for pattern, value in method.patterns.items():
        for key, reached in PATTERNS.items():
            found = signatures(adapt(method, MODELS["llama"], **{pattern: {key: value}}))
            assert sorted(name for name in plain if found[name] != plain[name]) == reached
        with pytest.warns(RuntimeWarning, match=rf"{pattern} keys did not match.*bogus"):
            adapt(method, MODELS["llama"], **{pattern: {"bogus": value}})


def test_choosing_layers(method: Method) -> None:
    def chosen(**fields: Any) -> set[str]:
        return set(layers(adapt(method, MODELS["llama"], **fields)))

    everything = chosen()
    assert len(everything) == 14
    assert "lm_head" not in everything
    first = {name for name in everything if "layers.0" in name}
    names = sorted({name.rpartition(".")[2] for name in everything})
    assert chosen(target_modules=names, layers_to_transform=[0]) == first
    assert chosen(layers_to_transform=0) == first
    assert chosen(exclude_modules=r".*layers\.1.*") == first
    assert chosen(target_modules=r".*layers\.0\..*_proj") == first
    assert chosen(exclude_modules=["q_proj"]) == {name for name in everything if "q_proj" not in name}
    if method.composes:  # by default, every parameter that the pool changes
        assert everything < chosen(target_modules=None, target_parameters=None)
    else:
        assert chosen(target_modules=None) <= everything
    with pytest.raises(ValueError, match=r"'q_prj', which was not found.*Near names: q_proj"):
        chosen(target_modules=["q_prj"])


def test_whole_modules_are_trained_and_saved(method: Method, tmp_path: Path) -> None:
    pico = MODELS["mlp"]
    model = get_peft_model(pico.model(), config(method, pico, modules_to_save=["head"]))
    start = pico.model().head.weight
    train(model, pico.batch())
    model.save_pretrained(str(tmp_path))
    head = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.head.weight"]
    assert not torch.equal(head, start)
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path))
    assert torch.equal(run(loaded, pico.batch()), run(model, pico.batch()))


def test_all_linear_names_the_fused_stacks_that_it_leaves_out(method: Method) -> None:
    with pytest.warns(UserWarning, match=r"does not reach.*experts\.down_proj.*target_parameters=.*experts\.gate_up_proj"):
        model = adapt(method, MODELS["moe"], target_modules="all-linear", target_parameters=None)
    assert not any("experts" in name for name in layers(model))
    assert any(name.endswith("router") for name in layers(model))


def test_a_router_is_adapted_through_its_weight(method: Method) -> None:
    """It is an nn.Linear that returns a tuple: adding to its output would fail, or choose by other logits than it returns."""
    pico = LAYERS["router"]
    model, x = adapt(method, pico), pico.batch()["x"]
    router = model.get_base_model().layer
    scores, logits = router(x)
    weight = router.weight + router.get_delta_weight("default")
    torch.testing.assert_close(logits, x @ weight.T)
    assert torch.equal((scores > 0).sum(-1), torch.full((len(x),), router.top_k))
    assert torch.equal(scores.argmax(-1), logits.argmax(-1))


# Numbers -----------------------------------------------------------------------------------------------------------------


@each_model
def test_dtypes(method: Method, name: str) -> None:
    pico, dtype = MODELS[name], torch.bfloat16
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(pico.model(dtype), config(method, pico), autocast_adapter_dtype=autocast)
        found = {p.dtype for layer in layers(model).values() for d in layer.deltas("default").values() for p in d.parameters()}
        assert found == {expected}
        assert run(model, pico.batch(dtype)).dtype == dtype
        train(model, pico.batch(dtype), steps=1)


@pytest.mark.parametrize("name", ["mlp", "conv", "mha", "llama, tied", "gpt2", "moe"])
def test_autocast_leaves_every_layer_its_dtype(method: Method, name: str) -> None:
    """Under autocast an embedding gives float32 and a linear layer bfloat16; the adapter must not change that."""
    model, batch = adapt(method, MODELS[name]), MODELS[name].batch()
    found: list[torch.dtype] = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda module, x, y: found.append((y[0] if isinstance(y, tuple) else y).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(model, batch).backward()
        adapted, found[:] = list(found), []
        with model.disable_adapter():
            run(model, batch)
    assert adapted == found
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["mlp", "conv", "llama", "gpt2"])
def test_dropout_acts_in_training_only(method: Method, name: str) -> None:
    batch = MODELS[name].batch()
    if not method.dropout:
        with pytest.raises(ValueError, match=r"dropout=0\.5.*Leave them out"):
            method.config(dropout=0.5)
        return
    model, without = adapt(method, MODELS[name], dropout=0.5), adapt(method, MODELS[name])
    assert torch.equal(run(model, batch), run(without, batch))
    model.train()
    torch.manual_seed(0)
    first, second = run(model, batch), run(model, batch)
    assert_far(first, second)
    torch.manual_seed(0)
    assert torch.equal(run(model, batch), first)
    assert torch.equal(run(model.eval(), batch), run(without, batch))
    with model.train().disable_adapter():
        assert torch.equal(run(model, batch), run(MODELS[name].model(), batch)), "the base's input is not dropped"


def test_an_adapter_that_is_not_there_is_named(method: Method, tmp_path: Path) -> None:
    """By all that a tuner does with an adapter of a name: none of it returns nothing, or fails with a bare key."""
    tuner = adapt(method, MODELS["mlp"]).base_model
    tuner.peft_config["mine"] = tuner.peft_config["default"]
    given = {"batches": [], "mode": True, "kind": "hard", "folder": tmp_path / "new", "path": tmp_path / "new.safetensors"}
    called = set()
    for name, function in inspect.getmembers(type(tuner), inspect.isfunction):
        parameters = inspect.signature(function).parameters
        if name.startswith("_") or hasattr(BaseTuner, name) or "adapter_name" not in parameters:
            continue
        needed = [key for key, one in parameters.items() if one.default is one.empty and key not in ("self", "adapter_name")]
        if name in ("supports_lora_conversion", "add_weighted_adapter"):  # PEFT's
            continue
        with pytest.raises(ValueError, match=r"There is no adapter 'nobody', only \['default', 'mine'\]"):
            list(getattr(tuner, name)(**{key: given[key] for key in needed}, adapter_name="nobody"))
        called.add(name)
    assert called, "`config_of` at least"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mha", "moe"])
def test_dropout_that_has_no_effect_is_said(method: Method, name: str) -> None:
    if not method.dropout:
        return  # refused by the config, see the test above
    with pytest.warns(UserWarning, match=r"dropout=0.5 has no effect on (MultiheadAttention|Llama4Router|Llama4TextExperts)"):
        adapt(method, MODELS[name], dropout=0.5)


# Machinery of torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "t5", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # for a name that is a month old
def test_gradient_checkpointing_changes_nothing(method: Method, name: str, reentrant: bool) -> None:
    pico, gradients = MODELS[name], []
    for checkpointing in (False, True):
        model, batch = adapt(method, pico, torch.float64).train(), pico.batch(torch.float64)
        if checkpointing:
            if "input_ids" in batch:  # reentrant checkpointing needs an input with a gradient
                model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss(model, batch).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert_near(gradients[1][key], gradient)  # not the same bits: an encoder's gradients are summed in another order


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm", "mha", "encoder", "llama"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler, of autograd.Function
def test_compiles_whole_and_once(method: Method, name: str) -> None:
    """No graph break, no second graph in the second step, and the same losses and values as without."""
    pico = MODELS[name]
    results = []
    for compiled in (False, True):
        model, batch = adapt(method, pico, **method.steady), pico.batch()
        call = model
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            call = torch.compile(model, fullgraph=True, backend="aot_eager")
        results.append((train(call, batch, steps=1), model))
        if compiled:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs == 1
            train(call, batch, steps=2)
            assert counters["stats"]["unique_graphs"] == graphs
            assert not counters["graph_break"]
        else:
            train(call, batch, steps=2)
    (losses, eager), (compiled_losses, model) = results
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    ignored = noise(copy.deepcopy(eager), pico.batch())
    for key, value in model.state_dict().items():
        if key not in ignored and not (ignored and key.endswith("running_mean")):  # the mean goes with the bias before it
            torch.testing.assert_close(value, eager.state_dict()[key], rtol=1e-3, atol=1e-4)  # three steps of Adam, float32


def noise(model: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    """Parameters whose gradient is all roundings, such as a bias before a BatchNorm: Adam makes whole steps of those."""
    model.train().zero_grad()
    loss(model, batch).backward()
    norms = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    return {key for key, norm in norms.items() if norm < 1e-5 * max(norms.values())}


class Stack(nn.Module):
    """Convolutions that LoRA has too, with what changes the sizes between: stride, a 1x1 one, and a transposed one's kin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(24, 16, 1)
        self.patches = nn.Conv2d(16, 16, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("name", ["llama", "llama, tied", "bert", "mlp"])
def test_bundled_vectors_stand_for_the_pool(method: Method, name: str, tmp_path: Path) -> None:
    """Saved with the coefficients, low-rank ones as factors; checked, and saved again from there."""
    if not method.composes:
        pytest.skip("has no pool")
    pico = MODELS[name]
    pool = {key: shutil.copy(path, tmp_path / f"{key}.safetensors") for key, path in method.make(pico).pool.items()}
    fields = {**method.fields, **pico.targets, "pool": pool, "init_weights": False, "bundle_vectors": True}
    torch.manual_seed(10)
    model: Any = get_peft_model(pico.model(), method.config(**fields)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = run(model, pico.batch())
    files = {key: tmp_path / "adapter" / "vectors" / f"{key}.safetensors" for key in pool}
    kinds = {name.rpartition("::")[2] for name in load_file(files["task0"]) if "::" in name}
    assert kinds == ({"A", "B"} if method.vector_rank else set())
    assert "bundled in `vectors/`" in (tmp_path / "adapter" / "README.md").read_text()
    for path in pool.values():
        Path(path).unlink()
    loaded: Any = PeftModel.from_pretrained(pico.model(), tmp_path / "adapter").eval()
    assert torch.equal(run(loaded, pico.batch()), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert all(path.read_bytes() == (tmp_path / "again" / "vectors" / path.name).read_bytes() for path in files.values())
    raw = bytearray(files["task1"].read_bytes())
    raw[-3] ^= 1
    files["task1"].write_bytes(raw)
    with pytest.raises(ValueError, match=r"'task1': .*vectors/task1\.safetensors is not the file that was saved"):
        PeftModel.from_pretrained(pico.model(), tmp_path / "adapter")
    files["task1"].unlink()
    with pytest.raises(ValueError, match=r"'task1'.*no such folder or file.*was saved with vectors/task1\.safetensors"):
        PeftModel.from_pretrained(pico.model(), tmp_path / "adapter")


def test_a_bundle_has_room_for_any_name(method: Method, tmp_path: Path) -> None:
    """File systems take 255 characters; two long names that begin alike stay apart."""
    if not method.composes:
        pytest.skip("has no pool")
    pico = MODELS["mlp"]
    files = method.make(pico).pool.values()
    pool = {"a/ü" * 100 + str(i): shutil.copy(path, tmp_path / f"{i}.safetensors") for i, path in enumerate(files)}
    fields = {**method.fields, **pico.targets, "pool": pool, "init_weights": False, "bundle_vectors": True}
    model: Any = get_peft_model(pico.model(), method.config(**fields)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = run(model, pico.batch())
    for path in pool.values():
        Path(path).unlink()
    assert len(list((tmp_path / "adapter" / "vectors").iterdir())) == len(pool) > 1
    assert torch.equal(run(PeftModel.from_pretrained(pico.model(), tmp_path / "adapter").eval(), pico.batch()), expected)


def test_a_bundle_is_saved_over_a_damaged_one_and_left_out_where_it_is_not_wanted(method: Method, tmp_path: Path) -> None:
    if not method.composes:
        pytest.skip("has no pool")
    pico = MODELS["llama"]
    pool: Any = {key: shutil.copy(path, tmp_path / f"{key}.safetensors") for key, path in method.make(pico).pool.items()}
    pico.model().save_pretrained(tmp_path / "base")
    whole: Any = fine_tuned(pico)
    whole.save_pretrained(tmp_path / "whole")
    base = str(tmp_path / "base")
    pool = {"whole": {"path": str(tmp_path / "whole"), "base": base}, **pool} if not method.vector_rank else pool
    fields = {**method.fields, **pico.targets, "pool": pool, "init_weights": False, "bundle_vectors": True}
    model: Any = get_peft_model(pico.model(), method.config(**fields)).eval()
    model.save_pretrained(tmp_path / "adapter")
    for name in pool:
        path = tmp_path / (name if name == "whole" else f"{name}.safetensors")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    loaded: Any = PeftModel.from_pretrained(pico.model(), tmp_path / "adapter").eval()
    loaded.save_pretrained(tmp_path / "again")  # the same bytes: of whole models too, which were opened with their base
    files = sorted((tmp_path / "adapter" / "vectors").iterdir())
    assert [path.name for path in files] == sorted(f"{name}.safetensors" for name in pool)
    for cut in (-5, 0):
        for path in files:
            again = tmp_path / "again" / "vectors" / path.name
            assert again.read_bytes() == path.read_bytes()
            again.write_bytes(path.read_bytes()[:cut])
        loaded.save_pretrained(tmp_path / "again")
    loaded.peft_config["default"].bundle_vectors = False
    with pytest.warns(UserWarning, match=r"task0, task1.* were read from .*vectors and are not saved .* bundle_vectors=True"):
        loaded.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "vectors").exists()
    assert "bundle" not in (tmp_path / "bare" / "README.md").read_text()
    records = json.loads((tmp_path / "bare" / "adapter_config.json").read_text())["provenance"]["vectors"]
    assert not any("bundle" in record for record in records)
    loaded.peft_config["default"].bundle_vectors = True
    loaded.save_pretrained(tmp_path / "third")
    own = (tmp_path / name / "adapter_config.json" for name in ("adapter", "third"))
    assert len({path.read_bytes() for path in own}) == 1


BYTES = {
    **{name: MODELS[name] for name in ("mlp", "llama", "gpt2", "bert", "t5")},
    "conv": Pico(Stack, lambda: {"x": torch.randn(4, 3, 16, 16)}, {"target_modules": ["same", "down", "pointwise", "patches"]}),
}


@pytest.mark.parametrize("name", BYTES)
@each_dtype
def test_keeps_no_more_for_backward_than_lora(method: Method, name: str, dtype: torch.dtype) -> None:
    """Bytes of all storages that autograd keeps, each once, but for parameters and buffers: at most those of LoRA of that rank.

    For layers that are called. One that reads its own weight (MultiheadAttention, experts) keeps a dW, like LoRA's there.
    """
    if method.composes:
        return keeps_no_more_than_full_fine_tuning_and_the_weights(method, BYTES[name], dtype)
    if method.replaces_base and name == "conv":
        pytest.skip("a budget of additive adapters: a kernel between two factors needs two narrow tensors, LoRA's one")
    pico, kept = BYTES[name], {}
    targets = {**pico.targets, "task_type": None}
    lora = LoraConfig(r=method.lora_rank, fan_in_fan_out=name == "gpt2", **targets)
    for kind, chosen in (("ours", method.config(**{**method.fields, **targets})), ("lora", lora)):
        model = get_peft_model(pico.model(dtype), chosen).train()
        kept[kind] = bytes_for_backward(model, pico.batch(dtype))
    assert 0 < kept["ours"] <= kept["lora"]


def keeps_no_more_than_full_fine_tuning_and_the_weights(method: Method, pico: Pico, dtype: torch.dtype) -> None:
    """A composed weight is kept as full fine-tuning keeps its own; no sum, product or vector beside it, however many."""
    model = get_peft_model(pico.model(dtype), config(method, pico, task_type=None)).train()
    weights = sum(layer._base_weight(container).nbytes for layer in layers(model).values() for container in layer.geometries)
    adding = [d for layer in layers(model).values() for d in layer.deltas("default").values() if d.adds]
    inner = len(adding) * 4 * 24 * 4  # `[n, R]` in float32: 24 tokens, two vectors of rank 2
    full = pico.model(dtype).train().requires_grad_(True)
    assert 0 < bytes_for_backward(model, pico.batch(dtype)) <= bytes_for_backward(full, pico.batch(dtype)) + weights + inner


def bytes_for_backward(model: nn.Module, batch: dict[str, Tensor]) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}  # there anyway
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = output(model, batch)
    assert result.requires_grad
    return sum(size for pointer, (size, _) in storages.items() if pointer not in own)


# BatchNorm ---------------------------------------------------------------------------------------------------------------

NORMED = pytest.mark.parametrize("name", ["batch norm", "resnet"])


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the base's own BatchNorm layers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            found |= {f"{name}.{key}": getattr(module, key).clone() for key in STATISTICS}
    return found


def norms(model: nn.Module) -> list[BatchNormLayer]:
    return [module for module in model.modules() if isinstance(module, BatchNormLayer)]


@NORMED
def test_batch_norm_statistics_belong_to_the_adapter(method: Method, name: str, tmp_path: Path) -> None:
    pico = MODELS[name]
    base, batch = pico.model(), pico.batch()
    own, expected = statistics(base), run(base, batch)
    model = get_peft_model(base, config(method, pico))
    train(model, batch)
    trained = run(model, batch)
    for norm in norms(model):
        kept = getattr(norm, norm.container)["default"]
        assert int(kept.num_batches_tracked) == 3
        assert not torch.equal(kept.running_mean, norm.base_layer.running_mean)
    assert_same(statistics(model), own)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), expected)
        run(model.train(), batch)  # train mode without an adapter
        assert torch.equal(run(model.eval(), batch), expected)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path))
    assert torch.equal(run(loaded, batch), trained)
    assert_same(statistics(loaded), own)
    assert_same(statistics(model.unload()), own)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same bits; the names differ by what the wrappers insert."""
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


@NORMED
def test_batch_norm_statistics_of_two_adapters(method: Method, name: str) -> None:
    pico = MODELS[name]
    model, batch = get_peft_model(pico.model(), config(method, pico)), pico.batch()
    train(model, batch)
    first = run(model, batch)
    model.add_adapter("other", config(method, pico))
    model.set_adapter("other")
    fresh = run(model, batch)
    train(model, pico.batch(seed=5))
    second = run(model, batch)
    model.set_adapter("default")
    assert torch.equal(run(model, batch), first)
    mixed = run(model.eval(), batch, adapter_names=["other", "default", "default", "other"])
    assert_near(mixed, torch.stack([second[0], first[1], first[2], second[3]]), 1e-5)  # float32, other batch sizes
    with model.disable_adapter():
        assert_near(run(model, batch), run(pico.model(), batch), 0.0)
    assert not torch.equal(fresh, second)


@NORMED
def test_batch_norm_statistics_merge_and_unmerge(method: Method, name: str) -> None:
    pico = MODELS[name]
    model, batch = get_peft_model(pico.model(), config(method, pico)), pico.batch()
    train(model, batch)
    own, trained = statistics(model), run(model, batch)
    model.merge_adapter()
    assert_near(run(model, batch), trained, 1e-5)  # float32: weights rounded once more
    model.unmerge_adapter()
    assert_same(statistics(model), own)
    assert torch.equal(run(model, batch), trained)
    merged = model.merge_and_unload()
    assert_near(run(merged, batch), trained, 1e-5)
    assert not any(isinstance(module, BatchNormLayer) for module in merged.modules())


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 3.0), (0.25, 0.75)), ((1.0, -2.0), (1.0, 0.0)), ((-1.0, 0.0), None)])
def test_a_weighted_sum_averages_the_statistics(method: Method, weights: Any, shares: tuple[float, float] | None) -> None:
    """They cannot be summed: the mean by the positive weights; the base's, if there is none."""
    skip_without_sums(method)
    pico = MODELS["batch norm"]
    model = get_peft_model(pico.model(), config(method, pico))
    train(model, pico.batch())
    model.add_adapter("other", config(method, pico))
    model.set_adapter("other")
    train(model, pico.batch(seed=5))
    model.add_weighted_adapter(["default", "other"], list(weights), "mix")
    (norm,) = norms(model)
    kept = getattr(norm, norm.container)
    for name in ("running_mean", "running_var"):
        first, second, found = (getattr(kept[adapter], name) for adapter in ("default", "other", "mix"))
        own = getattr(norm.base_layer, name)
        torch.testing.assert_close(found, own if shares is None else shares[0] * first + shares[1] * second)


def test_batch_norm_statistics_can_be_left_to_the_base(method: Method) -> None:
    pico = MODELS["batch norm"]
    model = get_peft_model(pico.model(), config(method, pico, adapt_batch_norm=False))
    own = statistics(model)
    assert not norms(model)
    train(model, pico.batch())
    assert any(not torch.equal(a, b) for a, b in zip(statistics(model).values(), own.values(), strict=True))
