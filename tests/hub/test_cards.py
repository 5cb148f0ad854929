"""Model cards: what they say, that it is true, and that they leave alone what others wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import nn

from peft_subspace import FloraConfig, write_model_card
from peft_subspace.hub import END, START
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, train

pytestmark = [
    # PEFT looks up the base that a model says it has, to see whether its vocabulary was changed; there is no Hub here
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # and tells of tied weights, which our layers keep apart when they merge
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
HUB_ID = "acme/tiny-base"


def saved(
    folder: Path, name: str = "bert", base: str | None = HUB_ID, method: Method = METHODS["FLORA"], **fields: Any
) -> PeftModel:
    model = MODELS[name].model()
    if base is not None:
        model.name_or_path = base
    model = get_peft_model(model, method.make(MODELS[name], **{**MODELS[name].targets, **fields}))
    model.save_pretrained(str(folder))
    return model


def table(folder: Path) -> dict[str, str]:
    """The rows of our part."""
    part = (folder / "README.md").read_text().partition(START)[2].partition(END)[0]
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", part, re.MULTILINE)
    return {name: value for name, value in rows if set(name) != {"-"}}


def test_what_a_card_says(tmp_path: Path) -> None:
    metrics = {"eval_accuracy": 0.93123, "loss": 2e-5}
    saved(tmp_path, metrics=metrics, rank_pattern={"layer.0.attention.self.query": 4})
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert table(tmp_path) == {
        "Base model": f"`{HUB_ID}`",
        "Method": "[FLoRA](https://arxiv.org/abs/2405.14739)",
        "Ranks": "r = 2, 1 layers with their own",
        "Trained parameters": f"{3 * (4 + 2 * 32) + (16 + 2 * 64) + 4 * 17:,}",
        "File size": f"{size / 1024:.0f} kB",
        "eval accuracy": "0.9312",
        "loss": "2e-05",
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == HUB_ID
    assert card.data.library_name == "peft"
    assert card.data.tags == sorted(["peft", "peft-subspace", "flora", "transformers", f"base_model:adapter:{HUB_ID}"])
    assert f"PEFT {peft.__version__}" in card.text
    assert "[More Information Needed]" not in card.text


@each_method
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense")
def test_the_parameter_count_is_right(method: Method, name: str, tmp_path: Path) -> None:
    """BatchNorm's running statistics and frozen bases are in the file and are not trained; heads and experts are."""
    model = saved(tmp_path, name, method=method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table(tmp_path)["Trained parameters"] == f"{trained:,}"


@pytest.mark.parametrize(
    ("name", "fields", "auto_class"),
    [
        ("llama", {"task_type": "CAUSAL_LM"}, "AutoPeftModelForCausalLM"),
        ("bert", {}, "AutoPeftModelForSequenceClassification"),
        ("t5", {"task_type": "SEQ_2_SEQ_LM"}, "AutoPeftModelForSeq2SeqLM"),
        ("vit", {}, "AutoPeftModel"),
    ],
)
def test_the_snippet_loads_by_the_right_class(name: str, fields: dict[str, Any], auto_class: str, tmp_path: Path) -> None:
    saved(tmp_path, name, **fields)
    snippet = snippet_of(tmp_path)
    assert snippet.startswith("import peft_subspace  #")
    assert f"from peft import {auto_class}\n" in snippet
    labels = ", num_labels=4" if name == "bert" else ""  # else AutoModel makes a head of two
    assert f'model = {auto_class}.from_pretrained("this-repository"{labels})' in snippet
    assert hasattr(peft, auto_class)


def snippet_of(folder: Path) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return snippet


def test_the_snippet_without_a_base_on_the_hub_works(tmp_path: Path) -> None:
    model = saved(tmp_path, "mlp", None)
    snippet = snippet_of(tmp_path).replace('"this-repository"', repr(str(tmp_path)))
    snippet = snippet.replace("base_model = ...", "base_model = build()")
    found: dict[str, Any] = {"build": MODELS["mlp"].model}
    exec(snippet, found)
    assert torch.equal(found["model"](**MODELS["mlp"].batch()), model(**MODELS["mlp"].batch()))


@pytest.mark.parametrize("base", ["/home/somebody/secret/base", "./secret/base", "../secret/base", "~/secret/base"])
def test_a_local_path_stays_here(base: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", base=base)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "secret" not in text
    assert "somebody" not in text
    assert table(tmp_path / "adapter")["Base model"] == "`base`"
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None


def test_saving_twice_changes_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.save_pretrained(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert set(first) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


BEFORE = "# My adapter\n\nTrained on {{ prompt }} templates. [More Information Needed]"
AFTER = "## How it was trained\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_text_of_others_survives(tmp_path: Path) -> None:
    model = saved(tmp_path, metrics={"accuracy": 0.5})
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(START, f"{BEFORE}\n\n{START}").replace(END, f"{END}\n\n{AFTER}"))
    train(model, MODELS["bert"].batch(), steps=1)
    model.peft_config["default"].metrics = {"accuracy": 0.75}
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
        card = ModelCard.load(path)
        before, middle, after = re.split(f"{START}|{END}", card.text)
        assert before.strip() == BEFORE
        assert after.strip().startswith(AFTER)
        assert "0.75" in middle
        assert "0.5" not in middle
    assert card.text.count("### Framework versions") == card.text.count(START) == 1


def test_a_card_that_was_there_first_is_completed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Written by hand\n\nSome words.\n")
    saved(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.strip().startswith("# Written by hand\n\nSome words.")
    assert table(tmp_path)["Ranks"] == "r = 2"


def test_metrics_can_be_written_later(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    write_model_card(tmp_path, {"accuracy": np.float32(0.5), "f1": torch.tensor(0.25)})
    assert (table(tmp_path)["accuracy"], table(tmp_path)["f1"]) == ("0.5", "0.25")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["metrics"] == {"accuracy": 0.5, "f1": 0.25}
    (tmp_path / "README.md").unlink()
    write_model_card(tmp_path)  # a card from nothing, with the metrics that the config keeps
    assert table(tmp_path)["accuracy"] == "0.5"
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights


def test_every_adapter_of_a_model_gets_its_card(tmp_path: Path) -> None:
    model = saved(tmp_path / "one", "llama")
    model.add_adapter("other", FloraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "two"))
    assert table(tmp_path / "two")["Ranks"] == "r = 2"
    assert table(tmp_path / "two" / "other")["Ranks"] == "r = 4"


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        write_model_card(tmp_path)


def test_a_config_alone_gets_no_card(tmp_path: Path) -> None:
    FloraConfig(r=2).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_the_card_of_another_method_is_left_to_it(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"].model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    model.create_or_update_model_card(output_dir=str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert START not in text
    assert "peft-subspace" not in text


def test_ranks_of_every_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    get_peft_model(model, FloraConfig(r=[4, 2, 2, 1], target_modules=["0"])).save_pretrained(str(tmp_path))
    assert table(tmp_path)["Ranks"] == "r = [4, 2, 2, 1]"
