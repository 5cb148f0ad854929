"""Pools of whole mixtures of experts: the file has the experts one by one, the model in memory has them in stacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.merging import merge
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.renaming import pieces_in_memory
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.pico import run

SMALL: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "Qwen2 MoE": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        )
    ),
    "OLMoE": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)),
}
EVERY = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:The task vector .* does not look like a fine-tuned")


def base_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def tuned(name: str, seed: int) -> Any:
    model, generator = base_of(name), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def pool(name: str, folder: Path) -> dict[str, Any]:
    """Fields of a config: two whole models, saved by transformers, and their base."""
    base_of(name).save_pretrained(folder / "base")
    for seed in (1, 2):
        tuned(name, seed).save_pretrained(folder / f"t{seed}")
    return {"pool": {f"t{seed}": str(folder / f"t{seed}") for seed in (1, 2)}, "base": str(folder / "base")}


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 48, (3, 7), generator=torch.Generator().manual_seed(1))}


def mixed(name: str, shares: tuple[float, float]) -> nn.Module:
    """base + the sum of the weighted differences, in memory."""
    model, models = base_of(name), [tuned(name, seed) for seed in (1, 2)]
    before = {key: value.clone() for key, value in model.named_parameters()}
    for key, parameter in model.named_parameters():
        for share, other in zip(shares, models, strict=True):
            parameter.add_(share * (other.get_parameter(key) - before[key]))
    return model


@EVERY
def test_the_files_really_have_the_experts_one_by_one(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    base.save_pretrained(tmp_path)
    stored, own = load_file(tmp_path / "model.safetensors"), base.state_dict()
    fused = {key for key in own if "experts" in key and key not in stored and own[key].ndim == 3}
    assert fused
    found = pieces_in_memory({key: tuple(value.shape) for key, value in stored.items()}, base.config.to_dict())
    assert found.keys() == fused
    for key, pieces in found.items():
        assert torch.equal(torch.cat([stored[piece] for piece in pieces]).reshape(own[key].shape), own[key])


@pytest.mark.parametrize("placement", ["device", "disk"])
@EVERY
def test_a_pool_of_whole_models_is_composed(name: str, placement: str, tmp_path: Path) -> None:
    fields = pool(name, tmp_path)
    model = get_peft_model(
        base_of(name), AtlasConfig(**fields, init={"t1": 0.7, "t2": -0.2}, placement=placement, bundle_vectors=True)
    ).eval()
    expected = run(mixed(name, (0.7, -0.2)), batch())
    torch.testing.assert_close(run(model, batch()), expected, rtol=1e-4, atol=1e-5)
    provenance = model.peft_config["default"].provenance
    assert sum("experts" in block for block in provenance["blocks"]) >= 4  # one block a stack
    model.save_pretrained(str(tmp_path / "adapter"))
    for place in (tmp_path / "t1", tmp_path / "t2"):
        place.rename(place.with_name(f"{place.name} moved"))  # the bundle stands for them
    loaded = PeftModel.from_pretrained(base_of(name), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(run(loaded, batch()), expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_mask_over_a_pool_of_whole_models(name: str, tmp_path: Path) -> None:
    fields = pool(name, tmp_path)
    model = get_peft_model(base_of(name), ConcreteConfig(**fields, coefficients={"t2": 1.0}, init=40.0)).eval()
    torch.testing.assert_close(run(model, batch()), run(tuned(name, 2).eval(), batch()), rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path / "adapter"))
    learned = {"learned": str(tmp_path / "adapter")}
    recipe = {"merge_method": "concrete", "base_model": str(tmp_path / "base"), "subspace": learned}
    with pytest.raises(InputError, match=r"which the base's file has in \d+ pieces .*merge_and_unload"):
        merge(recipe, tmp_path / "out")


@EVERY
def test_what_was_learned_is_merged_piece_by_piece(name: str, tmp_path: Path) -> None:
    fields = pool(name, tmp_path)
    model = get_peft_model(base_of(name), AtlasConfig(**fields, init={"t1": 0.7, "t2": -0.2})).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    learned = {"learned": str(tmp_path / "adapter")}
    recipe = {"merge_method": "atlas", "base_model": str(tmp_path / "base"), "subspace": learned}
    found = tf.AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / "out")).eval()
    torch.testing.assert_close(run(found, batch()), run(mixed(name, (0.7, -0.2)), batch()), rtol=1e-4, atol=1e-5)


def test_task_vector_files_of_experts_are_composed_too(tmp_path: Path) -> None:
    """Their names are those of the files, and they have the differences alone."""
    pool("Mixtral", tmp_path)
    TaskVector.open(tmp_path / "t1", tmp_path / "base").save(tmp_path / "t1.safetensors")
    model = get_peft_model(base_of("Mixtral"), AtlasConfig(pool={"v": str(tmp_path / "t1.safetensors")}, init=1.0)).eval()
    torch.testing.assert_close(run(model, batch()), run(tuned("Mixtral", 1), batch()), rtol=1e-4, atol=1e-5)


def test_what_is_made_in_another_way_is_left_alone() -> None:
    """GPT-2 and the like have nothing in pieces, and an architecture that is not known has nothing at all."""
    make = partial(tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2))
    model = make()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert pieces_in_memory(shapes, model.config.to_dict()) == {}
    assert pieces_in_memory(shapes, {"architectures": ["OfSomebody"]}) == {}
