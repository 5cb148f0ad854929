"""Adapters on quantised bases. `make quantised` runs them: the libraries print to stderr in every process that uses PEFT, so
they are kept out of the development environment.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_subspace import AtlasConfig, FloraConfig, PelaConfig, SvfitConfig, export_compressed
from peft_subspace.functional import svd
from tests.pools import folder as pools_folder
from tests.pools import write_vector

pytestmark = pytest.mark.filterwarnings("default")  # these libraries warn on import and at every call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder, kind):
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`make quantised` installs it)")
        from transformers import BitsAndBytesConfig

        four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        config = BitsAndBytesConfig(**(four if kind == "bnb4" else dict(load_in_8bit=True)))
    else:
        pytest.importorskip("torchao", reason="torchao is not installed (`make quantised` installs it)")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        # `Int4WeightOnlyConfig` has no packing for CPUs in torchao 0.18
        four = dict(weight_dtype=torch.int4, granularity=PerGroup(32))
        config = TorchAoConfig(IntxWeightOnlyConfig(**four) if kind == "torchao4" else Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")


KINDS = ["bnb4", "bnb8", "torchao", "torchao4"]
# What requantising a merged weight costs, as a share of the largest logit: about the quantiser's own error.
# int4 is symmetric and even, a step of 1/7 of the largest of 32 values, where nf4 has the quantiles of a normal distribution.
LOSS = {"bnb4": 0.25, "bnb8": 0.05, "torchao": 0.05, "torchao4": 0.5}


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


CONFIGS = {
    "atlas": AtlasConfig(pool=lora_pool(), target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "flora": FloraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "pela": PelaConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "svfit": SvfitConfig(r="full", target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
}
RATES = {"atlas": 0.1, "flora": 2e-2, "pela": 1e-2, "svfit": 0.1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_train_save_load_merge_unmerge(folder, kind, method, tmp_path):
    base = load(folder, kind)
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load(folder, kind)(input_ids=ids).logits  # of another copy: bitsandbytes repacks weights in the first forward
    model = get_peft_model(base, copy.deepcopy(CONFIGS[method]))
    assert "quantization_backend" in repr(model)
    with torch.no_grad():  # a compressed layer is an approximation
        assert torch.equal(model(input_ids=ids).logits, before) == (method != "pela")
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
        merged = fresh(input_ids=ids).logits
        assert (merged - trained).abs().max() <= LOSS[kind] * trained.abs().max()
        fresh.unmerge_adapter()
        for name, (parameter, data) in weights.items():
            assert dict(fresh.named_parameters())[name] is parameter
            assert torch.equal(plain(parameter.data), plain(data)), "the quantised weights themselves must come back"
        assert torch.equal(fresh(input_ids=ids).logits, trained)
        with fresh.disable_adapter():
            assert torch.equal(fresh(input_ids=ids).logits, before)


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


def test_weight_repacked_by_bitsandbytes_is_refused(folder):
    model = get_peft_model(load(folder, "bnb4"), FloraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    with pytest.raises(ValueError, match="cannot read it back"):
        model.merge_adapter()
    assert not layer.merged_adapters


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_initialisation_is_refused_by_name(folder, kind):
    config = FloraConfig(r=4, target_modules=["q_proj"], init_weights="gradient", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, kind), config)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"q_proj is quantised and has no gradient"):
        model.initialize_from_gradients([{"input_ids": ids, "labels": ids}])
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_task_vectors_are_refused_by_name(folder, kind):
    path = write_vector(pools_folder() / "dense.safetensors", {"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64)})
    model = load(folder, kind)
    with pytest.raises(ValueError, match=r"q_proj: the weight is quantised.*Use LoRA adapters"):
        get_peft_model(model, AtlasConfig(pool={"dense": path}))
    assert not hasattr(model, "peft_config")
