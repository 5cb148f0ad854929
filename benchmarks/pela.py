"""PELA's ablation on real weights: what healing, distillation and the penalty are worth at several compressions.

    python benchmarks/pela.py              # all rows, 3 seeds; more than an hour on one core
    python benchmarks/pela.py --report     # the table and the picture of what has run so far

MiniLM on texts and a ViT-S/14 at 28 pixels on images, every linear layer of the encoder compressed. An intermediate stage of
`HEAL` epochs, then one epoch of fine-tuning on the task, both on the same rows; factors, biases, norms and a new head train.
The dense model is fine-tuned for as many epochs in all. "svd only" has no intermediate stage. Rates were chosen among `RATES`
on held-out rows of one task of each kind, at c = 2. Runs are written one by one, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import assets
import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from benchmarks import measure
from benchmarks.quality import HEAD_RATE, SWEEP_SEED, batches, rows
from peft_subspace import PelaConfig
from peft_subspace.training import Healing

TASKS = {"text": ["trec", "newsgroups"], "image": ["digits", "fashion-mnist"]}
RATES = {"text": (1e-4, 3e-4, 1e-3), "image": (3e-5, 1e-4, 3e-4)}
DENSE_RATE = {"text": 1e-4, "image": 3e-5}  # the best of quality.py's sweep of full fine-tuning
COMPRESSIONS, HEAL, ROWS = (1.5, 2.0, 3.0), 2, 480
PENALTY = {
    "gamma": 10.0,
    "mode": "topk",
    "eps": 0.5,
    "relative_eps": True,
    "penalty_every": 2,
}  # entries above half of the SVD's own deviation
VARIANTS: dict[str, tuple[str, dict[str, Any] | None, bool]] = {  # name -> (label, objective, weighted by activations)
    "svd": ("svd only", None, False),
    "task": ("task loss only", {"alpha": 0.0}, False),
    "fd": ("+ distillation", {}, False),
    "fd-wp": ("+ distillation + penalty", PENALTY, False),
    "unlabelled": ("distillation without labels", {"task": 0.0}, False),
    "weighted-fd": ("activation-weighted + distillation", {}, True),
    "weighted": ("activation-weighted, no healing", None, True),
    "weighted-unlabelled": ("activation-weighted, distillation without labels", {"task": 0.0}, True),
}
EVERYWHERE = ("svd", "task", "fd", "fd-wp", "weighted-fd")  # the others at c = 2 only


def compressed(model: Any, ratio: float) -> Any:
    """The model with every linear layer of its encoder compressed, norms and head trained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PELA leaves")
        return get_peft_model(
            model,
            PelaConfig(compression=ratio, train_norms=True, modules_to_save=["classifier"], exclude_modules=["pooler.dense"]),
        )


