"""What serving engines read: an exported LoRA by its keys and config, and merged models by transformers' `pipeline`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from peft import get_peft_model
from safetensors.torch import load_file

from peft_subspace import export_compressed, save_as_lora
from tests.flows.test_transformers import tokenizer
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, run, train

# vLLM's `parse_fine_tuned_lora_name` takes a key apart at its dots: these two parts first, lora_A or lora_B and weight last.
KEY = re.compile(r"base_model\.model\.(?P<module>model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])\.weight")
# What vLLM's `PEFTHelper` and SGLang's `LoRAConfig` require, and values that vLLM's `_validate_features` refuses.
REQUIRED = {"r", "lora_alpha", "target_modules"}
REFUSED = {"modules_to_save": None, "use_dora": False}
GENERATE = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}


def trained(method: Method, name: str = "llama") -> Any:
    model = get_peft_model(MODELS[name].model(), method.make(MODELS[name], init_weights=False, **MODELS[name].targets))
    train(model, MODELS[name].batch())
    return model


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.exports])
def test_keys_and_config_are_those_that_vllm_and_sglang_read(name: str, tmp_path: Path) -> None:
    model = trained(METHODS[name])
    save_as_lora(model, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert set(config) >= REQUIRED
    assert {key: config.get(key) for key in REFUSED} == REFUSED
    assert config["bias"] == "none"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {}), "vLLM reads one rank and one alpha"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        assert match, key
        found.setdefault(match["module"], {})[match["side"]] = tuple(tensor.shape)
    base = model.get_base_model()
    for module, shapes in found.items():
        layer: Any = base.get_submodule(module)
        assert shapes == {"A": (config["r"], layer.in_features), "B": (layer.out_features, config["r"])}, module
    assert set(found) == set(config["target_modules"])


@each_method
def test_a_merged_model_is_loaded_by_pipeline(method: Method, tmp_path: Path) -> None:
    """From its folder, by transformers alone; of PELA the compressed model, which needs this package's import."""
    model = trained(method)
    expected = run(model.eval(), MODELS["llama"].batch())
    merged = export_compressed(model) if method.replaces_base else model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    # merging rounds the sum once to float32, and the layers multiply in another order: 1e-5 of the largest logit
    found = run(again, MODELS["llama"].batch())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    (answer,) = tf.pipeline("text-generation", model=str(tmp_path), **GENERATE)("w3 w5 w8")
    ids = tokenizer()("w3 w5 w8", return_tensors="pt", return_token_type_ids=False)
    generated = again.generate(**ids, max_new_tokens=5, do_sample=False)[0, 3:]
    assert answer["generated_text"] == tokenizer().decode(generated, skip_special_tokens=True)
