"""Few labels, or none: aTLAS with the vectors of other tasks, against LoRA and linear probing on MiniLM, three seeds.

    python benchmarks/few_shot.py                # the single-task models, if they are missing, the runs, table and picture
    python benchmarks/few_shot.py --report       # the table and the picture of what has run so far

The pool of a task is the whole models of the four other text tasks (leave-one-out; `merge_tasks_models.py` trains them). Every
method reads the mean of the last layer's tokens, times 10, through a linear head that starts as the linear probe of the k shots
of each class: zero steps of LoRA or aTLAS are linear probing. Head and adapter are then trained together.

At test time the head of 16 shots is kept, and the coefficients are learned on the unlabelled test rows themselves, by entropy,
by information maximization or by UFM (weak view: the text; strong view: a fifth of its tokens left out). Learning rates are
chosen on held-out rows of one task with another seed. Runs are written one by one, so an interrupted benchmark goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import few_shot_report as reporting
from benchmarks.few_shot_report import AT_TEST_TIME
from benchmarks.merge_tasks_models import TASKS, Rows, Task, assets, load_task, new_model, single_task_model
from peft_subspace import AtlasConfig
from peft_subspace.training import objectives

REPORTED, SHOTS, SWEPT, SWEEP_SEED = ("trec", "newsgroups", "wordnet"), (1, 2, 4, 8, 16), "trec", 100
RATES = {
    "probe": (0.0,),
    "lora": (1e-3, 3e-3, 1e-2),
    "atlas": (1e-2, 3e-2, 1e-1, 3e-1),
    "none": (0.0,),
    "entropy": (1e-3, 3e-3, 1e-2, 3e-2),
    "information": (1e-3, 3e-3, 1e-2, 3e-2),
    "ufm": (1e-3, 3e-3, 1e-2, 3e-2),
}
BY_LOGITS = {"entropy": objectives.entropy_loss, "information": objectives.information_maximization_loss}
LEARNED = ("probe", "lora", "atlas")
HEAD_RATE, STEPS, BATCH, TOKENS, ROWS, HELD_OUT, TEST = 1e-2, 20, 16, 32, 1200, 150, 200
DROPPED = 0.2  # share of the tokens that the strong view lacks


class Classifier(nn.Module):
    """The mean of the tokens' last states, normalised and times 10, through a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[rows, 384]`, in float32."""
        with torch.autocast("cpu", torch.bfloat16):
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return 10 * F.normalize((states.float() * mask[..., None]).sum(1), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(ids, mask))


def shots(rows: Rows, classes: int, count: int) -> Rows:
    """The first `count` rows of each class (all that there are, of a rare one)."""
    chosen = [i for c in range(classes) for i in [i for i, label in enumerate(rows.labels) if label == c][:count]]
    return type(rows)([rows.ids[i] for i in chosen], [rows.labels[i] for i in chosen])


