"""Accuracy of FLoRA and LoRA at no more parameters: MiniLM on TREC, learning rate chosen on held-out rows, three seeds.

    python benchmarks/accuracy.py            # the seeds, with the rates below
    python benchmarks/accuracy.py --sweep    # how the rates were chosen

The sweep trains each method with every learning rate of one grid, one seed, on nine tenths of the training rows and
evaluates on the last tenth. The seeds train on all training rows and are evaluated on the test rows.
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

# name -> (PEFT type, fields of its config, learning rate that the sweep found best)
METHODS = {
    "FLoRA r=[8, 7]": ("flora", {"r": [8, 7]}, 1.6e-2),
    "LoRA r=8": ("lora", {"r": 8, "lora_alpha": 16}, 4e-3),
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
    parser.add_argument("--sweep", action="store_true", help="print held-out accuracy for every rate instead")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = []
    for name in options.methods:
        method, fields, best = METHODS[name]
        if options.sweep:
            runs = [{"rate": r, **train(method, fields, r, 100, options.epochs, True)} for r in options.rates]
        else:
            runs = [{"seed": s, "rate": best, **train(method, fields, best, s, options.epochs, False)} for s in options.seeds]
        rows.append({"name": name, "runs": runs})
        print(name, runs, file=sys.stderr, flush=True)
    table = Table(
        "method", "adapter parameters", "accuracy" + (" on held-out rows by rate" if options.sweep else " by seed"), "mean"
    )
    for row in rows:
        scores = [run["accuracy"] for run in row["runs"]]
        label = " ".join(
            f"{run['rate']:g}: {run['accuracy']:.3f}" if options.sweep else f"{run['accuracy']:.3f}" for run in row["runs"]
        )
        table.add_row(row["name"], f"{row['runs'][0]['parameters']:,}", label, f"{statistics.mean(scores):.4f}")
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("accuracy-trec-sweep.json" if options.sweep else "accuracy-trec.json")
    path.write_text(json.dumps({"arguments": sys.argv[1:], "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
