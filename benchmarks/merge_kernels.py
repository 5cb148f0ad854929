"""CPU time of the merge methods against mergekit's functions: the same tensors in memory, one thread, rounds interleaved.

    OMP_NUM_THREADS=1 python benchmarks/merge_kernels.py

Times are `time.process_time`; the ratio is taken per round, and its median and range are reported. mergekit is installed by
the extra `oracles`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mergekit.merge_methods as mergekit
import torch

from peft_subspace.merging.methods.memory import merge_tensors

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {}),
    ("ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("della_linear", {"density": 0.5, "epsilon": 0.1}),
    ("della", {"density": 0.5, "epsilon": 0.1}),
    ("breadcrumbs", {"density": 0.5}),
    ("karcher", {}),
    ("model_stock", {}),
    ("sce", {"select_topk": 0.5}),
]


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1732, 5477], help="sides of the square tensors")
    parser.add_argument("--methods", nargs="+", default=[method for method, _ in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if torch.get_num_threads() != 1:
        parser.error("set OMP_NUM_THREADS=1: threads that wait count as CPU time")
    rows: list[dict[str, Any]] = []
    path = options.output / "merge-kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        base = torch.randn(size, size).mul_(0.02)
        models = [base + 0.002 * torch.randn(size, size) for _ in range(3)]
        for method, parameters in (case for case in CASES if case[0] in options.methods):
            based = method not in ("linear", "karcher")
            weights = [0.5] * 3 if method not in ("karcher", "model_stock", "sce") else None
            theirs = {**parameters, **({"weight": weights} if weights else {})}
            given = [base, *models] if based else models

            ours = partial(merge_tensors, method, base if based else None, models, weights, parameters)
            other = partial(mergekit.merge_tensors, given, method, parameters=theirs, base_index=0 if based else None)
            ours(), other()
            pairs = [(seconds(ours), seconds(other)) for _ in range(options.rounds)]
            ratios = [b / max(a, 1e-9) for a, b in pairs]
            nanoseconds = min(a for a, _ in pairs) / size**2 / 3 * 1e9
            row = {"size": size, "method": method, "ns_per_entry_and_model": nanoseconds, "cpu_s": pairs, "ratios": ratios}
            rows.append(row)
            path.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
            print(
                f"| `{method}` | {size} x {size} | {nanoseconds:.1f} | {statistics.median(ratios):.1f} "
                f"({min(ratios):.1f}-{max(ratios):.1f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
