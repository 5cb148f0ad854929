"""Adapters on quantised bases. `make quantised` runs them: the libraries print to stderr in every process that uses PEFT, so
they are kept out of the development environment.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, PelaConfig, SvfitConfig, export_compressed
from peft_subspace.functional import svd
from tests.pools import folder as pools_folder
from tests.pools import write_vector
from tests.quantised.bases import KINDS, half_step, load, quantised, stored, values, write_llama

pytestmark = pytest.mark.filterwarnings("default")  # these libraries warn on import and at every call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


# The arithmetic of the layers, as a share of the largest logit: bitsandbytes multiplies with activations in eight bits, or,
# where the CPU can, in bfloat16. torchao makes float32 weights of the codes.
ARITHMETIC = {"bnb4": 0.05, "bnb8": 0.05, "torchao": 1e-5, "torchao4": 1e-5}
# bitsandbytes rounds to float16 (2^-11 of an entry) before it goes to 127 steps of eight bits: an eighth of half a step at most
HALF_STEP = {"bnb4": 1.0, "bnb8": 1.125, "torchao": 1.0, "torchao4": 1.0}


def lora_pool(count=6):
    """Task vectors of low rank for the layers that are adapted: dense ones are refused on a quantised weight."""
    generator, shapes = torch.Generator().manual_seed(0), {"self_attn.q_proj": 64, "self_attn.v_proj": 64, "mlp.down_proj": 128}
    pool = {}
    for t in range(count):
        tensors = {}
        for name in (f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in shapes):
            columns = shapes[".".join(name.split(".")[3:5])]
            tensors[f"{name}::A"] = 0.3 * torch.randn(4, columns, generator=generator)
            tensors[f"{name}::B"] = 0.3 * torch.randn(64, 4, generator=generator)
        pool[f"v{t}"] = write_vector(pools_folder() / f"quantised-{t}.safetensors", tensors)
    return pool


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
BY_RANK = {"granularity": "rank", "learn_coefficients": "layer", "stochastic": False}
CONFIGS = {
    "atlas": AtlasConfig(pool=lora_pool(), **TARGETS),
    "concrete": ConcreteConfig(pool=lora_pool(), **BY_RANK, **TARGETS),
    "flora": FloraConfig(r=4, **TARGETS),
    "pela": PelaConfig(r=16, **TARGETS),
    "svfit": SvfitConfig(r="full", **TARGETS),
}
RATES = {"atlas": 0.1, "concrete": 0.5, "flora": 2e-2, "pela": 1e-2, "svfit": 0.1}
CHANGES = ("concrete", "pela")  # before they are trained: masked vectors are added, a compressed layer is an approximation


def unquantised(folder, kind, model):
    """A plain llama with the weights that the codes of a quantised one stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                found = model.get_submodule(name)
                module.weight.copy_(values(kind, getattr(found, "base_layer", found).weight))
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_train_save_load_merge_unmerge(folder, kind, method, tmp_path):
    base = load(folder, kind)
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load(folder, kind)(input_ids=ids).logits  # of other copies: bitsandbytes repacks weights in the first forward
        untrained = get_peft_model(load(folder, kind), copy.deepcopy(CONFIGS[method])).eval()
        assert torch.equal(untrained(input_ids=ids).logits, before) == (method not in CHANGES)
    model = get_peft_model(base, copy.deepcopy(CONFIGS[method])).train()
    assert "quantization_backend" in repr(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[method])
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, trained)
        fresh = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
        weights = {name: (p, p.data.clone()) for name, p in fresh.named_parameters() if name.endswith("base_layer.weight")}
        fresh.merge_adapter()
        assert not any(p is dict(fresh.named_parameters())[name] for name, (p, _) in weights.items())
        fresh(input_ids=ids)
        fresh.unmerge_adapter()
        for name, (parameter, data) in weights.items():
            assert dict(fresh.named_parameters())[name] is parameter
            assert torch.equal(plain(parameter.data), plain(data)), "the quantised weights themselves must come back"
        assert torch.equal(fresh(input_ids=ids).logits, trained)
        with fresh.disable_adapter():
            assert torch.equal(fresh(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_gradients_are_those_on_the_weights_that_the_codes_stand_for(folder, kind, method):
    ids, gradients = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0)), []
    for base in (load(folder, kind), unquantised(folder, kind, load(folder, kind))):
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS[method])
        config.init_weights = method == "pela"  # the factors of the same weight, which random ones are not
        if method == "svfit":
            config.basis_dtype = "float32"  # one that is saved, as it must be on a quantised base, is float16 by itself
        model = get_peft_model(base, config).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) >= 6
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-4, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_merged_weight_is_the_sum_quantised_again(folder, kind, method):
    """Bit by bit what the library makes of W + dW, W read by the format's formula; so the loss is half a step an entry."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[method])
    config.init_weights = False
    model = get_peft_model(load(folder, kind), config).eval()
    layers = dict(model.base_model.named_subspace_layers())
    assert len(layers) == 6
    with torch.no_grad():
        updates = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
        sums = {name: values(kind, layer.get_base_layer().weight) + updates[name] for name, layer in layers.items()}
        model.merge_adapter()
        for name, total in sums.items():
            merged = layers[name].get_base_layer().weight
            for found, expected in zip(stored(kind, merged), stored(kind, quantised(kind, total.clone())), strict=True):
                assert torch.equal(found, expected), name
            step = half_step(kind, merged)
            assert updates[name].abs().max() > step.min(), f"{name}: the update is lost in the rounding"
            assert ((values(kind, merged) - total).abs() <= 1.0001 * HALF_STEP[kind] * step).all(), name
        ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
        expected = unquantised(folder, kind, model.base_model.model)(input_ids=ids).logits
        assert (model(input_ids=ids).logits - expected).abs().max() <= ARITHMETIC[kind] * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_basis_on_a_quantised_base_goes_into_the_file(folder, kind, tmp_path, monkeypatch):
    """It could not be made again elsewhere; loading decomposes nothing and reads no packed weight."""
    model = get_peft_model(load(folder, kind), SvfitConfig(r=4, target_modules=["q_proj"], init_weights=False))
    assert model.peft_config["default"].save_basis is True
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(svd, "leading_singular", lambda *args: pytest.fail("decomposed on loading"))
    ids = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_model_on_a_quantised_base_is_not_exported(folder, kind, tmp_path):
    """Its factors are exported from the unquantised base, onto which the adapter's file loads."""
    model = get_peft_model(load(folder, kind), PelaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"base is quantised .*load the base unquantised"):
        export_compressed(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = again(input_ids=ids).logits
        torch.testing.assert_close(export_compressed(again)(input_ids=ids).logits, expected)


def plain(weight):
    return weight.dequantize() if hasattr(weight, "qdata") else weight


def repacked(folder, **attributes):
    """An adapter on two layers of a 4-bit base that has been called in eval mode."""
    base = load(folder, "bnb4")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module).update(attributes)
    model = get_peft_model(base, FloraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    return model


def test_weight_repacked_by_bitsandbytes_is_refused(folder):
    """It can be called, and neither read nor trained through: bitsandbytes itself says nothing and loses the gradient."""
    model = repacked(folder)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: .*cannot read it back"):
        model.merge_adapter()
    assert not layer.merged_adapters
    ids = torch.arange(12)[None]
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: .*no gradient goes through it"):
        model.train()(input_ids=ids, labels=ids)


def test_the_way_out_that_the_refusal_names(folder):
    model, ids = repacked(folder, support_avx512bf16_for_cpu=False).train(), torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool((p.grad != 0).any()) for name, p in model.named_parameters() if name.endswith("flora_delta.default.core"))
    model.eval().merge_adapter()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_initialisation_is_refused_by_name(folder, kind):
    config = FloraConfig(r=4, target_modules=["q_proj"], init_weights="gradient", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, kind), config)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"q_proj is quantised and has no gradient"):
        model.initialize_from_gradients([{"input_ids": ids, "labels": ids}])
    copy.deepcopy(model)


REFUSED = {
    "aTLAS, dense vectors": (AtlasConfig, "dense", {}, "with granularity='block'"),
    "aTLAS, rows of LoRA vectors": (AtlasConfig, "low", {"granularity": "row"}, "with granularity='block'"),
    "Concrete, dense vectors": (ConcreteConfig, "dense", {}, "with granularity='rank'"),
    "Concrete, dense vectors by rank": (ConcreteConfig, "dense", {"granularity": "rank"}, "with granularity='rank'"),
    "Concrete, entries of LoRA vectors": (ConcreteConfig, "low", {"granularity": "element"}, "with granularity='rank'"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_a_dense_weight_is_refused_by_name(folder, kind, case):
    config, form, fields, way_out = REFUSED[case]
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, low = {name: torch.ones(64, 64)}, {f"{name}::A": torch.ones(2, 64), f"{name}::B": torch.ones(64, 2)}
    path = write_vector(pools_folder() / f"{form}.safetensors", dense if form == "dense" else low)
    model = load(folder, kind)
    with pytest.raises(ValueError, match=rf"q_proj: the weight is quantised.*Use LoRA adapters as task vectors {way_out}"):
        get_peft_model(model, config(pool={form: path}, **fields))
    assert not hasattr(model, "peft_config")
