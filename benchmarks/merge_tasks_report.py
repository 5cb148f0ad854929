"""The tables and the picture of `merge_tasks.py`."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.merge_tasks_models import KINDS, ROWS, TASKS

FILE = "merge-tasks.json"
CLASSIC = ("average", "task arithmetic", "TIES 0.2 (mergekit)")  # in the order that the papers report, worst first


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    path = options.output / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"train": options.rows or ROWS, "held_out": options.held_out, "test": options.test}
    settings = {"rows": rows, "epochs": options.epochs, "tokens": options.tokens, "tasks": TASKS}
    path.with_suffix(".part").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def report(options: argparse.Namespace, results: dict[str, Any], methods: Sequence[str]) -> None:
    """Print a table for each kind of model, of the methods that all seeds have, and draw them.

    Where some seeds have more methods than others, a second table has all of these methods on those seeds alone.
    """
    import matplotlib.pyplot as plt

    complete = {
        kind: {
            seed: found
            for seed, found in results.get(kind, {}).items()
            if {"base", *CLASSIC} <= set(found) and int(seed) in options.seeds
        }
        for kind in KINDS
    }
    kinds = [kind for kind in KINDS if complete[kind]]
    if not kinds:
        raise SystemExit("no seed has results of the base, average, task arithmetic and TIES yet: run `merge` first")
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 7.5), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        seeds = complete[kind]
        known = [name for name in ("base", *methods) if any(name in found for found in seeds.values())]
        _table(kind, seeds, _rows(seeds, [name for name in known if all(name in found for found in seeds.values())]))
        whole = {seed: found for seed, found in seeds.items() if set(known) <= set(found)}
        if whole and len(whole) < len(seeds):
            _table(f"{kind}, all methods", whole, _rows(whole, known))
        rows = _rows(whole or seeds, known)
        axis.barh([row["name"] for row in rows], [row["mean"] for row in rows], color="#4878a8")
        for at, row in enumerate(rows):
            axis.plot(row["by_seed"], [at] * len(row["by_seed"]), "k.", markersize=4)
        points = [score for row in rows for score in row["by_seed"]]
        title = f"{kind}: accuracy / single-task accuracy, seeds {', '.join(whole or seeds)}"
        axis.set(title=title, xlim=(min(points) - 0.05, max(1.0, *points) + 0.02))
    figure.savefig(options.output / "merge-tasks.png", dpi=110)


def _rows(seeds: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The methods from the worst to the best, each by the seeds that have it."""
    rows = []
    for name in names:
        runs = [seed[name] for seed in seeds.values() if name in seed]
        by_seed = [statistics.mean(run["test"]) for run in runs]
        tasks = [statistics.mean(run["test"][k] for run in runs) for k in range(len(TASKS))]
        lambdas = "/".join(f"{run['lambda']:.2g}" for run in runs)
        rows.append({"name": name, "mean": statistics.mean(by_seed), "by_seed": by_seed, "tasks": tasks, "lambda": lambdas})
    return sorted(rows, key=lambda row: row["mean"])


def _table(kind: str, seeds: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    single = [statistics.mean(seed["single"][k] for seed in seeds.values()) for k in range(len(TASKS))]
    print(f"\n### {kind}, seeds {', '.join(seeds)}\n\n| method | lambda | {' | '.join(TASKS)} | mean (by seed) |")
    print(f"| --- | --- |{' --- |' * (len(TASKS) + 1)}")
    print(f"| single-task accuracy | | {' | '.join(f'{score:.3f}' for score in single)} | |")
    for row in rows:
        cells = " | ".join(f"{score:.3f}" for score in row["tasks"])
        by_seed = ", ".join(f"{score:.3f}" for score in row["by_seed"])
        print(f"| {row['name']} | {row['lambda']} | {cells} | **{row['mean']:.3f}** ({by_seed}) |")
    means = {row["name"]: row["by_seed"] for row in rows}
    print("\nThe classic order, seed by seed:")
    for number, seed in enumerate(seeds):
        scores = [means[name][number] for name in CLASSIC]
        holds = all(low < high for low, high in itertools.pairwise(scores))
        text = ", ".join(f"{name} {score:.3f}" for name, score in zip(CLASSIC, scores, strict=True))
        print(f"- seed {seed}: {'holds' if holds else 'does not hold'} ({text})")
