"""Tied weights of many families: whatever reads an adapter gives the model that the adapter was trained in.

The oracle is that model itself, and transformers' own loading of what was written. (PEFT's `merge_and_unload` adds an update
of a tied embedding to the head as well, and is no oracle for it.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import peft_subspace
from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, SvfitConfig
from peft_subspace.merging import merge
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.task_vector import TaskVector
from peft_subspace.task_vectors.ties import tied_names
from tests.families import TIED, distance, embedding_and_head, load, logits, save, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True"),
    pytest.mark.filterwarnings("ignore:.*[Tt]ied"),
    pytest.mark.filterwarnings("ignore:.*no longer tied"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned"),  # random models
]
CLOSE = 2e-6  # float32: two orders of the same sums


@pytest.fixture(scope="module", params=TIED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a family, and a folder with its base and a fine-tuned model."""
    folder = tmp_path_factory.mktemp(request.param)
    trained(save(request.param, folder / "base"), 0.05).save_pretrained(folder / "tuned")
    return request.param, folder


def configs(name: str, folder: Path) -> dict[str, Any]:
    """Everything that can part an embedding from its head, or change both."""
    embedding, head = embedding_and_head(load(name, folder / "base"))
    inner, one, two = TIED[name][1], embedding.rpartition(".")[2], head.rpartition(".")[2]
    return {
        "LoRA on the embedding": LoraConfig(r=4, target_modules=[one]),
        "LoRA on the head": LoraConfig(r=4, target_modules=[two]),
        "LoRA on both": LoraConfig(r=4, target_modules=[one, two]),
        "LoRA on both, tied": LoraConfig(r=4, target_modules=[one], ensure_weight_tying=True),
        "the embedding trained whole": LoraConfig(r=4, target_modules=[inner], modules_to_save=[embedding]),
        "the head trained whole": LoraConfig(r=4, target_modules=[inner], modules_to_save=[head]),
        "both trained whole, tied": LoraConfig(
            r=4, target_modules=[inner], modules_to_save=[embedding], ensure_weight_tying=True
        ),
        "FLoRA on the embedding": FloraConfig(r=4, target_modules=[one]),
        "FLoRA on the head": FloraConfig(r=4, target_modules=[two]),
        "SVFit on the embedding": SvfitConfig(r=4, target_modules=[one]),
        "FLoRA, the embedding trained whole": FloraConfig(r=4, target_modules=[inner], modules_to_save=[embedding]),
    }


LABELS = (
    "LoRA on the embedding", "LoRA on the head", "LoRA on both", "LoRA on both, tied", "the embedding trained whole",
    "the head trained whole", "both trained whole, tied", "FLoRA on the embedding", "FLoRA on the head",
    "SVFit on the embedding", "FLoRA, the embedding trained whole",
)  # fmt: skip


def adapted(name: str, folder: Path, label: str, out: Path) -> tuple[Any, Tensor]:
    """A trained adapter in a folder, its model, and what that computes."""
    model = trained(get_peft_model(load(name, folder / "base"), configs(name, folder)[label]))
    model.save_pretrained(out)
    return model, logits(model)


def recipe(folder: Path, model: Path, **options: Any) -> dict[str, Any]:
    """The base plus one model."""
    entry = {"model": str(model), "parameters": {"weight": 1.0}}
    table = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": [entry]}
    return {**table, "subspace": {"base_check": "off", **options}}


def merged(name: str, folder: Path, model: Path, out: Path) -> Tensor:
    """What transformers computes with the base and one model, merged by the script."""
    merge(recipe(folder, model), out)
    return logits(load(name, out))


def test_the_class_says_what_is_tied(family: tuple[str, Path]) -> None:
    """Against the tensors in memory that are one."""
    name, folder = family
    model = load(name, folder / "base")
    stored = load_file(folder / "base" / "model.safetensors")
    groups: dict[int, set[str]] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), set()).add(key)
    expected = {key for group in groups.values() for key in group if key not in stored}
    found = tied_names(model.config.to_dict(), stored)
    assert found.keys() == expected
    assert all(model.get_parameter(key) is model.get_parameter(there) for key, there in found.items())


