"""An exported adapter is a LoRA that plain PEFT loads and that computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peft_subspace import FloraConfig, SvfitConfig, export, save_as_lora, to_lora
from tests.pico import LAYERS, MODELS, Pico, output, run, train

FLORA: dict[str, dict[str, Any]] = {  # pico -> config fields beside its own targets
    "linear": {},
    "linear, sequence": {"r": [5, 2]},
    "Conv1D": {},
    "conv1d": {},
    "conv2d": {},
    "conv3d": {},
    "conv, rectangular": {"r": [3, 2, 2, 4]},
    "conv, stride": {},
    "conv, patches": {},
    "conv, same, even": {},
    "conv, pointwise": {},
    "conv, pointwise, stride": {},
    "embedding": {},
    "embedding, padding_idx": {},
    "embedding, scaled": {},
    "mlp": {"rank_pattern": {"first": 5, "second": [2, 7]}, "modules_to_save": ["head"]},
    "batch norm": {"target_modules": ["stem", "pointwise"]},
    "resnet": {"rank_pattern": {r".*stages.*": 1}},
    "llama": {"rank_pattern": {"q_proj": 5, "down_proj": [1, 3]}},
    "llama, tied": {"target_modules": ["embed_tokens", "v_proj"]},
    "gpt2": {},
    "bert": {},
    "vit": {},
    "t5": {},
}
SVFIT: dict[str, dict[str, Any]] = {  # the same layers, with its own ranks
    **{name: {k: v for k, v in fields.items() if k in ("modules_to_save", "target_modules")} for name, fields in FLORA.items()},
    "linear, sequence": {"r": "full"},
    "conv2d": {"r": "full", "save_basis": False},
    "mlp": {"rank_pattern": {"first": 5, "second": "full"}, "modules_to_save": ["head"]},
    "llama": {"rank_pattern": {"q_proj": 5}, "scale": "relative", "svd": "lowrank"},
}
CASES = {
    f"{kind}|{name}": (cls, fields)
    for kind, cls, table in (("flora", FloraConfig, FLORA), ("svfit", SvfitConfig, SVFIT))
    for name, fields in table.items()
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch, of such a base layer
]


def trained(pico: Pico, config: Any = FloraConfig, **fields: Any) -> Any:
    """A model whose adapter is random and was trained a little, with its BatchNorm statistics and heads."""
    torch.manual_seed(3)
    model = get_peft_model(pico.model(), config(**{"r": 2, "init_weights": False, **pico.targets, **fields}))
    train(model, pico.batch())
    return model


def test_plain_peft_computes_the_same(tmp_path: Path) -> None:
    """In a process that cannot import this package. One process for all cases: importing PEFT costs seconds."""
    expected: dict[str, Tensor] = {}
    for name, (config, fields) in CASES.items():
        pico = (LAYERS | MODELS)[name.partition("|")[2]]
        model = trained(pico, config, **fields)
        expected[name] = run(model, pico.batch())
        base = run(pico.model(), pico.batch())
        assert float((expected[name] - base).norm() / base.norm()) > 0.01, f"{name}: the adapter does nothing"
        save_as_lora(model, tmp_path / name)
    script = Path(__file__).with_name("plain_lora.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    found = load_file(tmp_path / "outputs.safetensors")
    assert found.keys() == expected.keys()
    # float32: two more roundings of 6e-8 in every sum; 1e-6 of the size of the output
    errors = {name: float((found[name] - y).abs().max() / y.abs().max()) for name, y in expected.items()}
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}


@pytest.mark.parametrize("name", ["mha", "mha, batch second"])
def test_multihead_attention_waits_for_peft(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21.2 adds the LoRA of out_proj twice (huggingface/peft#3774). The tensors are exact; PEFT's forward is not."""
    pico = MODELS[name]
    model = trained(pico, rank_pattern={"attention.out_proj.weight": 4})
    twice = export._peft_adds_out_proj_twice()
    if twice:
        with pytest.raises(ValueError, match=r"attention\.in_proj_weight: cannot be exported.*PEFT .* twice"):
            to_lora(model)
    monkeypatch.setattr(export, "_peft_adds_out_proj_twice", lambda: False)
    save_as_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(pico.model(), str(tmp_path)).eval()
    lora, ours = loaded.get_base_model().attention, model.get_base_model().attention.deltas("default")
    for layer, container in ((lora, "in_proj_weight"), (lora.base_layer.out_proj, "out_proj_weight")):
        expected = ours[f"flora_delta_{container}"].delta_weight()
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
    same = torch.allclose(run(loaded, pico.batch()), run(model, pico.batch()), rtol=1e-5, atol=1e-6)
    assert same != twice, "the probe is right about the installed PEFT"


