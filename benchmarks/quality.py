"""Accuracy against trained parameters: SVFit, FLoRA, PEFT's tuners and full fine-tuning on small real tasks, three seeds.

    python benchmarks/quality.py                 # the sweep, the seeds, the table and the picture; hours on one core
    python benchmarks/quality.py --report        # the table and the picture of what has run so far

Text tasks train MiniLM, image tasks a ViT-S/14 at 28 pixels; every method adapts query and value and trains a new head. Each
method has the same number of trials: four learning rates, one seed, on held-out training rows of one text task and one image
task; the best rate then serves all tasks of that kind. The head's rate is the same for all. Runs are written one by one, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import assets
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import measure
from peft_subspace import FloraConfig, SvfitConfig

TASKS = {"text": ["trec", "sms-spam", "newsgroups", "wordnet"], "image": ["digits", "fashion-mnist"]}
SWEPT = {"text": "trec", "image": "digits"}
TARGETS = ("query", "value", "q_proj", "v_proj")  # BERT's names, and those of the ViT
TRAIN_ROWS, HELD_ROWS, TEST_ROWS, EPOCHS, BATCH, LENGTH, PIXELS = 960, 300, 400, 1, 16, 32, 28
HEAD_RATE = {"text": 5e-3, "image": 2e-3}
SWEEP_SEED = 100


# Methods ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row: how to adapt a frozen model, and the learning rates that are tried."""

    label: str
    attach: Callable[[nn.Module], nn.Module]
    rates: tuple[float, ...]