@torch.no_grad()
def encoded(model: Classifier, rows: Rows) -> tuple[Tensor, Tensor]:
    """Features and labels of all rows."""
    found = [(model.features(ids, mask), labels) for ids, mask, labels in rows.batches(64)]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def probe(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Fit a head to frozen features: cross-entropy and 5e-4 |W|^2, by L-BFGS, from zero."""
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + 5e-4 * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]


def forever(rows: Rows, shuffle: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches, in a new order each time round."""
    while True:
        yield from rows.batches(BATCH, shuffle)


class Bench:
    """One task and seed: its rows, its probe and the pool of the others, whose vectors are held once."""

    matrices: Any = ("query", "key", "value", "dense")  # what LoRA adapts

    def __init__(self, folder: Path, task: str, seed: int) -> None:
        self.seed, self.held = seed, None
        self.task, self.pool, self.base_path = self.open(folder, task, min(seed, 2))  # there are models of seeds 0 to 2
        self.base = self.classifier()

    def open(self, folder: Path, task: str, number: int) -> tuple[Task, dict[str, str], str]:
        """The rows, the models of the other tasks, and where their base is."""
        pool = {name: str(_single(folder, name, number) / "encoder") for name in TASKS if name != task}
        return load_task(task, self.seed, ROWS, HELD_OUT, TEST, TOKENS), pool, assets.model_path("minilm")

    def classifier(self) -> Classifier:
        """The base with a head."""
        encoder: Any = new_model(self.task.classes).bert
        return Classifier(encoder.eval(), self.task.classes)

    def model(self, method: str, count: int) -> Classifier:
        """The base with an adapter that changes nothing yet, and the linear probe of `count` shots a class for a head."""
        torch.manual_seed(self.seed)
        model = self.classifier()
        encoder: Any = model.encoder
        probe(model.head, *encoded(self.base, shots(self.task.train, self.task.classes, count)))
        if method == "lora":
            model.encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=self.matrices))
        elif method not in ("probe", "none"):
            config = AtlasConfig(pool=self.pool, base=self.base_path)
            model.encoder = self.held = get_peft_model(encoder, config)  # held: the next one takes its vectors from memory
        return model

    def run(self, method: str, count: int, rate: float, hold_out: bool) -> dict[str, Any]:
        """Learn from `count` shots a class, or on the unlabelled rows; the accuracy on the rows that are asked for."""
        start = time.process_time()
        asked = self.task.held_out if hold_out else self.task.test
        model = self.model(method, count)
        if method in AT_TEST_TIME[1:]:
            adapt(model, method, asked, rate, self.seed)
        elif method not in ("probe", "none"):
            fit(model, shots(self.task.train, self.task.classes, count), rate, self.seed)
        features, labels = encoded(model, asked)
        changed = [] if method in ("probe", "none") else [p for p in model.encoder.parameters() if p.requires_grad]
        return {
            "task": self.task.name, "method": method, "shots": count, "rate": rate, "seed": self.seed, "hold_out": hold_out,
            "accuracy": float((model.head(features).argmax(1) == labels).float().mean()),
            "parameters": sum(p.numel() for p in changed),
            "cpu_seconds": round(time.process_time() - start, 1),
        }  # fmt: skip


def _single(folder: Path, task: str, seed: int) -> Path:
    path = folder / f"full-{task}-{seed}"
    if path.exists():
        return path
    return single_task_model(folder, load_task(task, seed, 800, 30, 100, 64), "full", seed, 2)


def _optimizer(model: Classifier, rate: float, head_rate: float) -> tuple[Any, Any]:
    """AdamW without decay, cosine to zero; coefficients and factors at `rate`."""
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": rate}] + ([{"params": model.head.parameters(), "lr": head_rate}] if head_rate else [])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / STEPS))


