"""Whole architectures through the engine: no table of them is needed."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

from peft_subspace.merging import merge
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.merging.tiny import near, read, recipe
from tests.pico import MODELS, run

LOADERS = {
    "llama, tied": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "moe": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
    "resnet": transformers.AutoModelForImageClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("model", LOADERS)
def test_a_merge_with_itself_is_itself(model: str, tmp_path: Path) -> None:
    """The base and two equal models with weights that add up to one: the merged model is that model."""
    pico = MODELS[model]
    tuned = pico.model()
    tuned.save_pretrained(tmp_path / "base")
    state = {name: t.clone() if not t.is_floating_point() else t for name, t in tuned.state_dict().items()}
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    tuned.load_state_dict({**state, **near(floats, 1, 0.02)})
    tuned.tie_weights()
    for name in "ab":
        tuned.save_pretrained(tmp_path / name)
    table = recipe(tmp_path, "task_arithmetic", "ab")
    for entry, weight in zip(table["models"], (0.25, 0.75), strict=True):
        entry["parameters"] = {"weight": weight}
    out = merge(table, tmp_path / "out")
    loaded = LOADERS[model].from_pretrained(out)
    torch.testing.assert_close(run(loaded, pico.batch()), run(tuned, pico.batch()), rtol=1e-4, atol=1e-5)


def test_a_base_without_a_head(tmp_path: Path) -> None:
    """Classifiers that were fine-tuned from a bare encoder: the encoder is merged, the heads belong to the tasks."""
    pico = MODELS["bert"]
    classifier = pico.model()
    classifier.base_model.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        tuned = pico.model(seed=0)
        tuned.load_state_dict(near(tuned.state_dict(), seed + 1, 0.02))
        tuned.save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r"has 2 that the base lacks \(classifier.bias, classifier.weight\)"):
        merge(recipe(tmp_path, models="ab"), tmp_path / "out")
    merged = read(merge(recipe(tmp_path, models="ab", subspace={"on_missing": "base"}), tmp_path / "out"))
    base, a, b = (read(tmp_path / name) for name in ("base", "a", "b"))
    assert merged.keys() == base.keys()
    name = "encoder.layer.1.attention.self.query.weight"
    expected = base[name] + 0.5 * (a[f"bert.{name}"] - base[name]) + 0.6 * (b[f"bert.{name}"] - base[name])
    torch.testing.assert_close(merged[name], expected)


def test_an_adapter_of_a_classifier_on_a_base_without_a_head(tmp_path: Path) -> None:
    pico = MODELS["bert"]
    pico.model().base_model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(pico.model(), peft.LoraConfig(r=2, init_lora_weights=False, **pico.targets))
    wrapped.save_pretrained(tmp_path / "a")
    wrapped.save_pretrained(tmp_path / "b")
    merged = read(merge(recipe(tmp_path, models="a"), tmp_path / "out"))  # its head is new to the base: it comes along
    assert {name for name in merged if "classifier" in name} == {"classifier.weight", "classifier.bias"}
    name = "encoder.layer.1.attention.self.query.weight"
    delta = TaskVector.open(tmp_path / "a", tmp_path / "base")[name]
    torch.testing.assert_close(merged[name], read(tmp_path / "base")[name] + 0.5 * delta)
    with pytest.raises(InputError, match=r"several adapters bring whole tensors that the base lacks \(classifier"):
        merge(recipe(tmp_path, models="ab"), tmp_path / "out2")
    both = merge(recipe(tmp_path, models="ab", subspace={"on_missing": "base"}), tmp_path / "out2")
    assert not {name for name in read(both) if "classifier" in name}