def train(model: Any, data: dict[str, Any], epochs: int, rate: float, head_rate: float, healing: Healing | None) -> None:
    """AdamW with warm-up and linear decay, everything that is trainable."""
    head = {id(p) for name, p in model.named_parameters() if "classifier" in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in head], "lr": rate},
        {"params": [p for p in trained if id(p) in head], "lr": head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = epochs * -(-len(data["labels"]) // 16)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup)))
    model.train()
    for _ in range(epochs):
        for batch in batches(data, torch.randperm(len(data["labels"]))):
            loss = model(**batch).loss if healing is None else healing(model, batch)[0]
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def run_once(task: str, variant: str, ratio: float, rate: float, seed: int, hold_out: bool) -> dict[str, Any]:
    """Compress, heal, fine-tune; accuracy on the test rows, or on training rows that were held out."""
    kind = "text" if task in TASKS["text"] else "image"
    parts, classes = rows(task)
    data = {name: values[:ROWS] for name, values in parts["train"].items()}
    asked = parts["held" if hold_out else "test"]
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if kind == "text" else AutoModelForImageClassification
    model: Any = auto.from_pretrained(assets.model_path("minilm" if kind == "text" else "vit-small"), num_labels=classes)
    start = time.process_time()
    if variant == "dense":
        train(model.requires_grad_(True), data, HEAL + 1, rate, HEAD_RATE[kind], None)
    else:
        _, objective, weighted = VARIANTS[variant]
        model = compressed(model, ratio)
        if weighted:
            unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in batches(data, torch.arange(ROWS // 2))]
            model.calibrate(unlabelled)
        if objective is not None:
            train(model, data, HEAL, rate, HEAD_RATE[kind], Healing(**objective))
        train(model, data, 1, rate, HEAD_RATE[kind], None)
    with torch.no_grad():
        guesses = torch.cat([model(**batch).logits.argmax(-1) for batch in batches(asked, torch.arange(len(asked["labels"])))])
    return {
        "task": task, "variant": variant, "ratio": ratio, "rate": rate, "seed": seed, "hold_out": hold_out,
        "accuracy": float((guesses == asked["labels"]).float().mean()), "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


class Runs:
    """What has run, in a file of lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self._key(run): run for run in map(json.loads, lines)}

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in ("task", "variant", "ratio", "rate", "seed", "hold_out"))

    def get(self, *key: Any) -> dict[str, Any]:
        """The run with this task, variant, ratio, rate, seed and hold_out; made if it is not there."""
        if key not in self.done:
            self.done[key] = run_once(*key)
            with self.path.open("a") as sink:
                sink.write(json.dumps(self.done[key]) + "\n")
            print(self.done[key], file=sys.stderr, flush=True)
        return self.done[key]

    def rate(self, kind: str) -> float:
        """The rate of compressed models: the best on held-out rows of the kind's first task."""
        return max(RATES[kind], key=lambda rate: self.get(TASKS[kind][0], "fd", 2.0, rate, SWEEP_SEED, True)["accuracy"])


def wanted() -> list[tuple[str, float]]:
    """All rows: (variant, ratio)."""
    found = [("dense", 1.0)]
    for ratio in COMPRESSIONS:
        found += [(variant, ratio) for variant in VARIANTS if variant in EVERYWHERE or ratio == 2.0]
    return found


def report(runs: Runs, seeds: list[int]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds by row and task, and the difference to the dense model seed by seed."""
    table = []
    for variant, ratio in wanted():
        entry: dict[str, Any] = {"variant": variant, "ratio": ratio, "tasks": {}}
        for kind, tasks in TASKS.items():
            rate = DENSE_RATE[kind] if variant == "dense" else runs.rate(kind)
            for task in tasks:
                found = [runs.done.get((task, variant, ratio, rate, seed, False)) for seed in seeds]
                dense = [runs.done.get((task, "dense", 1.0, DENSE_RATE[kind], seed, False)) for seed in seeds]
                pairs = [(run["accuracy"], base["accuracy"]) for run, base in zip(found, dense, strict=True) if run and base]
                if pairs:
                    scores, gaps = [a for a, _ in pairs], [a - b for a, b in pairs]
                    entry["tasks"][task] = {"mean": statistics.mean(scores), "scores": scores, "gaps": gaps}
        table.append(entry)
    return table


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def show(table: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    names = [task for tasks in TASKS.values() for task in tasks]
    view = Table("c", "row", *(f"{name}: accuracy (points to dense) [seeds]" for name in names))
    for entry in table:
        cells = []
        for name in names:
            found = entry["tasks"].get(name)
            if found is None:
                cells.append("-")
                continue
            gap = "" if entry["variant"] == "dense" else f" ({100 * statistics.mean(found['gaps']):+.1f})"
            spread = f" ± {100 * _spread(found['scores']):.1f}" if len(found["scores"]) > 1 else ""
            cells.append(f"{100 * found['mean']:.1f}{spread}{gap} [{len(found['scores'])}]")
        label = "dense, fine-tuned" if entry["variant"] == "dense" else VARIANTS[entry["variant"]][0]
        view.add_row(f"{entry['ratio']:g}", label, *cells)
    console.print(view)


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Points to the dense model over compression, one panel for each task that has run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tasks = [task for group in TASKS.values() for task in group if any(task in entry["tasks"] for entry in table)]
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for variant in EVERYWHERE:
            rows_of = [e for e in table if e["variant"] == variant and task in e["tasks"]]
            gaps = [e["tasks"][task]["gaps"] for e in rows_of]
            means, errors = [100 * statistics.mean(g) for g in gaps], [100 * _spread(g) for g in gaps]
            panel.errorbar([e["ratio"] for e in rows_of], means, yerr=errors, marker="o", capsize=3, label=VARIANTS[variant][0])
        seeds = sorted({len(e["tasks"][task]["scores"]) for e in table if task in e["tasks"]})
        panel.axhline(0, color="tab:gray", linewidth=1)
        panel.set_xlabel("compression c of the encoder's linear layers")
        panel.set_ylabel("accuracy, points to the dense model")
        panel.set_title(f"{task} ({' to '.join(map(str, seeds))} seeds)", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run what has not run, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.out / "pela-runs.jsonl")
    if not options.report:
        rates = {kind: runs.rate(kind) for kind in options.kinds}
        for place in range(max(len(TASKS[kind]) for kind in options.kinds)):
            for seed in options.seeds:
                for kind in options.kinds:
                    task = TASKS[kind][place]
                    for variant, ratio in wanted():
                        rate = DENSE_RATE[kind] if variant == "dense" else rates[kind]
                        runs.get(task, variant, ratio, rate, seed, False)
    table = report(runs, options.seeds)
    show(table, Console(width=170))
    measure.write_json({**measure.environment(torch.device("cpu")), "rows": table}, "pela", options.out)
    draw(table, options.out / "pela.png")


if __name__ == "__main__":
    main()
