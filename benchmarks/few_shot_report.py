"""Table and picture of `few_shot.py` and `few_shot_images.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {
    "probe": "linear probing",
    "lora": "LoRA r=8",
    "atlas": "aTLAS",
    "none": "16 shots, zero steps",
    "entropy": "16 shots, then entropy",
    "information": "16 shots, then information maximization",
    "ufm": "16 shots, then UFM",
}
AT_TEST_TIME = ("none", "entropy", "information", "ufm")


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task, method and number of shots: the seeds' accuracies, mean and standard deviation."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if not run["hold_out"]:
            found.setdefault((run["task"], run["method"], run["shots"]), []).append(run)
    entries = []
    for (task, method, shots), group in found.items():
        scores = [run["accuracy"] for run in sorted(group, key=lambda run: run["seed"])]
        entries.append({
            "task": task, "method": method, "shots": shots, "rate": group[0]["rate"], "parameters": group[0]["parameters"],
            "accuracies": [round(score, 4) for score in scores], "mean": statistics.mean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
            "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in group),
        })  # fmt: skip
    return entries


def wins(runs: Sequence[dict[str, Any]], method: str, other: str) -> dict[str, int]:
    """Of the runs with the same task, shots and seed: in how many a method is above, level with, below another."""
    scores = {(r["method"], r["task"], r["shots"], r["seed"]): r["accuracy"] for r in runs if not r["hold_out"]}
    counts = {"above": 0, "level": 0, "below": 0}
    for (name, *rest), score in scores.items():
        if name == method and (other, *rest) in scores:
            against = scores[(other, *rest)]
            counts["above" if score > against else "below" if score < against else "level"] += 1
    return counts


def _cell(entry: dict[str, Any] | None) -> str:
    """Mean, deviation and how many seeds there are."""
    if entry is None:
        return "-"
    deviation, seeds = entry["deviation"], len(entry["accuracies"])
    return f"{100 * entry['mean']:.1f}" + (f" ± {100 * deviation:.1f} ({seeds})" if seeds > 1 else " (1)")


def report(runs: Sequence[dict[str, Any]], folder: Path, name: str = "few-shot") -> None:
    """Print the table, write `few-shot.json`, draw `few-shot.png`."""
    entries = summary(runs)
    pairs = [
        ("atlas", "probe"),
        ("atlas", "lora"),
        ("lora", "probe"),
        ("entropy", "none"),
        ("information", "none"),
        ("ufm", "none"),
        ("ufm", "entropy"),
    ]
    compared = {f"{LABELS[a]} / {LABELS[b]}": wins(runs, a, b) for a, b in pairs}
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    table = Table("method", "shots", *tasks)
    rows = dict.fromkeys((entry["method"], entry["shots"]) for entry in sorted(entries, key=lambda e: e["shots"]))
    at = {(entry["task"], entry["method"], entry["shots"]): entry for entry in entries}
    for method, shots in sorted(rows, key=lambda row: (row[0] in AT_TEST_TIME, row[1], list(LABELS).index(row[0]))):
        cells = [_cell(at.get((task, method, shots))) for task in tasks]
        table.add_row(LABELS[method], str(shots), *cells)
    Console(width=100).print(table)
    compared = {pair: counts for pair, counts in compared.items() if any(counts.values())}
    for pair, counts in compared.items():
        print(f"{pair}: {counts['above']} above, {counts['level']} level, {counts['below']} below")
    (folder / f"{name}.json").write_text(json.dumps({"entries": entries, "compared": compared}, indent=1) + "\n")
    draw(at, tasks, folder / f"{name}.png")


def draw(at: dict[tuple[Any, ...], dict[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Accuracy against shots for every task, and before and after adaptation at test time."""
    from matplotlib.figure import Figure

    adapted = [method for method in AT_TEST_TIME if any(key[1] == method for key in at)]
    panels = len(tasks) + bool(adapted)
    figure = Figure(figsize=(3.4 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, task in zip(axes, tasks, strict=False):
        for method in ("probe", "lora", "atlas"):
            found = sorted((e for (t, m, _), e in at.items() if (t, m) == (task, method)), key=lambda e: e["shots"])
            heights, spread = [100 * e["mean"] for e in found], [100 * (e["deviation"] or 0.0) for e in found]
            panel.errorbar([e["shots"] for e in found], heights, spread, marker="o", capsize=2, label=LABELS[method])
        panel.set(title=task, xscale="log", xlabel="shots of each class", ylabel="accuracy, %")
        panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes[0].legend()
    for number, method in enumerate(adapted):
        found = [at[task, method, 16] for task in tasks if (task, method, 16) in at]
        places = [place + 0.27 * (number - 1) for place in range(len(found))]
        axes[-1].bar(
            places,
            [100 * e["mean"] for e in found],
            0.25,
            yerr=[100 * (e["deviation"] or 0.0) for e in found],
            label=LABELS[method],
        )
    if adapted:
        axes[-1].set(title="at test time, unlabelled", ylabel="accuracy, %")
        axes[-1].set_xticks(range(len(tasks)), tasks)
        axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
