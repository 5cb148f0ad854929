"""Which layers an adapter takes, and the configs that do not fit a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_subspace import FloraConfig, SubspaceLayer
from tests.base.snapshot import mixed_model, unchanged
from tests.pico import MODELS, Mlp, output


def adapted(model: nn.Module, adapter_name: str = "default") -> set[str]:
    """Names of the adapted layers, as they were called before."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {n for n, m in model.named_modules() if isinstance(m, SubspaceLayer) and m.has_adapter(adapter_name)}
    return {name.replace(".base_layer", "") for name in found}


# What a config means -----------------------------------------------------------------------------------------------------

LLAMA_LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def llama(names: list[str], layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in layers for name in names}


ALL_LLAMA = llama(LLAMA_LINEAR)
BERT_LINEAR = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT_LINEAR += ["intermediate.dense", "output.dense"]
CONVOLUTIONS = {"stem", "depthwise", "grouped", "pointwise"}
MEANINGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "default of a known architecture": ("llama", {}, llama(["self_attn.q_proj", "self_attn.v_proj"])),
    "default of GPT-2": ("gpt2", {}, {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}),
    "default of an unknown one": ("mlp", {}, {"first", "second", "head"}),
    "default of an unknown conv net": ("conv", {}, {"stem", "grouped", "depthwise", "pointwise"}),
    "default with parameters": ("moe", {"target_parameters": ["experts.down_proj"]}, {"model.layers.0.feed_forward.experts"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}, ALL_LLAMA),
    "ALL-LINEAR": ("llama", {"target_modules": "ALL-LINEAR"}, ALL_LLAMA),
    "all-linear leaves the classifier": (
        "bert",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in BERT_LINEAR} | {"bert.pooler.dense"},
    ),
    "all-linear takes attention whole": (
        "encoder",
        {"target_modules": "all-linear"},
        {"layer.self_attn", "layer.linear1", "layer.linear2"},
    ),
    "default takes attention whole": ("mha", {}, {"attention", "head"}),
    "attention by name": ("mha", {"target_modules": ["attention"]}, {"attention"}),
    "all-conv": ("conv", {"target_modules": "all-conv"}, CONVOLUTIONS),
    "all-conv in a list": ("conv", {"target_modules": ["all-conv"]}, CONVOLUTIONS),
    "mixed list": ("conv", {"target_modules": ["all-conv", "head"]}, CONVOLUTIONS | {"head"}),
    "both": ("conv", {"target_modules": ["all-conv", "all-linear"]}, CONVOLUTIONS | {"head"}),
    "regular expression": ("llama", {"target_modules": r".*\.1\..*(q|k)_proj"}, llama(LLAMA_LINEAR[:2], (1,))),
    "layers_to_transform": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        llama(["self_attn.q_proj"], (1,)),
    ),
    "the first layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}, llama(["self_attn.q_proj"], (0,))),
    "layers_pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        llama(["self_attn.q_proj"], (1,)),
    ),
    "all-linear of some layers": (
        "llama",
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        llama(LLAMA_LINEAR, (0,)),
    ),
    "exclude_modules": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        ALL_LLAMA - llama(["self_attn.q_proj"]) - {"model.layers.1.mlp.down_proj"},
    ),
    "exclude by expression": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
        llama(LLAMA_LINEAR[:4]),
    ),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_a_config_means_these_layers(case: str) -> None:
    name, fields, expected = MEANINGS[case]
    assert adapted(get_peft_model(MODELS[name].model(), FloraConfig(r=2, **fields))) == expected


def test_the_default_of_a_net_without_linear_layers_is_all_conv() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3))
    assert adapted(get_peft_model(model, FloraConfig(r=2))) == {"0", "2"}


def test_all_linear_tells_of_fused_experts() -> None:
    with pytest.warns(
        UserWarning, match=r"does not reach .*experts.*target_parameters=\['experts.down_proj', 'experts.gate_up"
    ):
        model = get_peft_model(MODELS["moe"].model(), FloraConfig(r=2, target_modules="all-linear"))
    assert "model.layers.0.feed_forward.router" in adapted(model)


@pytest.mark.parametrize("first", [["q_proj", "k_proj"], "all-linear"])
def test_a_second_adapter_takes_all_linear_layers(first: Any) -> None:
    model = get_peft_model(MODELS["llama"].model(), FloraConfig(r=2, target_modules=first))
    model.add_adapter("other", FloraConfig(r=3, target_modules="all-linear"))
    assert adapted(model, "other") == ALL_LLAMA
    assert adapted(model) == (llama(LLAMA_LINEAR[:2]) if isinstance(first, list) else ALL_LLAMA)


