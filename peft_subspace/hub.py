"""Model cards: what an adapter is, what it measures, and how to load it."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from huggingface_hub import ModelCard
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.peft_types import PeftType

from .base import SubspaceConfig
from .base.batch_norm import STATISTICS
from .base.config import AFTER_SAVE
from .base.files import check_adapter_file
from .registration import check_before_saving, complete_cards
from .whole_files import write_whole

START, END = "<!-- peft_subspace: begin -->", "<!-- peft_subspace: end -->"  # what is between is written anew on saving


def write_model_card(directory: str | os.PathLike[str], metrics: dict[str, float] | None = None) -> None:
    """Write or complete the README.md of a saved adapter.

    The card has the base model, method, paper, ranks, trained parameters, file size, metrics, tags and the snippet that loads
    the adapter. Text that you add outside of the marked part stays.

    Args:
        directory: a folder written by `save_pretrained`.
        metrics: measured figures, such as {"accuracy": 0.93}; also kept in adapter_config.json. Before saving or pushing, set
            `model.peft_config["default"].metrics` instead.
    """
    config = SubspaceConfig.from_pretrained(directory)
    if metrics is not None:
        config.metrics = metrics
        config.save_pretrained(os.fspath(directory))  # which updates the card too
    else:
        update_model_card(os.fspath(directory), config)


def update_model_card(directory: str, config: Any) -> None:
    """Put our part into the card beside the weights; called whenever an adapter's config or its card is saved."""
    weights = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not isinstance(config, SubspaceConfig) or not os.path.exists(weights):
        return
    path = os.path.join(directory, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard("---\nlibrary_name: peft\n---\n\n# Adapter\n")
    if START not in card.text and "[More Information Needed]" in card.text:
        # PEFT's empty form: 60 headings without a word under them. What PEFT itself knows comes last and stays.
        known = re.search(r"^(## Training procedure|### Framework versions)\n.*", card.text, re.DOTALL | re.MULTILINE)
        card = ModelCard(f"---\n{card.data.to_yaml()}\n---\n\n{START}{END}\n\n{known[0] if known else ''}")
    base_model = config.base_model_name_or_path or ""
    data: Any = card.data
    data.library_name = "peft"
    tags = {"peft", "peft-subspace", config.method.lower(), *(data.tags or [])}
    if is_model_id(base_model):
        data.base_model = base_model
        tags.add(f"base_model:adapter:{base_model}")
    else:  # a folder of somebody's machine; the Hub refuses it
        data.base_model = None
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    data.tags = sorted(tags)
    before, _, rest = card.text.partition(START)
    after = rest.partition(END)[2]
    parts = [before.strip(), f"{START}\n{_body(directory, config)}\n{END}", after.strip()]
    card.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    write_whole(path, str(card).encode())


def _body(directory: str, config: SubspaceConfig) -> str:
    weights = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    parameters, size = count_parameters(weights, config), os.path.getsize(weights)
    base_model = config.base_model_name_or_path or "unknown"
    rows = [
        ("Base model", f"`{base_model if is_model_id(base_model) else os.path.basename(os.path.normpath(base_model))}`"),
        ("Method", f"[{config.title}]({config.paper})"),
        config.summary,
        ("Trained parameters", f"{parameters:,}"),
        ("File size", f"{size / 1024:,.0f} kB"),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in (config.metrics or {}).items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# {config.title} adapter

| | |
| --- | --- |
{table}

## Load it

`pip install peft-subspace`, then:

```python
import peft_subspace  # registers the {config.method} type with PEFT; without it PEFT raises KeyError: '{config.method}'
{_snippet(directory, config)}
```"""


def _snippet(directory: str, config: SubspaceConfig) -> str:
    if is_model_id(config.base_model_name_or_path or ""):
        name = _auto_class(config)
        labels = _number_of_labels(os.path.join(directory, SAFETENSORS_WEIGHTS_NAME), config)
        more = "" if labels is None else f", num_labels={labels}"
        return f'from peft import {name}\n\nmodel = {name}.from_pretrained("this-repository"{more})'
    return (  # nobody else can make the base model from what the config says
        "from peft import PeftModel\n\nbase_model = ...  # the model that the adapter was trained on\n"
        'model = PeftModel.from_pretrained(base_model, "this-repository")'
    )


def _number_of_labels(path: str, config: SubspaceConfig) -> int | None:
    """Rows of the trained head, which the base model must be made with; None if there is no such head."""
    if "Classification" not in _auto_class(config):
        return None
    heads = [
        shape for key, shape in check_adapter_file(path).items() if key.endswith("weight") and _is_saved_whole(key, config)
    ]
    return min((shape[0] for shape in heads if len(shape) == 2), default=None)


def _is_saved_whole(key: str, config: SubspaceConfig) -> bool:
    return any(f".{name}." in f".{key}" for name in config.modules_to_save or [])


def _auto_class(config: SubspaceConfig) -> str:
    names = {
        "CAUSAL_LM": "AutoPeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "SEQ_CLS": "AutoPeftModelForSequenceClassification",
        "TOKEN_CLS": "AutoPeftModelForTokenClassification",
        "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    }
    return names.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")


def is_model_id(name: str) -> bool:
    """Whether a name has the form of a Hub id (`model` or `owner/model`), which a path seldom has."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def count_parameters(path: str, config: SubspaceConfig) -> int:
    """Number of trained values in an adapter's file, read off its header.

    All but running statistics, what a method freezes, and the base's embedding, which PEFT saves along where the vocabulary
    was changed.
    """
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType[config.method]]
    still = {*STATISTICS, *tuner.delta_cls.frozen_in(config)}
    return sum(
        math.prod(shape)
        for key, shape in check_adapter_file(path).items()
        if _is_saved_whole(key, config) or (f".{config.method.lower()}_" in key and key.rpartition(".")[2] not in still)
    )


AFTER_SAVE.append(update_model_card)
complete_cards(update_model_card)
check_before_saving()
