"""Accuracy of FLoRA and LoRA at no more parameters: MiniLM on TREC, learning rate chosen on held-out rows, three seeds.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy-trec.json

First each method is trained with every learning rate of the same grid, one seed, and evaluated on a tenth of the training
rows; then with its best rate and each seed on all training rows, evaluated on the test rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from finetune import ExampleArguments, finetune
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

METHODS = {
    "FLoRA r=[8, 7]": ("flora", {"r": [8, 7]}),
    "LoRA r=8": ("lora", {"r": 8, "lora_alpha": 16}),
}


def train(method: str, fields: dict[str, Any], rate: float, seed: int, epochs: float, hold_out: bool) -> dict[str, float]:
    """One run; returns accuracy and the number of trained parameters of the adapter, head not counted."""
    arguments = ExampleArguments(method=method, config=json.dumps(fields), hold_out=hold_out)
    training = TrainingArguments(
        output_dir=f"outputs/accuracy/{method}",
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        seed=seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        model, _, metrics = finetune(arguments, training)
    count = sum(p.numel() for name, p in model.named_parameters() if f"{method}_" in name)
    return {"accuracy": metrics["accuracy"], "parameters": count}


def main() -> None:
    """Choose the rates, run the seeds, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/accuracy-trec.json"))
    options = parser.parse_args()
    results = {}
    table = Table("method", "adapter parameters", "learning rate", "accuracy by seed", "mean")
    for name in options.methods:
        method, fields = METHODS[name]
        sweep = {rate: train(method, fields, rate, 100, options.epochs, True)["accuracy"] for rate in options.rates}
        print(name, sweep, file=sys.stderr)
        best = max(sweep, key=sweep.__getitem__)
        runs = [train(method, fields, best, seed, options.epochs, False) for seed in options.seeds]
        scores = [run["accuracy"] for run in runs]
        results[name] = {"sweep on held-out rows": sweep, "rate": best, "test accuracy": scores, **runs[0]}
        mean = statistics.mean(scores)
        table.add_row(name, f"{runs[0]['parameters']:,}", f"{best:g}", " ".join(f"{s:.3f}" for s in scores), f"{mean:.4f}")
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"command": sys.argv, "results": results}, indent=2))


if __name__ == "__main__":
    main()