@pytest.mark.parametrize("name", ["mha", "encoder"])
def test_a_second_adapter_leaves_attention_whole(name: str) -> None:
    target = "attention" if name == "mha" else "self_attn"
    model = get_peft_model(MODELS[name].model(), FloraConfig(r=2, target_modules=[target]))
    model.add_adapter("other", FloraConfig(r=2, target_modules="all-linear"))
    assert adapted(model, "other") == (
        {"attention", "head"} if name == "mha" else {"layer.self_attn", "layer.linear1", "layer.linear2"}
    )


def test_a_rank_pattern_that_matches_nothing_is_reported() -> None:
    config = FloraConfig(r=2, target_modules=["first"], rank_pattern={"second": 3, "frist": 3}, scale_pattern={"first": 2.0})
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*\['frist', 'second'\]") as caught:
        get_peft_model(MODELS["mlp"].model(), config)
    assert len(caught) == 1


# What does not fit -------------------------------------------------------------------------------------------------------

WAY_OUT = ["list them with `model.named_modules()`"]
MISFITS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "rank above the modes": (
        "llama",
        {"r": [17, 2], "target_modules": ["q_proj"]},
        ["model.layers.0.self_attn.q_proj: the ranks [17, 2]", "[16, 16]", "at most its mode", "rank_pattern"],
    ),
    "rank above one layer": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers.1.*v_proj": [40, 2]}},
        ["model.layers.1.self_attn.v_proj: the ranks [40, 2]", "[16, 16]"],
    ),
    "rank of one mode too high": (
        "llama",
        {"r": [4, 33], "target_modules": ["down_proj"]},
        ["model.layers.0.mlp.down_proj: the ranks [4, 33]", "modes [16, 32]", "at most its mode"],
    ),
    "too many ranks": (
        "llama",
        {"r": [4, 4, 4], "target_modules": ["q_proj"]},
        ["model.layers.0.self_attn.q_proj: r=[4, 4, 4] has 3 ranks", "2 modes"],
    ),
    "kernel ranks": (
        "conv",
        {"r": 2, "r_spatial": [2], "target_modules": ["stem"]},
        ["stem: r_spatial=[2] has 1 ranks", "[3, 3]", "2 modes"],
    ),
    "one name of several": (
        "llama",
        {"r": 2, "target_modules": ["q_proj", "vproj"]},
        ["target_modules names 'vproj'", "LlamaForCausalLM", "Near names:", "v_proj", *WAY_OUT],
    ),
    "a parameter": (
        "moe",
        {"r": 2, "target_parameters": ["experts.downproj"]},
        ["target_parameters names 'experts.downproj'", "experts.down_proj", "model.named_parameters()"],
    ),
    "an expression": (
        "llama",
        {"r": 2, "target_modules": r".*\.vproj"},
        [r".*\.vproj", "not found in the base model", "check the target modules"],
    ),
    "nothing to take": ("llama", {"r": 2, "target_modules": "all-conv"}, ["'all-conv'", "LlamaForCausalLM has no conv layer"]),
    "a layer that is not there": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [7]},
        ["q_proj", "'layers_to_transform': [7]"],
    ),
    "a shorthand in a layer that is not there": (
        "llama",
        {"r": 2, "target_modules": "all-linear", "layers_to_transform": [7]},
        ["'all-linear'", "no linear layer to adapt in layers_to_transform=[7]"],
    ),
    "everything excluded": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        ["exclude_modules"],
    ),
    "an unsupported layer": (
        "llama",
        {"r": 2, "target_modules": ["q_proj", "layers.1.input_layernorm"]},
        [
            "'model.layers.1.input_layernorm' (LlamaRMSNorm) is not supported",
            "Supported are linear",
            "target_parameters",
            "exclude_modules",
        ],
    ),
    "an unsupported layer by expression": (
        "llama",
        {"r": 2, "target_modules": r".*(q_proj|rotary_emb)"},
        ["'model.rotary_emb' (LlamaRotaryEmbedding) is not supported"],
    ),
    "a part of attention": (
        "encoder",
        {"r": 2, "target_modules": ["out_proj"]},
        ["target_modules names 'out_proj'", "not found in Encoder"],
    ),
}
WAYS: dict[str, Callable[[nn.Module, FloraConfig, str], Any]] = {
    "get_peft_model": lambda model, config, name: get_peft_model(model, config, adapter_name=name),
    "inject_adapter_in_model": lambda model, config, name: inject_adapter_in_model(config, model, adapter_name=name),
    "transformers": lambda model, config, name: model.add_adapter(config, adapter_name=name),
}


