"""A real merge: MiniLM fine-tuned on five text tasks, whole and as adapters, merged by every method, three seeds.

    python benchmarks/merge_tasks.py train       # the single-task models, into --folder; goes on where it was stopped
    python benchmarks/merge_tasks.py merge       # every method, its lambda chosen on held-out rows; goes on likewise
    python benchmarks/merge_tasks.py report      # the table and the picture

Each task keeps the head of its own single-task model; the encoder is merged. The score is a merged model's accuracy on a
task's test rows over that of the single-task model. Every merged delta gets the same lambdas to choose from, by the mean
score on held-out rows that no model was trained on; "average" and the base have none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from merge_tasks_models import (
    BACKBONE,
    KINDS,
    ROWS,
    TASKS,
    Task,
    accuracy,
    fisher_information,
    gram_matrices,
    load_task,
    new_model,
    single_task_model,
)
from torch import Tensor, nn

from peft_subspace.merging.methods.emr import modulators
from peft_subspace.merging.methods.memory import merge_state_dicts, merge_tensors

State = Mapping[str, Tensor]
LAMBDAS = (0.2, 0.4, 0.8, 1.6)

# name in the table -> (method, its options); the deltas have weight 1, and lambda scales the merged delta
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "magnitude prune 0.2": ("magnitude_prune", {"density": 0.2}),
    "TIES 0.2 (mergekit)": ("ties", {"density": 0.2}),
    "TIES 0.2 (paper)": ("ties", {"density": 0.2, "semantics": "paper"}),
    "TIES 0.2, summed": ("ties", {"density": 0.2, "normalize": False}),
    "DARE 0.2": ("dare_linear", {"density": 0.2}),
    "DARE-TIES 0.2": ("dare_ties", {"density": 0.2}),
    "DELLA 0.3": ("della_linear", {"density": 0.3, "epsilon": 0.15}),
    "DELLA-TIES 0.3": ("della", {"density": 0.3, "epsilon": 0.15}),
    "breadcrumbs 0.9": ("breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    "breadcrumbs-TIES 0.9": ("breadcrumbs_ties", {"density": 0.9, "gamma": 0.01}),
    "slerp, one by one": ("slerp", {}),
    "nuslerp, one by one": ("nuslerp", {}),
    "multislerp": ("multislerp", {}),
    "karcher": ("karcher", {}),
    "model stock": ("model_stock", {}),
    "SCE 0.2": ("sce", {"select_topk": 0.2}),
    "EMR, unified only": ("emr", {}),
    "TSV-M": ("tsv_m", {}),
    "Iso-C": ("iso_c", {}),
    "Iso-CTS": ("iso_cts", {}),
    "KnOTS-TIES 0.2": ("knots", {"density": 0.2}),
    "Fisher": ("fisher", {}),
    "RegMean": ("regmean", {}),
    "EMR, masks for each task": ("emr", {"masks": True}),
}


def merged_delta(method: str, options: dict[str, Any], base: State, models: Sequence[State], data: Callable[[], Any]) -> State:
    """The merged model less the base, by the tensors of the encoder."""
    names = list(base)
    options = {**options}
    settings: dict[str, Any] = {"semantics": options.pop("semantics", "mergekit"), "names": names}
    options.pop("masks", None)
    if method in ("slerp", "nuslerp"):  # of two: each model is taken in with its share
        found = {}
        for name in names:
            mean = models[0][name]
            for k, model in enumerate(models[1:], 1):
                if method == "slerp":
                    mean = merge_tensors("slerp", mean, [model[name]], None, {"t": 1 / (k + 1)})
                else:
                    mean = merge_tensors("nuslerp", base[name], [mean, model[name]], [k, 1.0])
            found[name] = mean - base[name]
        return found
    statistics_ = data() if method in ("fisher", "regmean") else None
    if method in ("linear", "karcher", "fisher", "regmean"):
        merged = merge_state_dicts(method, None, models, None, options, statistics=statistics_, **settings)
        return {name: merged[name] - base[name] for name in names}
    return merge_state_dicts(method, base, models, None, options, as_delta=True, **settings)


class Scorer:
    """Scores of merged encoders on the tasks, relative to the single-task models."""

    def __init__(self, base: State, tasks: Sequence[Task], singles: Sequence[State]) -> None:
        self.base, self.tasks = base, tasks
        self.models: list[nn.Module] = []
        for task, single in zip(tasks, singles, strict=True):
            model = new_model(task.classes)
            model.load_state_dict(single, strict=False)
            self.models.append(model.eval())
        self.single = {part: self._accuracies(part) for part in ("held_out", "test")}

    def _accuracies(self, part: str) -> list[float]:
        return [accuracy(model, getattr(task, part)) for model, task in zip(self.models, self.tasks, strict=True)]

    def scores(self, deltas: Sequence[State], factor: float, part: str) -> list[float]:
        """Relative accuracies with theta_0 + factor delta_k as the encoder of task k."""
        for model, delta in zip(self.models, deltas, strict=True):
            model.load_state_dict({name: x + factor * delta[name] for name, x in self.base.items()}, strict=False)
        found = self._accuracies(part)
        return [score / single for score, single in zip(found, self.single[part], strict=True)]


def per_task(name: str, delta: State, deltas: Sequence[State]) -> list[State]:
    """The delta that each task uses: the merged one for all, or EMR's masked and scaled ones."""
    if name != "EMR, masks for each task":
        return [delta] * len(deltas)
    masks, scales = modulators(delta, deltas)
    return [{key: s * m[key] * delta[key] for key in delta} for m, s in zip(masks, scales, strict=True)]


