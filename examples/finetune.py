"""Fine-tune a pretrained model with any PEFT method, those of peft_subspace and PEFT's own alike.

    accelerate launch examples/finetune.py --method flora --output_dir outputs/trec
    accelerate launch examples/finetune.py --task image-classification --model vit-small --dataset digits \\
        --image_size 56 --method flora --config examples/configs/flora-vit.json --output_dir outputs/digits
    accelerate launch examples/finetune.py --task causal-lm --model <Hub id> --dataset my_text.txt --output_dir outputs/lm

Models and data sets are Hub ids, local paths, or one of the names in assets.py that install without a Hub. All fields of
transformers' `TrainingArguments` are accepted (`--learning_rate`, `--num_train_epochs`, `--bf16`, `--seed`, ...); the learning
rate is the one that the method recommends where none is given. With `--push_to_hub --hub_model_id me/name` the adapter is
pushed.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import assets
import numpy as np
from datasets import DatasetDict, load_dataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_subspace  # noqa: F401  # registers FLORA with PEFT

LORAS_RATE = 2e-3  # for PEFT's own methods, which recommend none: LoRA's best, or near it, in benchmarks/README.md
TASK_TYPES = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "image-classification": None}


@dataclass
class ExampleArguments:
    """What to train on what; everything about how is in TrainingArguments."""

    task: Literal["text-classification", "image-classification", "causal-lm"] = field(default="text-classification")
    model: str = field(default="minilm", metadata={"help": "Hub id, folder, or a name in assets.py."})
    dataset: str = field(default="trec", metadata={"help": "Hub id, a .txt/.csv/.json file, or a name in assets.py."})
    method: str = field(default="flora", metadata={"help": "A PEFT type: flora, lora, ..."})
    config: str | None = field(default=None, metadata={"help": "JSON file (or JSON text) with fields of the method's config."})
    max_length: int = field(default=64, metadata={"help": "Tokens per text."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side that pictures are scaled to; default: the processor's."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set, such as sst2."})
    text_column: str = field(default="text")
    label_column: str = field(default="label")
    image_column: str = field(default="image")
    train_rows: int | None = field(default=None, metadata={"help": "Use only so many rows to train on."})
    hold_out: bool = field(default=False, metadata={"help": "Evaluate on a tenth of train, not on test (to choose settings)."})
    eval_rows: int | None = field(default=None, metadata={"help": "Use only so many rows to evaluate on."})


@dataclass
class Training(TrainingArguments):
    """transformers' arguments, but for the learning rate: its default is made for whole models and teaches adapters nothing."""

    learning_rate: float | None = field(default=None, metadata={"help": "Of the optimizer; default: the method's own."})


def load_rows(arguments: ExampleArguments) -> DatasetDict:
    """The data with `train` and `test` splits; a local file is split 9 : 1."""
    suffix = Path(arguments.dataset).suffix
    if suffix in (".txt", ".csv", ".json", ".jsonl"):
        kind = {".txt": "text", ".jsonl": "json"}.get(suffix, suffix[1:])
        rows = load_dataset(kind, data_files=arguments.dataset, split="train").train_test_split(test_size=0.1, seed=0)
    else:
        rows = assets.dataset(arguments.dataset, **({"name": arguments.dataset_config} if arguments.dataset_config else {}))
    rows = DatasetDict({"train": rows["train"], "test": rows["test" if "test" in rows else "validation"]})
    if arguments.hold_out:
        rows = rows["train"].train_test_split(test_size=0.1, seed=0)
    for split, limit in (("train", arguments.train_rows), ("test", arguments.eval_rows)):
        if limit is not None:
            rows[split] = rows[split].shuffle(seed=0).select(range(min(limit, len(rows[split]))))
    return rows