def refuse(model: nn.Module, batch: Any, act: Callable[[], Any], parts: list[str]) -> None:
    with unchanged(model, batch), pytest.raises(ValueError) as refused:  # noqa: PT011  # the parts are checked one by one
        act()
    for part in parts:
        assert part in str(refused.value), refused.value


def cases_by_way(ways: Iterable[str]) -> list[tuple[str, str]]:
    """Plain torch modules have no `add_adapter` of transformers."""
    return [(case, way) for case in MISFITS for way in ways if way != "transformers" or MISFITS[case][0] in ("llama", "moe")]


@pytest.mark.parametrize(("case", "way"), cases_by_way(WAYS))
def test_a_misfit_leaves_a_fresh_model_as_it_was(case: str, way: str) -> None:
    name, fields, parts = MISFITS[case]
    model, batch = mixed_model(name), MODELS[name].batch()
    refuse(model, batch, lambda: WAYS[way](model, FloraConfig(**fields), "default"), parts)
    good = {key: value for key, value in MODELS[name].targets.items() if key != "task_type"}
    WAYS[way](model, FloraConfig(r=2, **good), "default")  # and it can be used afterwards
    assert torch.isfinite(output(model, batch)).all()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's, for a second `model.add_adapter`
@pytest.mark.parametrize(("case", "way"), cases_by_way(["PeftModel", "transformers"]))
def test_a_misfit_leaves_the_first_adapter_as_it_was(case: str, way: str) -> None:
    name, fields, parts = MISFITS[case]
    model, batch = mixed_model(name), MODELS[name].batch()
    good = {key: value for key, value in MODELS[name].targets.items() if key != "task_type"}
    first = FloraConfig(r=2, init_weights=False, **good)
    if way == "PeftModel":
        model = get_peft_model(model, first)
        refuse(model, batch, lambda: model.add_adapter("second", FloraConfig(**fields)), parts)
    else:
        model.add_adapter(first)
        refuse(model, batch, lambda: model.add_adapter(FloraConfig(**fields), "second"), parts)


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")  # PEFT's
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("adapter_name", "parts"),
    [
        ("flora", ["'flora'", "prefix 'flora_'", "Choose another name"]),
        ("lora", ["'lora'", "prefix 'flora_'"]),
        ("a", ["'a'", "prefix 'flora_'"]),
        ("core", ["'core' is the name of a tensor", "Choose another name"]),
        ("factor_1", ["'factor_1' is the name of a tensor"]),
    ],
)
def test_a_name_that_hides_tensors_is_refused(adapter_name: str, parts: list[str], way: str) -> None:
    model, batch = mixed_model("llama"), MODELS["llama"].batch()
    config = FloraConfig(r=2, target_modules=["q_proj"])
    refuse(model, batch, lambda: WAYS[way](model, config, adapter_name), parts)


def test_the_same_name_twice_is_refused() -> None:
    model = get_peft_model(mixed_model("llama"), FloraConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    batch = MODELS["llama"].batch()
    refuse(model, batch, lambda: model.add_adapter("default", FloraConfig(r=2)), ["'default' already exists"])


def test_a_failure_half_way_is_undone() -> None:
    """PEFT finds out about Mamba's fused kernels when other layers are wrapped already."""
    config = tf.MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2)
    model, batch = tf.MambaForCausalLM(config), {"input_ids": torch.tensor([[1, 2, 3]])}
    config = FloraConfig(r=2, target_modules=["in_proj", "out_proj"])
    refuse(model, batch, lambda: get_peft_model(model, config), ["'out_proj' of a Mamba block", "fused kernel", "exclude it"])
    assert adapted(get_peft_model(model, FloraConfig(r=2, target_modules=["in_proj"]))) == {
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.1.mixer.in_proj",
    }


def test_parameters_keep_their_identity_for_an_optimizer() -> None:
    """A refused adapter must not cost the optimizer that exists already."""
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'frist'"):
        get_peft_model(model, FloraConfig(r=2, target_modules=["first", "frist"]))
    before = output(model, {"x": torch.ones(1, 8)}).detach().clone()
    output(model, {"x": torch.ones(1, 8)}).sum().backward()
    optimizer.step()
    assert not torch.equal(output(model, {"x": torch.ones(1, 8)}), before)
