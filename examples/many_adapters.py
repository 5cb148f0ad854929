"""Two SVFit adapters on one model: files of a few kilobytes, one basis in memory, both tasks in one batch.

    accelerate launch examples/many_adapters.py --epochs 2

Each adapter is trained on a task of its own with its own head, through accelerate. Then one batch holds rows of both tasks,
each row with its own adapter, and an adapter is loaded back and exported to plain LoRA.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import assets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Value, interleave_datasets
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_subspace import SvfitConfig, SvfitDelta, save_as_lora

TASKS = ["trec", "sms-spam"]
LABELS = 6  # of the task with more classes: heads of one model have one size


def base_model() -> Any:
    """MiniLM with a new head, the same one each time."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(assets.model_path("minilm"), num_labels=LABELS)


def batches(rows: Any, tokenizer: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Rows of a data set as the model's inputs."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        inputs = tokenizer(part["text"], truncation=True, max_length=48, padding=True, return_tensors="pt")
        yield {**inputs, "labels": torch.tensor(part["label"])}


def train(model: Any, rows: Any, tokenizer: Any, epochs: int, accelerator: Accelerator) -> None:
    """Train the active adapter; its head has a rate of its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if ".svfit_" in name], "lr": 0.1},
        {"params": [p for name, p in named if ".svfit_" not in name], "lr": 5e-3},
    ]
    trained, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, weight_decay=0.0))
    trained.train()
    for epoch in range(epochs):
        for batch in batches(rows.shuffle(seed=epoch), tokenizer, 16):
            loss = trained(**{key: value.to(accelerator.device) for key, value in batch.items()}).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, rows: Any, tokenizer: Any, names: list[str] | None = None) -> float:
    """Share of right answers of the active adapter, or of the adapter that `names` gives for each row."""
    right, start = 0, 0
    for batch in batches(rows, tokenizer, 64):
        labels = batch.pop("labels").to(model.device)
        chosen = {} if names is None else {"adapter_names": names[start : start + len(labels)]}
        logits = model(**{key: value.to(model.device) for key, value in batch.items()}, **chosen).logits
        right += int((logits.argmax(-1) == labels).sum())
        start += len(labels)
    return right / len(rows)


def main() -> None:
    """Train both, mix them, save, load and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-rows", type=int, default=960)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--output", type=Path, help="keep the adapters here")
    options = parser.parse_args()
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    data = {task: assets.dataset(task) for task in TASKS}
    tests = {task: data[task]["test"].shuffle(seed=0).select(range(options.test_rows)) for task in TASKS}

    model: Any = None
    for task in TASKS:
        config = SvfitConfig(r="full", target_modules=["query", "value"], task_type="SEQ_CLS")
        if model is None:
            model = get_peft_model(base_model(), config, adapter_name=task)
        else:
            model.add_adapter(task, config)
            model.set_adapter(task)
        rows = data[task]["train"].shuffle(seed=0).select(range(options.train_rows))
        train(model, rows, tokenizer, options.epochs, accelerator)
        print(f"{task}: {accuracy(model, tests[task], tokenizer):.3f} of {options.test_rows} right")

    deltas = [module for module in model.modules() if isinstance(module, SvfitDelta)]
    bases = {delta.basis.untyped_storage().data_ptr() for delta in deltas}
    print(f"{len(deltas)} updates of {len(TASKS)} adapters share {len(bases)} bases in memory")

    mixed = interleave_datasets([tests[task].cast_column("label", Value("int64")) for task in TASKS])
    print(f"both tasks in every batch: {accuracy(model, mixed, tokenizer, TASKS * options.test_rows):.3f} right")

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        model.save_pretrained(str(folder))
        for task in TASKS:
            size = (folder / task / "adapter_model.safetensors").stat().st_size
            print(f"{task}: {size / 1024:.0f} kB on disk with its head")
        loaded = PeftModel.from_pretrained(base_model(), folder / TASKS[0]).eval().to(model.device)
        model.set_adapter(TASKS[0])
        example = next(batches(tests[TASKS[0]], tokenizer, 64))
        with torch.no_grad():
            same = torch.equal(loaded(**example).logits, model(**example).logits)
        print(f"loaded back, the basis made again from the base: {'the same' if same else 'OTHER'} logits, bit for bit")
        save_as_lora(loaded, folder / "as-lora", overwrite=True)
        print("exported to plain LoRA, exact and without an SVD")


if __name__ == "__main__":
    main()