def with_labels(rows: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """The labels as numbers in a column `label`, and their names; a file has them as plain values."""
    if column != "label":
        rows = rows.rename_column(column, "label")
    if not hasattr(rows["train"].features["label"], "names"):
        rows = rows.class_encode_column("label")
    return rows, rows["train"].features["label"].names


def text_classification(arguments: ExampleArguments, rows: DatasetDict) -> dict[str, Any]:
    """A sequence classifier."""
    path = assets.model_path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows, names = with_labels(rows, arguments.label_column)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = rows.map(
        lambda batch: tokenizer(batch[arguments.text_column], truncation=True, max_length=arguments.max_length),
        batched=True,
        remove_columns=[name for name in rows["train"].column_names if name != "label"],
    )
    return {"model": model, "rows": rows, "data_collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer}


def image_classification(arguments: ExampleArguments, rows: DatasetDict) -> dict[str, Any]:
    """An image classifier."""
    path = assets.model_path(arguments.model)
    side = {"height": arguments.image_size, "width": arguments.image_size}
    scaled = {} if arguments.image_size is None else {"size": side, "do_center_crop": False}
    processor = AutoImageProcessor.from_pretrained(path, **scaled)
    rows, names = with_labels(rows, arguments.label_column)
    model = AutoModelForImageClassification.from_pretrained(
        path, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )

    def to_tensors(batch: dict[str, Any]) -> dict[str, Any]:
        pictures = [picture.convert("RGB") for picture in batch[arguments.image_column]]
        return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    return {"model": model, "rows": rows.with_transform(to_tensors), "processing_class": processor}


def causal_lm(arguments: ExampleArguments, rows: DatasetDict) -> dict[str, Any]:
    """A language model on texts that are cut into blocks of `max_length` tokens."""
    path = assets.model_path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path)

    def to_blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = [token for ids in tokenizer(batch[arguments.text_column])["input_ids"] for token in ids]
        size = arguments.max_length
        return {"input_ids": [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]}

    rows = rows.map(to_blocks, batched=True, remove_columns=rows["train"].column_names)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return {"model": model, "rows": rows, "data_collator": collator, "processing_class": tokenizer}


def adapter_config(arguments: ExampleArguments) -> PeftConfig:
    """The config of the method, with the fields of `--config`."""
    known = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if arguments.method not in known:
        raise SystemExit(f"--method {arguments.method!r} is not a PEFT type. Known: {', '.join(sorted(known))}.")
    text = arguments.config or "{}"
    fields = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    if arguments.task == "image-classification":  # PEFT knows the heads of text classifiers only
        fields.setdefault("modules_to_save", ["classifier"])
    return known[arguments.method](task_type=TASK_TYPES[arguments.task], **fields)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is the label's."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def finetune(arguments: ExampleArguments, training: TrainingArguments) -> tuple[PeftModel, Trainer, dict[str, float]]:
    """Load, adapt, train, evaluate, save; push if asked."""
    set_seed(training.seed)  # before the head is made
    prepare = {"text-classification": text_classification, "image-classification": image_classification, "causal-lm": causal_lm}
    parts = prepare[arguments.task](arguments, load_rows(arguments))
    rows = parts.pop("rows")
    set_seed(training.seed)
    model = get_peft_model(parts.pop("model"), adapter_config(arguments))
    model.print_trainable_parameters()
    push, training.push_to_hub = training.push_to_hub, False  # PEFT pushes the adapter itself, once, with its card
    if arguments.task == "image-classification":
        training.remove_unused_columns = False
    trainer = Trainer(
        model,
        training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        compute_metrics=None if arguments.task == "causal-lm" else accuracy,
        **parts,
    )
    if getattr(model.peft_config["default"], "init_weights", None) == "gradient":
        model.initialize_from_gradients(itertools.islice(trainer.get_train_dataloader(), 8))
        set_seed(training.seed)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    metrics = {key: metrics[key] for key in ("accuracy", "loss") if key in metrics}
    if arguments.task == "causal-lm":
        metrics["perplexity"] = math.exp(metrics["loss"])
    model.peft_config["default"].metrics = metrics  # for the model card
    trainer.save_state()  # the loss history, for pictures and comparisons
    if trainer.is_fsdp_enabled:  # checkpoints may be shards; what is loaded elsewhere is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(training.output_dir)  # in every process: FSDP and ZeRO-3 gather the adapter
    if trainer.is_world_process_zero():
        found = {key: round(value, 4) for key, value in metrics.items()}
        print(found, "saved to", training.output_dir, "by processes:", training.world_size)
        if push:
            model.push_to_hub(training.hub_model_id or Path(training.output_dir).name)
    return model, trainer, metrics


def main() -> None:
    """Read the command line and train."""
    arguments, training = HfArgumentParser((ExampleArguments, Training)).parse_args_into_dataclasses()
    if training.learning_rate is None:
        config = adapter_config(arguments)
        training.learning_rate = getattr(config, "recommended_learning_rate", LORAS_RATE)
        print(f"Learning rate {training.learning_rate:g}, as recommended for {arguments.method}; --learning_rate sets another.")
    finetune(arguments, training)


if __name__ == "__main__":
    main()
