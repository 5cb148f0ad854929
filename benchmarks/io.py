"""Making, saving, loading and merging an adapter: our methods beside PEFT's LoRA, as ratios made in one run.

    python benchmarks/io.py --rounds 7
    python benchmarks/io.py --quick

Every operation starts from a base of its own that was copied before the clock started. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, and for `io` in the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # saving and loading must not ask anyone

import peft
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.measure import DTYPES, SHAPES, Spread, Stopwatch, Workload
from peft_subspace import FloraConfig, SvfitConfig

T = TypeVar("T")
OPERATIONS = ("init", "save", "load", "merge")
ConfigMaker = Callable[[list[str], int], peft.PeftConfig]


def _lora(targets: list[str], r: int) -> peft.PeftConfig:
    return peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets)


def _flora(targets: list[str], r: int) -> peft.PeftConfig:
    return FloraConfig(r=r, target_modules=targets)


def _svfit(targets: list[str], r: int) -> peft.PeftConfig:
    return SvfitConfig(r=r, target_modules=targets)


def _svfit_full(targets: list[str], r: int) -> peft.PeftConfig:
    return SvfitConfig(r="full", target_modules=targets)


def _pissa(targets: list[str], r: int) -> peft.PeftConfig:
    return peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", target_modules=targets)


# A further method is one more row. "lora-again" is the A/A row. "svfit" has its basis in the file, "svfit-full" makes it again
# on loading, as PiSSA does.
METHODS: dict[str, ConfigMaker] = {
    "lora": _lora,
    "lora-again": _lora,
    "flora": _flora,
    "svfit": _svfit,
    "svfit-full": _svfit_full,
    "pissa": _pissa,
}


def measure_once(make_config: ConfigMaker, workload: Workload, r: int) -> tuple[dict[str, Stopwatch], int]:
    """Time one life of an adapter: get_peft_model, save_pretrained, from_pretrained, merge_and_unload.

    Returns:
        A stopwatch per operation, and the bytes of `adapter_model.safetensors`.
    """
    gc.collect()  # the models of the last call are cycles: one of these a call is enough
    watches = {name: Stopwatch(torch.device("cpu")) for name in OPERATIONS}

    def timed(operation: str, body: Callable[[], T]) -> T:
        with warnings.catch_warnings(), watches[operation].running():
            warnings.simplefilter("ignore")
            return body()

    base, other_base = workload.fresh(share=False), workload.fresh(share=False)
    config = make_config(workload.shape.targets(base), r)
    with tempfile.TemporaryDirectory() as folder:
        model = timed("init", lambda: peft.get_peft_model(base, config))
        timed("save", lambda: model.save_pretrained(folder))
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        loaded = timed("load", lambda: peft.PeftModel.from_pretrained(other_base, folder))
        timed("merge", loaded.merge_and_unload)
    return watches, size


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods, in an order that rotates; one round before the first is thrown away."""
    torch.set_num_threads(args.threads)
    sizes = measure.pick_sizes(args.model, args.quick)
    workload = measure.make_workload(args.model, sizes, DTYPES[args.dtype], torch.device("cpu"))
    rows: dict[str, dict[str, Any]] = {
        name: {"file_bytes": 0, **{operation: {"cpu_ms": [], "wall_ms": []} for operation in OPERATIONS}} for name in METHODS
    }
    for round_number in range(-1, args.rounds):
        for name in measure.rotated(list(METHODS), round_number):
            watches, rows[name]["file_bytes"] = measure_once(METHODS[name], workload, args.r)
            for operation, watch in watches.items():
                if round_number >= 0:
                    rows[name][operation]["cpu_ms"].append(watch.cpu_ms)
                    rows[name][operation]["wall_ms"].append(watch.wall_ms)
    for row in rows.values():
        row["file_to_lora"] = row["file_bytes"] / rows["lora"]["file_bytes"]
        for operation in OPERATIONS:
            for clock in ("cpu", "wall"):
                times, base = row[operation][f"{clock}_ms"], rows["lora"][operation][f"{clock}_ms"]
                row[operation][f"{clock}_to_lora"] = asdict(Spread.of_ratio(times, base))
    settings = {"model": args.model, **asdict(sizes), "r": args.r, "dtype": args.dtype, "rounds": args.rounds}
    settings["targets"] = len(workload.shape.targets(workload.model))
    return {**measure.environment(torch.device("cpu")), "settings": settings, "rows": rows}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    title = " ".join(f"{key}={value}" for key, value in report["settings"].items())
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    table.add_column("method")
    for column in ("CPU ms", "CPU / LoRA", "wall ms", "wall / LoRA"):
        table.add_column(column, justify="right", no_wrap=True)
    for operation in OPERATIONS:
        for name, row in report["rows"].items():
            figures = row[operation]
            table.add_row(
                operation,
                name,
                f"{Spread.of(figures['cpu_ms']).median:.1f}",
                Spread(**figures["cpu_to_lora"]).text(),
                f"{Spread.of(figures['wall_ms']).median:.1f}",
                Spread(**figures["wall_to_lora"]).text(),
            )
        table.add_section()
    console.print(table)
    for name, row in report["rows"].items():
        console.print(f"{name}: {row['file_bytes']:,} bytes on disk, {row['file_to_lora']:.3f} of LoRA's.")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="7; 2 with --quick")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 rounds")
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; benchmarks/results")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.name = args.name or f"io-{args.model}-{args.dtype}{'-quick' * args.quick}"
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print and write; returns the report."""
    args = parse(sys.argv[1:] if argv is None else argv)
    report = run(args)
    console = Console(width=120)
    show(report, console)
    path = measure.write_json(report, args.name, args.out)
    console.print(f"Written: {path.name}")
    return report


if __name__ == "__main__":
    main()