def _with(config: Callable[..., peft.PeftConfig], **fields: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: peft.get_peft_model(model, config(target_modules=_targets(model), **fields))


def _targets(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(TARGETS)]


class LoraXs(nn.Module):
    """y = W x + U_r S_r R V_r^T x with a trained R `[r, r]`, as in LoRA-XS (arXiv:2405.17604)."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base
        left, values, right = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        self.register_buffer("down", right[:r])
        self.register_buffer("up", left[:, :r] * values[:r])
        self.core = nn.Parameter(torch.randn(r, r) * 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(F.linear(x, self.down), self.core), self.up)


def _lora_xs(r: int) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        for name in _targets(model):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraXs(model.get_submodule(name), r))  # type: ignore[arg-type]
        return model

    return attach


def _everything(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


METHODS = {
    "svfit": Method("SVFit", _with(SvfitConfig, r="full"), (3e-2, 1e-1, 3e-1, 1.0)),
    "svfit-relative": Method("SVFit relative", _with(SvfitConfig, r="full", scale="relative"), (5e-2, 1e-1, 2e-1, 4e-1)),
    "svfit-64": Method("SVFit relative r=64", _with(SvfitConfig, r=64, scale="relative"), (5e-2, 1e-1, 2e-1, 4e-1)),
    "flora": Method("FLoRA r=8", _with(FloraConfig, r=8), (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "lora": Method("LoRA r=8", _with(peft.LoraConfig, r=8, lora_alpha=16), (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "dora": Method("DoRA r=8", _with(peft.LoraConfig, r=8, lora_alpha=16, use_dora=True), (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "pissa": Method(
        "PiSSA r=8", _with(peft.LoraConfig, r=8, lora_alpha=8, init_lora_weights="pissa"), (3e-4, 1e-3, 3e-3, 1e-2)
    ),
    "vera": Method("VeRA r=256", _with(peft.VeraConfig, r=256), (1e-2, 3e-2, 1e-1, 3e-1)),
    "tinylora": Method("TinyLoRA", _with(peft.TinyLoraConfig), (1e-2, 1e-1, 1.0, 10.0)),
    "lora-xs": Method("LoRA-XS-like r=20", _lora_xs(20), (1e-3, 4e-3, 1.6e-2, 6.4e-2)),
    "full": Method("full fine-tuning", _everything, (3e-5, 1e-4, 3e-4, 1e-3)),
}


# Data --------------------------------------------------------------------------------------------------------------------


@cache
def rows(task: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Rows of a task to train on, to choose a rate with and to test on, as tensors; and the number of classes."""
    data = assets.dataset(task)
    train, test = (data[split].shuffle(seed=0) for split in ("train", "test"))
    parts = {
        "train": train.select(range(TRAIN_ROWS)),
        "held": train.select(range(TRAIN_ROWS, TRAIN_ROWS + HELD_ROWS)),
        "test": test.select(range(min(TEST_ROWS, len(test)))),
    }
    convert = _pixels if "image" in data["train"].features else _tokens
    return {name: convert(part) for name, part in parts.items()}, data["train"].features["label"].num_classes


def _tokens(part: Any) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    encoded = tokenizer(list(part["text"]), truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    kept = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return {**kept, "labels": torch.tensor(list(part["label"]))}


def _pixels(part: Any) -> dict[str, Tensor]:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = torch.stack([torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) for image in part["image"]])
    scaled = F.interpolate(grey[:, None] / 255, size=PIXELS, mode="bilinear").expand(-1, 3, -1, -1)
    normal = (scaled - mean[:, None, None]) / deviation[:, None, None]
    return {"pixel_values": normal.contiguous(), "labels": torch.tensor(list(part["label"]))}


def batches(data: dict[str, Tensor], order: Tensor) -> Iterator[dict[str, Tensor]]:
    """Rows in this order, trimmed to the longest text of each batch."""
    for chosen in order.split(BATCH):
        batch = {name: values[chosen] for name, values in data.items()}
        if "attention_mask" in batch:
            longest = int(batch["attention_mask"].sum(1).max())
            batch = {name: values[:, :longest] if values.ndim == 2 else values for name, values in batch.items()}
        yield batch


# Training ----------------------------------------------------------------------------------------------------------------


def train_once(task: str, method: str, rate: float, seed: int, hold_out: bool) -> dict[str, Any]:
    """Train on a task; accuracy on its test rows, or on training rows that were held out."""
    kind = "text" if task in TASKS["text"] else "image"
    parts, classes = rows(task)
    learned, asked = parts["train"], parts["held" if hold_out else "test"]
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if kind == "text" else AutoModelForImageClassification
    name = assets.model_path("minilm" if kind == "text" else "vit-small")
    model = auto.from_pretrained(name, num_labels=classes).requires_grad_(False)
    head = model.classifier
    torch.manual_seed(seed)
    adapted = METHODS[method].attach(model)
    head.requires_grad_(True)
    of_head = {id(p) for p in head.parameters()}
    trained = [p for p in adapted.parameters() if p.requires_grad and id(p) not in of_head]
    groups = [{"params": trained, "lr": rate}, {"params": list(head.parameters()), "lr": HEAD_RATE[kind]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = EPOCHS * -(-len(learned["labels"]) // BATCH)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup)))
    start = time.process_time()
    adapted.train()
    for _ in range(EPOCHS):
        for batch in batches(learned, torch.randperm(len(learned["labels"]))):
            adapted(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    adapted.eval()
    with torch.no_grad():
        guesses = torch.cat(
            [adapted(**batch).logits.argmax(-1) for batch in batches(asked, torch.arange(len(asked["labels"])))]
        )
    return {
        "task": task, "method": method, "rate": rate, "seed": seed, "hold_out": hold_out,
        "accuracy": float((guesses == asked["labels"]).float().mean()),
        "parameters": sum(p.numel() for p in trained), "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


class Runs:
    """What has run, in a file of lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self._key(run): run for run in map(json.loads, lines)}

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in ("task", "method", "rate", "seed", "hold_out"))

    def get(self, *key: Any) -> dict[str, Any]:
        """The run with this task, method, rate, seed and hold_out; trained if it is not there."""
        if key not in self.done:
            run = train_once(*key)
            self.done[key] = run
            with self.path.open("a") as sink:
                sink.write(json.dumps(run) + "\n")
            print(run, file=sys.stderr, flush=True)
        return self.done[key]

    def best_rate(self, method: str, kind: str, missing_too: bool = True) -> float | None:
        """The rate with the highest held-out accuracy; of equals the middle-most of the grid."""
        scores = {}
        for rate in METHODS[method].rates:
            key = (SWEPT[kind], method, rate, SWEEP_SEED, True)
            if not missing_too and key not in self.done:
                return None
            scores[rate] = self.get(*key)["accuracy"]
        return max(scores, key=lambda rate: scores[rate])


# The report --------------------------------------------------------------------------------------------------------------


def report(runs: Runs, seeds: list[int]) -> dict[str, Any]:
    """Mean and spread over the seeds, by method and task, of what has run."""
    table: dict[str, Any] = {}
    for method, row in METHODS.items():
        entry: dict[str, Any] = {"label": row.label, "tasks": {}}
        for kind, tasks in TASKS.items():
            rate = runs.best_rate(method, kind, missing_too=False)
            entry[f"rate_{kind}"] = rate
            for task in tasks:
                found = [runs.done.get((task, method, rate, seed, False)) for seed in seeds]
                if all(found):
                    scores = [run["accuracy"] for run in found if run]
                    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                    entry["tasks"][task] = {"mean": statistics.mean(scores), "spread": spread, "scores": scores}
                    entry[f"parameters_{kind}"] = found[0]["parameters"]  # type: ignore[index]
        table[method] = entry
    return table


def show(table: dict[str, Any], console: Console) -> None:
    """Print the table."""
    names = [task for tasks in TASKS.values() for task in tasks]
    view = Table("method", "parameters", "rates", *names, "mean text", "mean image")
    for entry in table.values():
        cells = [
            f"{100 * entry['tasks'][n]['mean']:.1f} ± {100 * entry['tasks'][n]['spread']:.1f}" if n in entry["tasks"] else "-"
            for n in names
        ]
        rates = " / ".join(f"{entry[f'rate_{kind}']:g}" if entry[f"rate_{kind}"] else "-" for kind in TASKS)
        means = [_mean(entry, tasks) for tasks in TASKS.values()]
        view.add_row(
            entry["label"],
            f"{entry.get('parameters_text', 0):,}",
            rates,
            *cells,
            *("-" if m is None else f"{m:.1f}" for m in means),
        )
    console.print(view)


def _mean(entry: dict[str, Any], tasks: list[str]) -> float | None:
    if any(task not in entry["tasks"] for task in tasks):
        return None
    return 100 * statistics.mean(entry["tasks"][task]["mean"] for task in tasks)


def draw(table: dict[str, Any], path: Path) -> None:
    """Accuracy over trained parameters, log axis, one panel for each kind of task."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(11, 4.2))
    for panel, (kind, tasks) in zip(panels, TASKS.items(), strict=True):
        for entry in table.values():
            mean = _mean(entry, tasks)
            if mean is None:
                continue
            seeds = len(next(iter(entry["tasks"].values()))["scores"])
            by_seed = [100 * statistics.mean(entry["tasks"][task]["scores"][i] for task in tasks) for i in range(seeds)]
            spread = statistics.stdev(by_seed) if seeds > 1 else 0.0
            own = entry["label"].startswith(("SVFit", "FLoRA"))
            size = max(1, entry[f"parameters_{kind}"])
            panel.errorbar(size, mean, yerr=spread, fmt="o", capsize=3, color="tab:red" if own else "tab:gray")
            panel.annotate(entry["label"], (size, mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        panel.set_xscale("log")
        panel.set_xlabel("trained parameters beside the head")
        panel.set_ylabel("accuracy, %")
        panel.set_title(f"{kind}: mean of {', '.join(tasks)}", fontsize=9)
        panel.margins(x=0.2, y=0.12)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Run what has not run, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.out / "quality-runs.jsonl")
    if not options.report:
        for kind in options.kinds:
            rates = {method: runs.best_rate(method, kind) for method in options.methods}
            for seed in options.seeds:
                for task in TASKS[kind]:
                    for method in options.methods:
                        runs.get(task, method, rates[method], seed, False)
    table = report(runs, options.seeds)
    show(table, Console(width=170))
    measure.write_json({**measure.environment(torch.device("cpu")), "rows": table}, "quality", options.out)
    draw(table, options.out / "quality.png")


if __name__ == "__main__":
    main()