def load(name: str, kind: str, seed: int, options: argparse.Namespace) -> Task:
    """The rows of a task for one kind of model and seed."""
    return load_task(name, seed, options.rows or ROWS[kind], options.held_out, options.test, options.tokens)


def run(kind: str, seed: int, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Merge by every method that has no result yet; write each result as it comes."""
    tasks = [load(name, kind, seed, options) for name in TASKS]
    singles = [single_task_model(options.folder, task, kind, seed, options.epochs) for task in tasks]
    start = new_model(2).state_dict()
    base = {n: x.clone() for n, x in start.items() if n.startswith(BACKBONE) and x.is_floating_point()}
    if kind != "full":  # adapters leave all else as it was
        base = {n: x for n, x in base.items() if any(not torch.equal(single[n], x) for single in singles)}
    scorer = Scorer(base, tasks, singles)
    models = [{name: single[name] for name in base} for single in singles]
    deltas = [{name: model[name] - base[name] for name in base} for model in models]
    place = results.setdefault(kind, {}).setdefault(str(seed), {})
    place["single"] = scorer.single["test"]

    def data(method: str) -> list[State]:
        rows = 256 if method == "regmean" else 32
        found = []
        for task, single in zip(tasks, singles, strict=True):
            model = new_model(task.classes)
            model.load_state_dict(single, strict=False)
            part = type(task.train)(task.train.ids[:rows], task.train.labels[:rows])
            found.append(gram_matrices(model, part) if method == "regmean" else fisher_information(model, part))
        return found

    zero = {name: torch.zeros_like(x) for name, x in base.items()}
    for name, (method, given) in {"base": ("", {}), **METHODS}.items():
        if name in place:
            continue
        begun = time.process_time()
        delta = zero if name == "base" else merged_delta(method, given, base, models, lambda m=method: data(m))
        merging = time.process_time() - begun
        each = per_task(name, delta, deltas)
        lambdas = (1.0,) if name in ("base", "average") else LAMBDAS
        held_out = {factor: statistics.mean(scorer.scores(each, factor, "held_out")) for factor in lambdas}
        best = max(held_out, key=held_out.__getitem__)
        place[name] = {
            "lambda": best,
            "held_out": {f"{factor:g}": round(score, 4) for factor, score in held_out.items()},
            "test": [round(score, 4) for score in scorer.scores(each, best, "test")],
            "merge_cpu_s": round(merging, 2),
        }
        write(options, results)
        mean = statistics.mean(place[name]["test"])
        print(
            f"{kind} seed {seed} {name}: {mean:.3f} (lambda {best:g}, merged in {merging:.1f} s)", file=sys.stderr, flush=True
        )


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    path = options.output / "merge-tasks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"train": options.rows or ROWS, "held_out": options.held_out, "test": options.test}
    settings = {"rows": rows, "epochs": options.epochs, "tokens": options.tokens, "lambdas": LAMBDAS, "tasks": TASKS}
    path.with_suffix(".part").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def report(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print a table for each kind of model and draw the picture, of the seeds that are complete."""
    import matplotlib.pyplot as plt

    wanted = {"base", *METHODS}
    complete = {
        kind: {
            seed: found for seed, found in results.get(kind, {}).items() if wanted <= set(found) and int(seed) in options.seeds
        }
        for kind in KINDS
    }
    kinds = [kind for kind in KINDS if complete[kind]]
    if not kinds:
        raise SystemExit("no seed has a result of every method yet: run `merge` first")
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 7.5), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        seeds = complete[kind]
        single = [statistics.mean(seed["single"][k] for seed in seeds.values()) for k in range(len(TASKS))]
        print(f"\n### {kind}, seeds {', '.join(seeds)}\n\n| method | lambda | {' | '.join(TASKS)} | mean (by seed) |")
        print(f"| --- | --- |{' --- |' * (len(TASKS) + 1)}")
        print(f"| single-task accuracy | | {' | '.join(f'{score:.3f}' for score in single)} | |")
        rows = []
        for name in ("base", *METHODS):
            runs = [seed[name] for seed in seeds.values()]
            means = [statistics.mean(run["test"]) for run in runs]
            columns = [statistics.mean(run["test"][k] for run in runs) for k in range(len(TASKS))]
            rows.append((statistics.mean(means), name, runs, means, columns))
        for mean, name, runs, means, columns in sorted(rows, key=lambda row: row[0]):
            lambdas = "/".join(f"{run['lambda']:g}" for run in runs)
            cells = " | ".join(f"{column:.3f}" for column in columns)
            print(f"| {name} | {lambdas} | {cells} | **{mean:.3f}** ({', '.join(f'{m:.3f}' for m in means)}) |")
        rows.sort(key=lambda row: row[0])
        axis.barh([row[1] for row in rows], [row[0] for row in rows], color="#4878a8")
        for at, (_, _, _, means, _) in enumerate(rows):
            axis.plot(means, [at] * len(means), "k.", markersize=4)
        axis.set(title=f"{kind}: accuracy / single-task accuracy", xlim=(min(row[0] for row in rows) - 0.05, 1.02))
    figure.savefig(options.output / "merge-tasks.png", dpi=110)


def main() -> None:
    """Train, merge or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "merge", "report"))
    parser.add_argument("--folder", type=Path, default=Path("outputs/merge-tasks"), help="where the single-task models are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"], choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="of each task to train on; default: 1200 for whole models, 600 for adapters")
    parser.add_argument("--held-out", type=int, default=40, help="rows of each task to choose lambda on")
    parser.add_argument("--test", type=int, default=150, help="rows of each task to report on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48, help="of each text")
    options = parser.parse_args()
    path = options.output / "merge-tasks.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    if options.step == "report":
        return report(options, results)
    for kind in options.kinds:
        for seed in options.seeds:
            if options.step == "merge":
                run(kind, seed, options, results)
                continue
            for name in TASKS:
                task = load(name, kind, seed, options)
                single_task_model(options.folder, task, kind, seed, options.epochs)
    return None


if __name__ == "__main__":
    main()