@pytest.mark.parametrize("label", LABELS)
def test_the_script_merges_what_was_trained(label: str, family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    _, expected = adapted(name, folder, label, tmp_path / "adapter")
    assert distance(merged(name, folder, tmp_path / "adapter", tmp_path / "out"), expected) < CLOSE


@pytest.mark.parametrize("label", ["LoRA on the embedding", "the embedding trained whole", "FLoRA on the head"])
def test_task_vectors(label: str, family: tuple[str, Path], tmp_path: Path) -> None:
    """Saved, written by the script, and in a sum: the file says what changes alone."""
    name, folder = family
    _, expected = adapted(name, folder, label, tmp_path / "adapter")
    vector = TaskVector.open(tmp_path / "adapter", folder / "base")
    tuned = TaskVector.open(folder / "tuned", folder / "base")
    vector.save(tmp_path / "saved.safetensors")
    (vector + tuned - tuned).save(tmp_path / "sum.safetensors")
    merge(recipe(folder, tmp_path / "adapter", output="task_vector"), tmp_path / "made")
    for number, path in enumerate(("saved.safetensors", "sum.safetensors", "made/task_vector.safetensors")):
        found = merged(name, folder, tmp_path / path, tmp_path / f"out{number}")
        assert distance(found, expected) < CLOSE, path


def test_a_whole_model_stays_tied(family: tuple[str, Path], tmp_path: Path) -> None:
    """Its difference is that of all names; the result has the base's files and ties."""
    name, folder = family
    expected = logits(load(name, folder / "tuned"))
    TaskVector.open(folder / "tuned", folder / "base").save(tmp_path / "vector.safetensors")
    for model in (folder / "tuned", tmp_path / "vector.safetensors"):
        out = tmp_path / f"out of {model.name}"
        assert distance(merged(name, folder, model, out), expected) < CLOSE
        assert load_file(out / "model.safetensors").keys() == load_file(folder / "base" / "model.safetensors").keys()
        assert load(name, out).config.tie_word_embeddings == load(name, folder / "base").config.tie_word_embeddings


def test_extract_carries_the_head(family: tuple[str, Path], tmp_path: Path) -> None:
    """In plain PEFT: base + adapter + what the command says that it leaves out is the fine-tuned model."""
    name, folder = family
    found = extract_lora(str(folder / "tuned"), str(folder / "base"), tmp_path / "lora", rank=96)
    model = PeftModel.from_pretrained(load(name, folder / "base"), str(tmp_path / "lora"))
    tuned = load(name, folder / "tuned")
    inner = {key.replace(".base_layer", ""): tensor for key, tensor in model.get_base_model().named_parameters()}
    with torch.no_grad():
        for key in found.left_out:
            inner[key].copy_(tuned.get_parameter(key))
    assert distance(logits(model), logits(tuned)) < 5e-5  # an SVD of every weight, and Mamba's scan
    written = merged(name, folder, tmp_path / "lora", tmp_path / "out")
    plain = PeftModel.from_pretrained(load(name, folder / "base"), str(tmp_path / "lora"))
    assert distance(written, logits(plain)) < 5e-5


@pytest.mark.parametrize("label", ["LoRA on the embedding", "LoRA on the head", "FLoRA on the embedding"])
@pytest.mark.parametrize("bundle", [False, True], ids=["pool", "bundle"])
def test_pools(bundle: bool, label: str, family: tuple[str, Path], tmp_path: Path) -> None:
    """At lambda = 1 aTLAS is the adapter's model: alone, loaded, merged, replayed by the script."""
    name, folder = family
    _, expected = adapted(name, folder, label, tmp_path / "adapter")
    config = AtlasConfig(pool={"one": str(tmp_path / "adapter")}, base=str(folder / "base"), init=1.0, bundle_vectors=bundle)
    model = get_peft_model(load(name, folder / "base"), config)
    model.save_pretrained(tmp_path / "atlas")
    assert distance(logits(model), expected) < CLOSE
    assert distance(logits(PeftModel.from_pretrained(load(name, folder / "base"), str(tmp_path / "atlas"))), expected) < CLOSE
    merge({"merge_method": "atlas", "subspace": {"learned": str(tmp_path / "atlas")}}, tmp_path / "out")
    assert distance(logits(load(name, tmp_path / "out")), expected) < CLOSE
    assert distance(logits(model.merge_and_unload()), expected) < CLOSE


@pytest.mark.parametrize("kind", [AtlasConfig, ConcreteConfig])
def test_pools_of_both_kinds(kind: Any, family: tuple[str, Path], tmp_path: Path) -> None:
    """A whole model, which changes both names, beside an adapter, which changes one."""
    name, folder = family
    if name == "mamba":
        pytest.skip("conv1d of a Mamba block is read by a fused kernel, so whole models are refused by name")
    adapted(name, folder, "LoRA on the embedding", tmp_path / "adapter")
    pool = {"whole": str(folder / "tuned"), "lora": str(tmp_path / "adapter")}
    more: dict[str, Any] = {"init": {"whole": 1.0, "lora": 0.0}} if kind is AtlasConfig else {}
    model = get_peft_model(load(name, folder / "base"), kind(pool=pool, base=str(folder / "base"), **more))
    expected = logits(model)
    if kind is AtlasConfig:
        assert distance(expected, logits(load(name, folder / "tuned"))) < CLOSE
    model.save_pretrained(tmp_path / "saved")
    method = kind.__name__.removesuffix("Config").lower()
    merge({"merge_method": method, "subspace": {"learned": str(tmp_path / "saved")}}, tmp_path / "out")
    assert distance(logits(load(name, tmp_path / "out")), expected) < CLOSE


def test_export(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    if name == "bart":
        pytest.skip("BartScaledWordEmbedding has a forward of its own, which the export refuses by name")
    model, expected = adapted(name, folder, "FLoRA on the embedding", tmp_path / "adapter")
    peft_subspace.save_as_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(load(name, folder / "base"), str(tmp_path / "lora"))
    assert distance(logits(plain), expected) < CLOSE


@pytest.mark.parametrize(("name", "untied"), [("t5", False), ("umt5", False), ("llama", True), ("bert", True)])
def test_the_config_says_untied_unless_more_depends_on_it(name: str, untied: bool, tmp_path: Path) -> None:
    """T5 scales its outputs by `tie_word_embeddings`; of others, engines that tie by the config must not tie the result."""
    save(name, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config.pop("scale_decoder_outputs", None)  # those on the Hub are older
    path.write_text(json.dumps(config))
    _, expected = adapted(name, tmp_path, "LoRA on the head", tmp_path / "adapter")
    assert distance(merged(name, tmp_path, tmp_path / "adapter", tmp_path / "out"), expected) < CLOSE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not untied


def test_extract_leaves_out_tables_that_are_read_and_never_called(tmp_path: Path) -> None:
    """The positions of Whisper's encoder: plain PEFT would crash on a LoRA there."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 8,
        "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    trained(model.requires_grad_(True), 0.05).save_pretrained(tmp_path / "tuned")
    found = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "lora", rank=4)
    assert "model.encoder.embed_positions.weight" in found.left_out
    base = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    plain.get_base_model()(input_features=torch.randn(1, 8, 16), decoder_input_ids=torch.tensor([[1, 5]]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "roberta"])
def test_aligned_merges(name: str, tmp_path: Path) -> None:
    """Neurons in another order compute the same, and the result stays tied."""
    expected = logits(trained(save(name, tmp_path / "base"), 0.02))
    trained(load(name, tmp_path / "base"), 0.02).save_pretrained(tmp_path / "tuned")
    merge(recipe(tmp_path, tmp_path / "tuned", align="weight_matching"), tmp_path / "out")
    assert distance(logits(load(name, tmp_path / "out")), expected) < CLOSE
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
