"""What PELA's low-rank layers cost beside the dense ones: a forward, and a training step of everything, process CPU time.

    python benchmarks/pela_step.py --rounds 5            # llama-like, 12 blocks x 768, 512 tokens, all seven linears
    python benchmarks/pela_step.py --quick               # a tiny shape, seconds

The base is fully fine-tuned (all parameters, AdamW); a compressed model trains its factors. "base again" is the base measured
twice: no claim is smaller than its spread. Also init (the decomposition), and a step of the distillation and of the penalty.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.measure import Spread, Stopwatch, Workload
from peft_subspace import PelaConfig
from peft_subspace.training import Healing

ROWS: dict[str, tuple[float | None, dict[str, Any] | None]] = {  # name -> (compression, objective)
    "base": (None, None),
    "base again": (None, None),
    "PELA c=1.5": (1.5, None),
    "PELA c=2": (2.0, None),
    "PELA c=3": (3.0, None),
    "PELA c=2, distillation": (2.0, {}),
    "PELA c=2, distillation, penalty": (2.0, {"gamma": 1.0}),
}


class Trainee:
    """A row: a model of its own and its optimizer."""

    def __init__(self, workload: Workload, compression: float | None, objective: dict[str, Any] | None) -> None:
        self.batch = workload.batch
        self.healing = None if objective is None else Healing(**objective)
        model = workload.fresh(share=False)
        start = time.process_time()
        if compression is None:
            self.model: Any = model.requires_grad_(True)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = get_peft_model(
                    model, PelaConfig(compression=compression, target_modules=workload.shape.targets(model), train_norms=True)
                )
            model.get_submodule(workload.shape.head).requires_grad_(True)
        self.init_seconds = time.process_time() - start
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def forward(self) -> None:
        """One forward without gradients."""
        self.model.eval()
        with torch.no_grad():
            self.model(**self.batch)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.train()
        loss = self.model(**self.batch).loss if self.healing is None else self.healing(self.model, self.batch)[0]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def bytes_saved(self) -> int:
        """Kept from forward to backward."""
        return measure.bytes_saved(self.model.train(), lambda: self.model(**self.batch).loss)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows, their order rotated between rounds."""
    device = torch.device("cpu")
    sizes = measure.pick_sizes(options.model, options.quick)
    workload = measure.make_workload(options.model, sizes, torch.float32, device)
    trainees = {name: Trainee(workload, *row) for name, row in ROWS.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in ROWS}
    for trainee in trainees.values():
        trainee.step()
    for number in range(options.rounds):
        for name in measure.rotated(list(ROWS), number):
            for kind in ("forward", "step"):
                watch = Stopwatch(device)
                with watch.running():
                    getattr(trainees[name], kind)()
                times[name][kind].append(watch.ms)
    base = times["base"]
    rows = {
        name: {
            "trained": trainee.trained,
            "init_seconds": trainee.init_seconds,
            "bytes_saved": trainee.bytes_saved(),
            **{kind: asdict(Spread.of_ratio(times[name][kind], base[kind])) for kind in ("forward", "step")},
        }
        for name, trainee in trainees.items()
    }
    settings = {"model": options.model, **asdict(sizes), "rounds": options.rounds}
    return {**measure.environment(device), "settings": settings, "rows": rows}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("row", "trained", "init, s", "forward / base", "step / base", "saved for backward / base")
    base = report["rows"]["base"]["bytes_saved"]
    for name, row in report["rows"].items():
        ratios = [Spread(**row[kind]).text() for kind in ("forward", "step")]
        table.add_row(name, f"{row['trained']:,}", f"{row['init_seconds']:.1f}", *ratios, f"{row['bytes_saved'] / base:.3f}")
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[n for n, s in measure.SHAPES.items() if not s.conv], default="llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = run(options)
    show(report, Console(width=150))
    measure.write_json(report, f"pela-step-{options.model}", options.out)


if __name__ == "__main__":
    main()
