"""How a train step grows with width, tokens, rank and task vectors, and how far a linear model of it is from points left out.

    python benchmarks/scaling.py

One block of the llama-like model per point. A step is modelled as t = c0 + c1 F_base + c2 F_adapter (aTLAS: T w and w, entries
of T dense vectors and of the weights), fitted by least squares of the relative error on all points but the widest, which are
predicted. CPU time, minimum of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import peft
import torch

from benchmarks import measure
from benchmarks.further import atlas
from benchmarks.measure import Stopwatch
from benchmarks.step import Provider, Trainee
from peft_subspace import FloraConfig, SvfitConfig

WIDTHS, TOKENS, SIZES = (256, 512, 768), (64, 256), {"lora": (8, 64), "flora": (8, 64), "svfit": (8, 64), "atlas": (2, 8)}
ATTACH: dict[str, Any] = {
    "lora": lambda model, q: peft.get_peft_model(model, peft.LoraConfig(r=q.r, target_modules=q.targets)),
    "flora": lambda model, q: peft.get_peft_model(model, FloraConfig(r=q.r, target_modules=q.targets)),
    "svfit": lambda model, q: peft.get_peft_model(model, SvfitConfig(r=q.r, target_modules=q.targets)),
    "atlas": lambda model, q: atlas(q.r)(model, q),
}


def features(method: str, width: int, tokens: int, size: int, base: int) -> list[float]:
    """1, flops of the base (forward and to the input), flops of the adapter or entries of its vectors."""
    sides = base / width  # sum of the other sides of all targets
    adapter = size * base if method == "atlas" else 6 * tokens * size * (width + sides)
    return [1.0, 4.0 * tokens * base, float(adapter), *([float(base)] if method == "atlas" else [])]


def measured(method: str, width: int, tokens: int, size: int, rounds: int) -> dict[str, Any]:
    """One point."""
    sizes = measure.pick_sizes("llama", False, layers=1, width=width, length=tokens, batch=1)
    workload = measure.make_workload("llama", sizes, torch.float32, torch.device("cpu"))
    trainee = Trainee(Provider(ATTACH[method], ""), workload, size, 2)
    trainee.step()
    times = []
    for _ in range(rounds):
        watch = Stopwatch(torch.device("cpu"))
        with watch.running():
            trainee.step()
        times.append(watch.ms)
    targets = workload.shape.targets(workload.model)
    base = sum(workload.model.get_submodule(name).weight.numel() for name in targets)
    point = {"width": width, "tokens": tokens, "size": size, "ms": min(times)}
    return {**point, "features": features(method, width, tokens, size, base)}


def fitted(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Coefficients from the narrower points, and the relative errors there and at the widest."""
    known = [point for point in points if point["width"] < max(WIDTHS)]
    rows = torch.tensor([[f / p["ms"] for f in p["features"]] for p in known], dtype=torch.float64)
    scale = rows.abs().amax(0)
    solution = (
        torch.linalg.lstsq(rows / scale, torch.ones(len(known), 1, dtype=torch.float64), driver="gelsd").solution[:, 0] / scale
    )

    def error(point: dict[str, Any]) -> float:
        guess = sum(c * f for c, f in zip(solution.tolist(), point["features"], strict=True))
        return guess / point["ms"] - 1

    held = [error(point) for point in points if point["width"] == max(WIDTHS)]
    return {"coefficients": solution.tolist(), "errors": [error(point) for point in known], "held_out_errors": held}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="scaling-fp32-cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = {}
    for method, sizes in SIZES.items():
        points = [measured(method, *point, args.rounds) for point in itertools.product(WIDTHS, TOKENS, sizes)]
        rows[method] = {"points": points, **fitted(points)}
        for point in points:
            print(method, point["width"], point["tokens"], point["size"], f"{point['ms']:.1f}")
        print(method, "held out:", [f"{e:+.0%}" for e in rows[method]["held_out_errors"]], flush=True)
    report = {**measure.environment(torch.device("cpu")), "settings": {"rounds": args.rounds}, "rows": rows}
    print("Written:", measure.write_json(report, args.name, args.out).name)
    return report


if __name__ == "__main__":
    main()