def test_all_layers_have_one_rank_and_the_scale_is_inside() -> None:
    model = trained(MODELS["llama"], rank_pattern={"q_proj": 5, "down_proj": [1, 3]}, scale=3.0)
    config, tensors = to_lora(model)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (5, 5, {}, {})
    assert config.target_modules == {name for name, _ in model.base_model.named_subspace_layers()}
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    assert ranks == {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key} == {5}
    layer = dict(model.base_model.named_subspace_layers())["model.layers.0.mlp.down_proj"]
    prefix = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    product = tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
    torch.testing.assert_close(product, layer.get_delta_weight("default").detach())
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_an_adapter_of_several_can_be_chosen_and_the_model_stays_as_it_was() -> None:
    pico = MODELS["mlp"]
    model = trained(pico)
    model.add_adapter("other", FloraConfig(r=3, init_weights=False, target_modules=["second"]))
    before, output_before = {k: v.clone() for k, v in model.state_dict().items()}, output(model, pico.batch())
    config, tensors = to_lora(model, "other")
    assert config.r == 3
    assert {key.split(".")[2] for key in tensors} == {"second"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(model, pico.batch()), output_before)
    with pytest.raises(ValueError, match=r"no adapter 'bogus'.*\['default', 'other'\]"):
        to_lora(model, "bogus")


def test_works_on_a_transformers_model_without_a_peft_model() -> None:
    pico = MODELS["llama"]
    model: Any = pico.model()
    model.add_adapter(FloraConfig(r=2, init_weights=False, target_modules=["q_proj"]), "default")
    config, tensors = to_lora(model)
    assert config.target_modules == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert len(tensors) == 4


@pytest.mark.parametrize("config", [FloraConfig, SvfitConfig])
@pytest.mark.parametrize(
    ("name", "where", "why"),
    [
        ("conv, groups", "layer.weight", "no exact LoRA form"),
        ("conv, depthwise", "layer.weight", "no exact LoRA form"),
        ("transposed2d", "layer.weight", "no exact LoRA form"),
        ("conv, dilation", "layer.weight", r"ignores dilation=\(2, 2\)"),
        ("conv2d, reflect", "layer.weight", "ignores padding_mode='reflect'"),
        ("conv2d, circular", "layer.weight", "ignores padding_mode='circular'"),
        ("conv, own forward", "layer.weight", "StandardizedConv has a forward of its own"),
        ("router", "layer.weight", "Llama4Router has a forward of its own"),
        ("experts", "layer.gain", "no exact LoRA form"),
        ("moe", "experts.(gate_up|down)_proj", "no exact LoRA form"),
        ("mha, other keys", "attention.q_proj_weight", "of one size"),
        ("conv", "depthwise.weight", "no exact LoRA form"),
    ],
)
def test_what_lora_cannot_express_is_refused_by_name(config: Any, name: str, where: str, why: str, tmp_path: Path) -> None:
    model = trained((LAYERS | MODELS)[name], config)
    with pytest.raises(
        ValueError, match=rf"({where}).*cannot be exported to LoRA.*merge_and_unload.*exclude_modules"
    ) as refused:
        save_as_lora(model, tmp_path / "lora")
    refused.match(why)
    assert not (tmp_path / "lora").exists()
