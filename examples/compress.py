"""Compress MiniLM, heal it on texts without labels, fine-tune it on TREC, export it, reload it, and time both.

    accelerate launch examples/compress.py                       # a few minutes on one CPU core
    accelerate launch examples/compress.py --compression 3 --heal_rows 4000

The texts of another data set (20 newsgroups) heal the compressed encoder: it learns from the original, which is the same model
with its adapter off. Then a classifier is trained on TREC. The exported folder has no original weights and loads with
`from_pretrained`, where peft_subspace is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import assets
import rich
import torch
from accelerate.utils import set_seed
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_subspace import PelaConfig, compression_report, export_compressed
from peft_subspace.training import Healing, HealingTrainer


def arguments(folder: Path, options: argparse.Namespace, **more: Any) -> TrainingArguments:
    """What both stages share."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        dataloader_pin_memory=False,
        **more,
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """The whole way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", type=float, default=2.0)
    parser.add_argument("--heal_rows", type=int, default=1600)
    parser.add_argument("--train_rows", type=int, default=1600)
    parser.add_argument("--test_rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compress"))
    options = parser.parse_args()
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    collate = DataCollatorWithPadding(tokenizer)

    def tokens(rows: Any, *dropped: str) -> Any:
        encoded = rows.map(lambda part: tokenizer(part["text"], truncation=True, max_length=48), batched=True)
        return encoded.remove_columns(["text", *dropped])

    unlabelled = tokens(assets.dataset("newsgroups")["train"].shuffle(seed=0).select(range(options.heal_rows)), "label")
    task = assets.dataset("trec")
    train, test = (
        tokens(task[split].shuffle(seed=0).select(range(rows)))
        for split, rows in (("train", options.train_rows), ("test", min(options.test_rows, len(task["test"]))))
    )
    labels = task["train"].features["label"].num_classes
    base = AutoModelForSequenceClassification.from_pretrained(assets.model_path("minilm"), num_labels=labels)

    # 1. compress; the best factors for what the layers get as input
    config = PelaConfig(compression=options.compression, train_norms=True, modules_to_save=["classifier"], task_type="SEQ_CLS")
    model: Any = get_peft_model(base, config)
    few = [unlabelled[number] for number in range(min(256, len(unlabelled)))]
    model.calibrate([collate(few[start : start + 32]) for start in range(0, len(few), 32)])

    # 2. heal: no labels, the original is the teacher
    args = arguments(options.output_dir / "heal", options, learning_rate=3e-4, num_train_epochs=1)
    healing = Healing(task=0.0, alpha=1.0)
    HealingTrainer(healing=healing, model=model, args=args, train_dataset=unlabelled, data_collator=collate).train()

    # 3. fine-tune on the task
    args = arguments(options.output_dir / "task", options, learning_rate=3e-4, num_train_epochs=1)
    trainer = Trainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, data_collator=collate, compute_metrics=accuracy
    )
    trainer.train()
    before = trainer.evaluate()["eval_accuracy"]

    # 4. what it costs and saves; then leave the original weights behind
    inputs = collate([test[number] for number in range(min(64, len(test)))])
    batch = {key: value.to(model.device) for key, value in inputs.items() if key != "labels"}
    report = compression_report(model, batch)
    rich.print(report.tables()[0])
    report.draw(options.output_dir / "report.png")
    folder = options.output_dir / "model"
    export_compressed(model).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)

    # 5. as another program would: one call
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
    again = Trainer(model=reloaded, args=args, eval_dataset=test, data_collator=collate, compute_metrics=accuracy).evaluate()[
        "eval_accuracy"
    ]
    torch.testing.assert_close(again, before)
    size = (folder / "model.safetensors").stat().st_size
    print(f"accuracy on TREC {before:.3f}, reloaded {again:.3f}; the file has {size / 1e6:.1f} MB; {folder} is ready")


if __name__ == "__main__":
    main()
