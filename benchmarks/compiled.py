"""Train steps eager and compiled by inductor, side by side in one run.

    python benchmarks/compiled.py --layers 2 --length 256 --rounds 5

Every method has two rows, on the same frozen weights and batch; ratios are made within a round (see README.md). The time of the
first compiled step, which compiles, is given by itself. `fullgraph=True`: a graph break would be an error.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

from benchmarks import measure
from benchmarks.further import ALL
from benchmarks.measure import DTYPES, Spread, Stopwatch
from benchmarks.step import Trainee

METHODS = "lora,lora-again,flora,svfit-16,pela,atlas-lora,atlas"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows; see the module's docstring."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sizes = measure.pick_sizes("llama", args.quick, layers=args.layers, width=args.width, length=args.length, batch=args.batch)
    workload = measure.make_workload("llama", sizes, DTYPES[args.dtype], device)
    trainees, rows = {}, {}
    torch._dynamo.config.recompile_limit = 64  # all rows share the code of nn.Module's call, each with a graph of its own
    for name in args.methods.split(","):
        for kind in ("eager", "compiled"):
            trainee = trainees[name, kind] = Trainee(ALL[name], workload, args.r, 2)
            if kind == "compiled":
                trainee.model.compile(backend=args.backend, fullgraph=True)
            before, start = counters["stats"]["unique_graphs"], time.perf_counter()
            first_loss = float(trainee.step())
            seconds = time.perf_counter() - start
            trainee.step()
            graphs = counters["stats"]["unique_graphs"] - before
            rows[f"{name}, {kind}"] = {"first_loss": first_loss, "first_step_s": seconds, "graphs": graphs, "step_ms": []}
    for number in range(args.rounds):
        for name, kind in measure.rotated(list(trainees), number):
            watch = Stopwatch(device)
            with watch.running():
                trainees[name, kind].step()
            rows[f"{name}, {kind}"]["step_ms"].append(watch.ms)
    for name, row in rows.items():
        method, _, kind = name.partition(", ")
        for key, other in (("to_eager", f"{method}, eager"), ("to_lora", f"lora, {kind}")):
            pairs = zip(row["step_ms"], rows[other]["step_ms"], strict=True)
            row[key] = vars(Spread.of([mine / theirs for mine, theirs in pairs]))
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "name")}
    return {**measure.environment(device), "settings": settings, "rows": rows}


def show(report: dict[str, Any], console: Console) -> None:
    """A table of the ratios."""
    table = Table("row", "time / eager", "time / LoRA of the kind", "graphs", "first step, s")
    for name, row in report["rows"].items():
        spreads = [Spread(**row[key]).text() for key in ("to_eager", "to_lora")]
        table.add_row(name, *spreads, str(row["graphs"]), f"{row['first_step_s']:.1f}")
    console.print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print and write; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    for name in ("layers", "width", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--name", default="compiled-llama-fp32-cpu", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; benchmarks/results")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    report = run(args)
    show(report, Console(width=140))
    print("Written:", measure.write_json(report, args.name, args.out).name)
    return report


if __name__ == "__main__":
    main()
