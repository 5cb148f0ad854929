"""Tiny models with tokenizers and heads, their data, and recipes that learn on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from tests.pico import VOCABULARY, WIDTH
from tests.pools import vector_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "yes", "no", "maybe", *[f"w{n}" for n in range(VOCABULARY - 6)]]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
CLASSES = {"a": 3, "b": 2}


def write_tokenizer(folder: Path) -> None:
    """Whole words."""
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    fast.save_pretrained(folder)


def rows_of(seed: int, count: int = 24) -> list[dict[str, Any]]:
    """Texts of random words with labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        words = torch.randint(6, VOCABULARY, (int(torch.randint(3, 7, (1,), generator=generator)),), generator=generator)
        text = " ".join(WORDS[n] for n in words.tolist())
        found.append({"text": text, "label": int(words[0]) % 2})
    return found


def write_rows(folder: Path, name: str, seed: int, kind: str = "jsonl", **more: Any) -> str:
    """A file of rows."""
    rows = [{**row, **more} for row in rows_of(seed)]
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A fine-tuned model: the same and something small."""
    with torch.no_grad():
        for name, values in vector_of(model, seed, scale=0.1).items():
            model.get_parameter(name).add_(values)
    return model


def classifiers(folder: Path, head_in_base: bool = False, lora: bool = False) -> None:
    """`base` (an encoder, or a classifier), `a` and `b` with heads of their own, `b` as a LoRA if asked; data `a`, `b`."""
    torch.manual_seed(0)
    whole = tf.BertForSequenceClassification(tf.BertConfig(**COMMON, num_labels=2))
    (whole if head_in_base else whole.bert).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for number, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(number + 1)
        classes = 2 if head_in_base else classes
        model: Any = tf.BertForSequenceClassification(tf.BertConfig(**COMMON, num_labels=classes))
        model.bert.load_state_dict(whole.bert.state_dict())
        if lora and name == "b":
            config = LoraConfig(
                r=2,
                target_modules=["query", "value"],
                modules_to_save=["classifier"],
                init_lora_weights=False,
                task_type="SEQ_CLS",
            )
            get_peft_model(model, config).save_pretrained(folder / name)
        else:
            moved(model, number).save_pretrained(folder / name)
        write_rows(folder, name, number)


def last_token_classifiers(folder: Path) -> None:
    """`base`, an encoder, and `a` and `b` that answer at the last token; their configs name no token that pads."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    base = tf.GPT2Model(tf.GPT2Config(**sizes, initializer_range=0.2))
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for number, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(number + 1)
        model: Any = tf.GPT2ForSequenceClassification(tf.GPT2Config(**sizes, initializer_range=0.2, num_labels=classes))
        model.transformer.load_state_dict(base.state_dict())
        moved(model, number).save_pretrained(folder / name)
        write_rows(folder, name, number)


def writers(folder: Path, encoder_decoder: bool = False) -> None:
    """A small model that writes, two that were fine-tuned, and data."""
    torch.manual_seed(0)
    if encoder_decoder:
        sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config: Any = tf.T5Config(**sizes, decoder_start_token_id=0, initializer_factor=1.0)
        make: Any = tf.T5ForConditionalGeneration
    else:
        sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
        config = tf.GPT2Config(**sizes, initializer_range=0.2, tie_word_embeddings=False)
        make = tf.GPT2LMHeadModel
    base = make(config)
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for number, name in enumerate(CLASSES):
        model = make(config)
        model.load_state_dict(base.state_dict())
        moved(model, number).save_pretrained(folder / name)
        write_rows(folder, name, number)


def write_head(folder: Path, classes: int) -> str:
    """A linear layer alone."""
    torch.manual_seed(3)
    layer = nn.Linear(WIDTH, classes)
    save_file(dict(layer.state_dict()), folder / "head.safetensors")
    return str(folder / "head.safetensors")


def recipe(folder: Path, method: str = "atlas", tasks: Any = None, **learn: Any) -> dict[str, Any]:
    """A recipe that learns on `a` and `b`."""
    own = [{"name": name, "data": str(folder / f"{name}.jsonl"), "text": "text"} for name in CLASSES]
    given = {"loss": "entropy", "steps": 4, "lr": 0.05, "batch_size": 4, "eval_every": 2, "tasks": tasks or own, **learn}
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in CLASSES],
        "subspace": {"learn": given},
    }
