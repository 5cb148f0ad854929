"""transformers' own adapter methods, `pipeline`, and PEFT's automatic classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from peft_subspace import SubspaceLayer, write_model_card
from peft_subspace.base.batch_norm import BatchNormLayer
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, VOCABULARY, output, train

# PEFT's, at every second `model.add_adapter`
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
NAMES = ["llama", "gpt2", "bert", "resnet", "t5", "moe"]


def config_for(name: str, method: Method = METHODS["FLORA"], **fields: Any) -> Any:
    # without a task: for SEQ_CLS, PeftModel expects a head in the file that `model.add_adapter` did not make trainable
    return method.make(MODELS[name], **{"init_weights": False, **MODELS[name].targets, "task_type": None, **fields})


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), MODELS[name].batch())


@each_method
@pytest.mark.parametrize("name", NAMES)
def test_add_switch_save_and_load(method: Method, name: str, tmp_path: Path) -> None:
    model = MODELS[name].model()
    base = logits(model, name)
    model.add_adapter(config_for(name, method), "one")
    train(model, MODELS[name].batch(), steps=1)
    one = logits(model, name)
    model.add_adapter(config_for(name, method, second=True), "two")
    two = logits(model, name)
    assert model.active_adapters() == ["two"]
    results = [base, one, two]
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[i + 1 :])

    model.set_adapter("one")
    assert torch.equal(logits(model, name), one)
    model.disable_adapters()
    assert torch.equal(logits(model, name), base)
    model.enable_adapters()
    if not any(isinstance(module, peft.utils.ModulesToSaveWrapper) for module in model.modules()):
        # transformers 5.23 forgets to enable `modules_to_save` again, whatever the method
        assert torch.equal(logits(model, name), one)
    model.set_adapter("one")

    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    write_model_card(tmp_path)  # transformers writes the weights last, so it cannot come by itself
    title, text = model.peft_config["one"].summary
    assert f"| {title} | {text} |" in (tmp_path / "README.md").read_text()

    loaded = MODELS[name].model()
    info = loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(loaded, name), one)
    layers = [module for module in loaded.modules() if isinstance(module, SubspaceLayer)]
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    in_peft = PeftModel.from_pretrained(MODELS[name].model(), tmp_path)
    assert torch.equal(logits(in_peft, name), one)


@each_method
@pytest.mark.parametrize("name", ["llama", "bert", "moe"])
def test_delete(method: Method, name: str) -> None:
    model = MODELS[name].model()
    base = logits(model, name)
    model.add_adapter(config_for(name, method), "one")
    one = logits(model, name)
    model.add_adapter(config_for(name, method), "two")
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model, name), one)
    assert set(model.peft_config) == {"one"}
    model.delete_adapter("one")
    assert torch.equal(logits(model, name), base)


@each_method
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_an_adapter_of_peft_goes_on_training_in_transformers(method: Method, name: str, tmp_path: Path) -> None:
    in_peft = get_peft_model(MODELS[name].model(), config_for(name, method))
    in_peft.save_pretrained(str(tmp_path))
    model = MODELS[name].model()
    model.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits(model, name), logits(in_peft, name))
    assert train(model, MODELS[name].batch()) == train(in_peft, MODELS[name].batch())
    model.save_pretrained(tmp_path / "later")
    in_peft.save_pretrained(str(tmp_path / "in_peft"))
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("later", "in_peft"))
    assert {key: tensor.tolist() for key, tensor in first.items()} == {key: tensor.tolist() for key, tensor in second.items()}


def test_batch_norm_statistics_are_switched_too() -> None:
    model = MODELS["resnet"].model()
    model.add_adapter(config_for("resnet", modules_to_save=None), "one")
    train(model, MODELS["resnet"].batch())
    one = logits(model, "resnet")
    model.add_adapter(config_for("resnet", modules_to_save=None), "two")
    norms = [module for module in model.modules() if isinstance(module, BatchNormLayer)]
    assert norms
    assert all(norm.active_adapters == ["two"] for norm in norms)
    assert all(torch.equal(norm.flora_batch_norm["two"].running_mean, norm.base_layer.running_mean) for norm in norms)
    model.set_adapter("one")
    assert torch.equal(logits(model, "resnet"), one)


# By a folder's name ------------------------------------------------------------------------------------------------------


def tokenizer() -> tf.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(VOCABULARY - 2))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="w40")


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path, Path]:
    """A base and an adapter on disk, each with a tokenizer: (name, base, adapter)."""
    name, task_type = request.param
    base = MODELS[name].model()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, config_for(name, task_type=task_type)).save_pretrained(str(tmp_path / "adapter"))
    for folder in ("base", "adapter") if task_type is not None else ():
        tokenizer().save_pretrained(tmp_path / folder)
    return name, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize(
    ("folders", "automatic", "auto_peft"),
    [
        (("llama", "CAUSAL_LM"), tf.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
        (("bert", "SEQ_CLS"), tf.AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
        (("t5", "SEQ_2_SEQ_LM"), tf.AutoModelForSeq2SeqLM, peft.AutoPeftModelForSeq2SeqLM),
        (("resnet", None), tf.AutoModelForImageClassification, peft.AutoPeftModel),
    ],
    indirect=["folders"],
)
def test_automatic_classes(folders: tuple[str, Path, Path], automatic: Any, auto_peft: Any) -> None:
    name, base, adapter = folders
    expected = logits(PeftModel.from_pretrained(automatic.from_pretrained(base), adapter), name)
    assert not torch.equal(expected, logits(automatic.from_pretrained(base), name))
    assert torch.equal(logits(automatic.from_pretrained(adapter), name), expected)
    assert torch.equal(logits(auto_peft.from_pretrained(adapter), name), expected)


@pytest.mark.parametrize("folders", [("bert", "SEQ_CLS")], indirect=True)
def test_pipeline_for_classification(folders: tuple[str, Path, Path]) -> None:
    _, base, adapter = folders
    text = "w3 w5 w8"
    model = PeftModel.from_pretrained(tf.AutoModelForSequenceClassification.from_pretrained(base), adapter)
    expected = model(**tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    for given in (str(adapter), model):
        (answer,) = tf.pipeline("text-classification", model=given, tokenizer=str(adapter), top_k=None)([text])
        found = {row["label"]: row["score"] for row in answer}
        assert found == pytest.approx({f"LABEL_{i}": score for i, score in enumerate(expected)}, rel=1e-5)
    (plain,) = tf.pipeline("text-classification", model=str(base), top_k=None)([text])
    assert {row["label"]: row["score"] for row in plain} != pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("folders", [("llama", "CAUSAL_LM")], indirect=True)
def test_pipeline_for_generation(folders: tuple[str, Path, Path]) -> None:
    _, base, adapter = folders
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = tokenizer()("w3 w5 w8", return_tensors="pt", return_token_type_ids=False)
    expected = tokenizer().decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 3:])
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    assert tf.pipeline("text-generation", model=str(adapter), **options)("w3 w5 w8")[0]["generated_text"] == expected
    assert tf.pipeline("text-generation", model=str(base), **options)("w3 w5 w8")[0]["generated_text"] != expected