def _step(loss: Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()


def fit(model: Classifier, rows: Rows, rate: float, seed: int) -> None:
    """Cross-entropy on the shots, head and adapter together."""
    optimizer, schedule = _optimizer(model, rate, HEAD_RATE)
    for _, (ids, mask, labels) in zip(range(STEPS), forever(rows, random.Random(seed)), strict=False):
        _step(F.cross_entropy(model(ids, mask), labels), optimizer, schedule)


def adapt(model: Classifier, method: str, rows: Rows, rate: float, seed: int) -> None:
    """Learn coefficients on unlabelled rows; `rows.labels` are numbers of rows here, and no labels are looked at."""
    numbered = Rows(rows.ids, list(range(len(rows.ids))))
    optimizer, schedule = _optimizer(model, rate, 0.0)
    generator = torch.Generator().manual_seed(seed)
    trusted, labels = _trusted(model, numbered)
    for step, (ids, mask, places) in zip(range(STEPS), forever(numbered, random.Random(seed)), strict=False):
        if method in BY_LOGITS:
            loss = BY_LOGITS[method](model(ids, mask))
        else:
            with torch.no_grad():
                weak = model(ids, mask)
            kept = mask * (torch.rand(mask.shape, generator=generator) >= DROPPED)
            kept[:, 0] = 1  # the token that every text begins with
            threshold = objectives.threshold_at(step / STEPS)
            loss = objectives.ufm_loss(
                weak, model(ids, kept), threshold, temperature=0.5, trusted=trusted[places], labels=labels[places]
            )
        _step(loss, optimizer, schedule)


@torch.no_grad()
def _trusted(model: Classifier, numbered: Rows) -> tuple[Tensor, Tensor]:
    """The trusted set of the model as it starts, by number of the row."""
    features, places = encoded(model, numbered)
    probabilities = torch.empty(len(places), model.head.out_features)
    probabilities[places] = model.head(features).softmax(1)
    return objectives.trusted_set(probabilities)


class Runs:
    """What has run, in a file of lines; what has not is run by a `Bench`, and rates are chosen on one task."""

    def __init__(self, path: Path, folder: Path, bench: type[Bench] = Bench, swept: str = SWEPT) -> None:
        self.path, self.folder, self.make, self.swept = path, folder, bench, swept
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self._key(run): run for run in map(json.loads, lines)}
        self.bench: Bench | None = None

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in ("task", "method", "shots", "rate", "seed", "hold_out"))

    def get(self, task: str, method: str, count: int, rate: float, seed: int, hold_out: bool = False) -> dict[str, Any]:
        """This run; made if it is not there."""
        key = (task, method, count, rate, seed, hold_out)
        if key not in self.done:
            if self.bench is None or (self.bench.task.name, self.bench.seed) != (task, seed):
                self.bench = self.make(self.folder, task, seed)
            self.done[key] = self.bench.run(method, count, rate, hold_out)
            with self.path.open("a") as sink:
                sink.write(json.dumps(self.done[key]) + "\n")
            print(self.done[key], file=sys.stderr, flush=True)
        return self.done[key]

    def best_rate(self, method: str) -> float:
        """The rate with the highest held-out accuracy: at 4 shots, or of the adaptation at test time."""
        count = 16 if method in AT_TEST_TIME else 4
        if len(RATES[method]) == 1:
            return RATES[method][0]
        scores = {r: self.get(self.swept, method, count, r, SWEEP_SEED, True)["accuracy"] for r in RATES[method]}
        return max(scores, key=lambda rate: scores[rate])


@dataclass(frozen=True)
class Plan:
    """What one benchmark of this kind runs, and under which name its results stand."""

    name: str
    folder: str
    bench: type[Bench]
    tasks: tuple[str, ...]
    shots: tuple[int, ...]
    swept: str
    at_test_time: tuple[str, ...] = ()

    def run(self, doc: str | None, arguments: Sequence[str] | None = None) -> None:
        """Read the command line, run what is missing, then report."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--folder", type=Path, default=Path(self.folder), help="where the single-task models are")
        parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        parser.add_argument("--tasks", nargs="+", default=list(self.tasks), choices=dict.fromkeys((*self.tasks, self.swept)))
        parser.add_argument("--shots", type=int, nargs="+", default=list(self.shots))
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--report", action="store_true", help="only report")
        options = parser.parse_args(arguments)
        transformers.utils.logging.disable_progress_bar()
        for folder in (options.out, options.folder):
            folder.mkdir(parents=True, exist_ok=True)
        runs = Runs(options.out / f"{self.name}-runs.jsonl", options.folder, self.bench, self.swept)
        if not options.report:
            rates = {method: runs.best_rate(method) for method in (*LEARNED, *self.at_test_time)}
            for seed, task in itertools.product(options.seeds, options.tasks):
                for count, method in itertools.product(options.shots, LEARNED):
                    runs.get(task, method, count, rates[method], seed)
                for method in self.at_test_time:
                    runs.get(task, method, 16, rates[method], seed)
        reporting.report(list(runs.done.values()), options.out, self.name)


PLAN = Plan("few-shot", "outputs/merge-tasks", Bench, REPORTED, SHOTS, SWEPT, AT_TEST_TIME)

if __name__ == "__main__":
    PLAN.run(__doc__)
