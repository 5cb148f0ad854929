"""Bytes that a train step sends, measured by process and set against the formulas of docs/scaling.md.

    python benchmarks/traffic.py

Starts two processes (gloo) that train every method with DDP and with FSDP2 (each block a unit), and counts the bytes of every
collective operation of the third step as torch dispatches it. A ring sends of an all-reduce over B bytes 2 B (p - 1) / p from
each process, of an all-gather to B bytes or a reduce-scatter of B bytes B (p - 1) / p; gloo's own headers and the way it
takes are not counted. Exact, whatever else the machine does; there are no times here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.further import ALL
from benchmarks.step import Trainee

METHODS = "lora,flora,svfit-16,pela,atlas-lora,atlas"
PROCESSES = 2


class Traffic(TorchDispatchMode):
    """Bytes of the collective operations that are called within: what a ring sends from this process, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = function.name().partition(".")[0]
        if kind.startswith("c10d::") and kind not in ("c10d::barrier", "c10d::monitored_barrier_"):
            part = (PROCESSES - 1) / PROCESSES
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            whole = max(sizes) if "base" in kind else sum(sizes)  # the whole and this process's share, or the tensors
            self.sent[kind] = self.sent.get(kind, 0.0) + whole * part * (2 if "allreduce" in kind else 1)
        return function(*args, **(kwargs or {}))


def bytes_of(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def wrapped(model: Any, way: str) -> nn.Module:
    """The model for one of the ways."""
    if way == "ddp":
        ignored = [name for name, _ in model.named_buffers()]  # as accelerate and Trainer leave the adapters' buffers out
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in [*(block for found in lists for block in found), model]:
        fully_shard(module, mesh=mesh)
    whole: nn.Module = model
    return whole


def count(method: str, way: str, sizes: measure.Sizes) -> dict[str, Any]:
    """What one process sends in a step, and what the formula says."""
    trainee = Trainee(ALL[method], measure.make_workload("llama", sizes, torch.float32, torch.device("cpu")), 16, 2)
    trained = bytes_of(p for p in trainee.model.parameters() if p.requires_grad)
    every = bytes_of(trainee.model.parameters())
    in_blocks = bytes_of(p for name, p in trainee.model.named_parameters() if ".layers." in name)
    trainee.model = wrapped(trainee.model, way)
    trainee.optimizer = torch.optim.AdamW([p for p in trainee.model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):  # DDP orders its buckets anew after the first
        trainee.step()
    with Traffic() as traffic:
        trainee.step()
    part = (PROCESSES - 1) / PROCESSES
    # the outermost unit is not cut again between forward and backward
    formula = 2 * trained * part if way == "ddp" else part * (in_blocks + every + trained)
    sent = sum(traffic.sent.values())
    return {
        "trained_bytes": trained,
        "model_bytes": every,
        "by_operation": traffic.sent,
        "sent_bytes": sent,
        "formula_bytes": formula,
        "error": formula / sent - 1,
    }


def work(args: argparse.Namespace) -> None:
    """In one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == PROCESSES
    sizes = measure.pick_sizes("llama", False, layers=args.layers, width=args.width, length=32, batch=2)
    rows = {f"{method}, {way}": count(method, way, sizes) for method in args.methods.split(",") for way in ("ddp", "fsdp2")}
    if dist.get_rank() == 0:
        Path(args.work).write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Start the processes, print and write."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="one block of width 64")
    parser.add_argument("--name", default="traffic-fp32-2-processes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.layers, args.width = 1, 64
    if args.work:
        work(args)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        options = ["--methods", args.methods, "--layers", str(args.layers), "--width", str(args.width), "--work", str(path)]
        done = subprocess.run(
            [sys.executable, *torchrun, str(Path(__file__).resolve()), *options], capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"The processes that count failed:\n{done.stderr}")
        rows = json.loads(path.read_text())
    table = Table("method, way", "trained, bytes", "model, bytes", "sent by a process", "formula", "formula / sent - 1")
    for name, row in rows.items():
        numbers = [f"{row[key]:,.0f}" for key in ("trained_bytes", "model_bytes", "sent_bytes", "formula_bytes")]
        table.add_row(name, *numbers, f"{row['error']:+.2%}")
    Console(width=120).print(table)
    settings = {"layers": args.layers, "width": args.width, "processes": PROCESSES}
    report = {**measure.environment(torch.device("cpu")), "settings": settings, "rows": rows}
    print("Written:", measure.write_json(report, args.name, args.out).name)
    return report


if __name__ == "__main__":
    main()
