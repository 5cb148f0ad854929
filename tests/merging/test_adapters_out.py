"""Merged adapters load with plain PEFT and compute what the sum of the updates does: the invariants that PEFT breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peft_subspace
from peft_subspace.merging import merge, verify
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.pico import MODELS, run

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 9}},
}
DENSE = {"dora": {"r": 2, "lora_alpha": 5, "use_dora": True}}  # no low rank
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"], "vit": ["q_proj", "projection"]}


def adapters(folder: Path, model: str = "llama", kinds: tuple[str, ...] = tuple(KINDS)) -> None:
    """A base, and LoRA adapters of all kinds on it."""
    MODELS[model].model().save_pretrained(folder / "base")
    for seed, kind in enumerate(kinds):
        options = {"fan_in_fan_out": model == "gpt2", **{**KINDS, **DENSE}[kind], "target_modules": TARGETS[model]}
        wrapped = peft.get_peft_model(MODELS[model].model(), peft.LoraConfig(**options))
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) * 0.3
        wrapped.save_pretrained(folder / kind, save_embedding_layers=False)


def table(folder: Path, weights: dict[str, float], method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    """A recipe for an adapter."""
    entries = [{"model": str(folder / kind), "parameters": {"weight": weight}} for kind, weight in weights.items()]
    subspace = {"output": "adapter", **more.pop("subspace", {})}
    return {"merge_method": method, "base_model": str(folder / "base"), "models": entries, "subspace": subspace, **more}


def peft_output(folder: Path, adapter: Path, model: str = "llama") -> Tensor:
    """Logits of the base with an adapter, loaded by PEFT, which warns of keys that do not fit."""
    wrapped = peft.PeftModel.from_pretrained(MODELS[model].model(), adapter)
    return run(wrapped, MODELS[model].batch())


def summed_output(folder: Path, weights: dict[str, float], model: str = "llama") -> Tensor:
    """Logits of the base plus the weighted sum of the updates, each merged by PEFT alone, in float64."""
    base = MODELS[model].model()
    total = {key: value.double() for key, value in base.state_dict().items()}
    for kind, weight in weights.items():
        wrapped = peft.PeftModel.from_pretrained(MODELS[model].model(), folder / kind)
        merged: nn.Module = wrapped.merge_and_unload()
        for key, value in merged.state_dict().items():
            total[key] += weight * (value.double() - base.state_dict()[key].double())
    base.load_state_dict({key: value.float() for key, value in total.items()})
    return run(base, MODELS[model].batch())


WEIGHTS: dict[str, dict[str, float]] = {
    **{f"{kind} alone": {kind: 1.0} for kind in KINDS},
    "one of three": {"plain": 1.0, "rslora": 0.0, "patterns": 0.0},
    "negative": {"plain": 1.0, "rslora": -0.7, "patterns": 0.4},
    "another order": {"patterns": 0.4, "plain": 1.0, "rslora": -0.7},
    "large": {"plain": 3.0, "rslora": 2.0},
}


@pytest.mark.parametrize("way", ["cat", "exact"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_the_sum_is_exact(case: str, way: str, tmp_path: Path) -> None:
    adapters(tmp_path, kinds=tuple(WEIGHTS[case]))
    out = merge(table(tmp_path, WEIGHTS[case], subspace={"adapter": {"method": way}}), tmp_path / "out")
    torch.testing.assert_close(peft_output(tmp_path, out), summed_output(tmp_path, WEIGHTS[case]), rtol=1e-4, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (config["r"], False, {})
    verify(out)


@pytest.mark.parametrize("model", ["gpt2", "vit"])
def test_other_layers(model: str, tmp_path: Path) -> None:
    weights = {"plain": 0.6, "rslora": 0.5}
    adapters(tmp_path, model, tuple(weights))
    out = merge(table(tmp_path, weights), tmp_path / "out")
    torch.testing.assert_close(peft_output(tmp_path, out, model), summed_output(tmp_path, weights, model), rtol=1e-4, atol=1e-4)


def test_linear_divides_by_the_sum_of_the_weights(tmp_path: Path) -> None:
    adapters(tmp_path, kinds=("plain", "rslora"))
    out = merge(table(tmp_path, {"plain": 3.0, "rslora": 1.0}, "linear"), tmp_path / "out")
    expected = summed_output(tmp_path, {"plain": 0.75, "rslora": 0.25})
    torch.testing.assert_close(peft_output(tmp_path, out), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="sum to 0"):
        merge(table(tmp_path, {"plain": 1.0, "rslora": -1.0}, "linear"), tmp_path / "zero")


def test_stacked_factors_go_with_no_rank(tmp_path: Path) -> None:
    adapters(tmp_path, kinds=("plain",))
    for given in ({"rank": 3}, {"energy": 0.9}):
        with pytest.raises(RecipeError, match=r"`cat` keeps the ranks of all adapters .* and goes with no rank or energy"):
            merge(table(tmp_path, {"plain": 1.0}, subspace={"adapter": {"method": "cat", **given}}), tmp_path / "out")


def test_a_rank_truncates_by_svd_and_the_error_is_reported(tmp_path: Path) -> None:
    weights = {"plain": 0.6, "rslora": 0.5}
    adapters(tmp_path, kinds=tuple(weights))
    out = merge(table(tmp_path, weights, subspace={"adapter": {"rank": 3}}), tmp_path / "out")
    merged = TaskVector.open(out, tmp_path / "base")
    total = 0.6 * TaskVector.open(tmp_path / "plain", tmp_path / "base") + 0.5 * TaskVector.open(
        tmp_path / "rslora", tmp_path / "base"
    )
    report = json.loads((out / "merge_report.json").read_text())
    for name in total:
        u, s, vh = torch.linalg.svd(total[name].double(), full_matrices=False)
        torch.testing.assert_close(merged[name].double(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5)
        error = (s[3:].square().sum() / s.square().sum()).sqrt().item()
        assert report[name]["rank"] == 3
        assert report[name]["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
    by_energy = merge(table(tmp_path, weights, subspace={"adapter": {"energy": 0.9}}), tmp_path / "energy")
    for entry in json.loads((by_energy / "merge_report.json").read_text()).values():
        assert entry["relative_error"] <= 0.1**0.5 + 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_linear", "knots", "magnitude_prune"])
def test_other_methods_merge_each_update_as_a_whole(method: str, tmp_path: Path) -> None:
    weights = {"plain": 0.6, "rslora": 0.5}
    adapters(tmp_path, kinds=tuple(weights))
    options: dict[str, Any] = {"parameters": {"density": 0.5}}
    out = merge(table(tmp_path, weights, method, subspace={"adapter": {"rank": 16}}, **options), tmp_path / "out")
    whole = table(tmp_path, weights, method, subspace={"output": "model"}, **options)
    merge(whole, tmp_path / "model")
    expected = TaskVector.open(tmp_path / "model", tmp_path / "base")
    found = TaskVector.open(out, tmp_path / "base")
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "vit"])  # vit: a convolution too
@pytest.mark.parametrize("inner", ["ties", "task_arithmetic"])
def test_knots_is_exact_in_the_space_of_the_factors(inner: str, model: str, tmp_path: Path) -> None:
    """Of the summed ranks at most, and equal to the merge of the dense updates."""
    weights = {"plain": 0.6, "rslora": 0.5}
    adapters(tmp_path, model, tuple(weights))
    options: dict[str, Any] = {"parameters": {"density": 0.5, "inner": inner}}
    out = merge(table(tmp_path, weights, "knots", **options), tmp_path / "out")
    merge(table(tmp_path, weights, "knots", subspace={"output": "model"}, **options), tmp_path / "model")
    expected = TaskVector.open(tmp_path / "model", tmp_path / "base")
    found = TaskVector.open(out, tmp_path / "base")
    matrices = [name for name in found if len(found.shapes[name]) == 2]
    for name in matrices:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    report = json.loads((out / "merge_report.json").read_text())
    assert all(report[name]["rank"] <= 6 and report[name]["relative_error"] == 0 for name in matrices)
    less = merge(table(tmp_path, weights, "knots", subspace={"adapter": {"rank": 2}}, **options), tmp_path / "less")
    assert json.loads((less / "adapter_config.json").read_text())["r"] == 2


def test_our_adapters_and_lora_merge_into_lora(tmp_path: Path) -> None:
    adapters(tmp_path, kinds=("plain",))
    config = peft_subspace.FloraConfig(r=3, init_weights=False, target_modules=["q_proj", "o_proj"])
    wrapped = peft.get_peft_model(MODELS["llama"].model(), config)
    wrapped.save_pretrained(tmp_path / "flora")
    weights = {"plain": 0.5, "flora": -0.5}
    out = merge(table(tmp_path, weights), tmp_path / "out")
    torch.testing.assert_close(peft_output(tmp_path, out), summed_output(tmp_path, weights), rtol=1e-4, atol=1e-5)


def test_heads_of_adapters(tmp_path: Path) -> None:
    bert = MODELS["bert"]
    bert.model().save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        wrapped = peft.get_peft_model(bert.model(), peft.LoraConfig(r=2, **bert.targets))
        torch.manual_seed(seed)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * 0.3
        wrapped.save_pretrained(tmp_path / name)
    weights = {"a": 0.5, "b": 0.5}
    out = merge(table(tmp_path, weights), tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(
        peft_output(tmp_path, out, "bert"), summed_output(tmp_path, weights, "bert"), rtol=1e-4, atol=1e-5
    )


def test_the_same_bytes_again(tmp_path: Path) -> None:
    adapters(tmp_path)
    recipe = table(tmp_path, WEIGHTS["negative"], subspace={"adapter": {"rank": 2}})
    first, second = merge(recipe, tmp_path / "1"), merge(recipe, tmp_path / "2")
    assert all((second / file.name).read_bytes() == file.read_bytes() for file in first.iterdir())


def test_what_cannot_be_an_adapter_is_said(tmp_path: Path) -> None:
    adapters(tmp_path, kinds=("plain",))
    MODELS["llama"].model(seed=3).save_pretrained(tmp_path / "full")
    with pytest.raises(RecipeError, match="full is a whole model"):
        merge(table(tmp_path, {"plain": 1, "full": 1}), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"exact is for weighted sums .* Use `dense` with ties"):
        merge(table(tmp_path, {"plain": 1}, "ties", subspace={"adapter": {"method": "exact"}}), tmp_path / "out")
    with pytest.raises(RecipeError, match="there is no `base_model`"):
        merge({"merge_method": "linear", "models": [{"model": str(tmp_path / x)} for x in ("full", "plain")]}, tmp_path / "out")
    with pytest.raises(RecipeError, match="is an adapter or a task vector, which changes a model"):
        merge({"merge_method": "linear", "models": [{"model": str(tmp_path / "plain")}]}, tmp_path / "out")
    bias = peft.get_peft_model(MODELS["bert"].model(), peft.LoraConfig(r=2, target_modules=["query"], bias="all"))
    bias.save_pretrained(tmp_path / "bias")
    MODELS["bert"].model().save_pretrained(tmp_path / "bert")
    recipe = {**table(tmp_path, {"bias": 1}), "base_model": str(tmp_path / "bert")}
    with pytest.raises(InputError, match=r"bias'.* LoRA has no layer for it"):
        merge(recipe, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(OutputError, match="already exists and holds notes"):
        merge(table(tmp_path, {"plain": 1}), tmp_path / "out")


def test_a_dense_update_becomes_an_adapter_by_its_singular_vectors(tmp_path: Path) -> None:
    """DoRA, and a task-vector file that is not of low rank."""
    weights = {"plain": 0.6, "dora": 0.5}
    adapters(tmp_path, kinds=tuple(weights))
    out = merge(table(tmp_path, weights, subspace={"adapter": {"rank": 32}}), tmp_path / "out")  # of 32 rows: all of it
    torch.testing.assert_close(peft_output(tmp_path, out), summed_output(tmp_path, weights), rtol=1e-4, atol=1e-5)
    TaskVector.open(tmp_path / "dora", tmp_path / "base").save(tmp_path / "vector.safetensors")
    recipe = table(tmp_path, {"plain": 0.6, "vector.safetensors": 0.5}, subspace={"adapter": {"rank": 32}})
    again = merge(recipe, tmp_path / "again")
    torch.testing.assert_close(peft_output(tmp_path, again), summed_output(tmp_path, weights), rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match=r"exact is for updates of low rank, and that of 'model\..*' is dense"):
        merge(table(tmp_path, weights, subspace={"adapter": {"method": "exact"}}), tmp_path / "other")
    with pytest.raises(RecipeError, match=r"is dense, so that it has no rank of its own"):
        merge(table(tmp_path, {"dora": 1.0}), tmp_path / "other")


# Adapters into whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "vit"])
def test_adapters_merge_into_a_model(model: str, tmp_path: Path) -> None:
    import transformers

    weights = {"plain": 0.6, "rslora": 0.5, "dora": 0.7}
    adapters(tmp_path, model, tuple(weights))
    recipe = table(tmp_path, weights, subspace={"output": "model"})
    recipe["models"][0]["model"] = f"{tmp_path / 'base'}+{tmp_path / 'plain'}"  # as mergekit writes it
    out = merge(recipe, tmp_path / "out")
    loader = transformers.AutoModelForCausalLM if model == "llama" else transformers.AutoModelForImageClassification
    loaded = loader.from_pretrained(out)
    expected = summed_output(tmp_path, weights, model)
    torch.testing.assert_close(run(loaded, MODELS[model].batch()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone(tmp_path: Path) -> None:
    import transformers

    pico = MODELS["llama, tied"]
    pico.model().save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(pico.model(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    out = merge(table(tmp_path, {"a": 1.0}, subspace={"output": "model"}), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(run(loaded, pico.batch()), run(wrapped, pico.batch()), rtol=1e-4, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_recipe_writes_a_task_vector(tmp_path: Path) -> None:
    adapters(tmp_path, kinds=("plain", "rslora"))
    recipe = table(tmp_path, {"plain": 0.6, "rslora": 0.5}, "ties", subspace={"output": "task_vector"})
    out = merge(recipe, tmp_path / "out")
    model = merge({**recipe, "subspace": {"output": "model"}}, tmp_path / "model")
    expected = TaskVector.open(model, tmp_path / "base")
    found = TaskVector.open(out / "task_vector.safetensors", tmp_path / "base")
    assert set(found) == {name for name in expected if expected[name].any()}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    again = {**recipe, "merge_method": "task_arithmetic", "subspace": {"output": "model"}}
    again["models"] = [{"model": str(out / "task_vector.safetensors")}]
    both = TaskVector.open(merge(again, tmp_path / "again"), tmp_path / "base")
    for name in found:
        torch.testing.assert_close(both[name], expected[name], rtol=1e-5, atol=1e-6)
