"""Composed weights side by side: forward and backward of aTLAS, Concrete, full fine-tuning, and the official codes' ways.

    python benchmarks/composition.py --layers 4 --rounds 5
    python benchmarks/composition.py --quick

No optimizer: full fine-tuning would spend as much on its own as on the model. All rows run in one process on the same frozen
Llama-like model with all linear layers of its blocks as blocks; the order rotates and every ratio is made within a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import DTYPES, Spread, Stopwatch, Workload
from peft_subspace import AtlasConfig, ConcreteConfig

VECTORS, RANK = 16, 16


def write_vectors(workload: Workload, folder: Path) -> None:
    """Task-vector files for the targeted weights: `dense-T` with values of 1e-3, `lora-T` of rank 16."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: workload.model.get_submodule(name).weight.shape for name in workload.shape.targets(workload.model)}
    for t in range(VECTORS):
        dense, factors = {}, {}
        for name, (rows, columns) in shapes.items():
            dense[f"{name}.weight"] = 1e-3 * torch.randn(rows, columns, generator=generator)
            factors[f"{name}.weight::A"] = 1e-2 * torch.randn(RANK, columns, generator=generator)
            factors[f"{name}.weight::B"] = 1e-2 * torch.randn(rows, RANK, generator=generator)
        for kind, tensors in (("dense", dense), ("lora", factors)):
            metadata = {"format": "pt", "peft_subspace": "task_vector"}
            save_file(tensors, folder / f"{kind}-{t}.safetensors", metadata=metadata)


class Functional(nn.Module):
    """The official formula: every parameter is `theta_0 + sum(tau_t * lambda_t)` anew in each call, by `functional_call`."""

    def __init__(self, model: nn.Module, files: list[Path]) -> None:
        super().__init__()
        self.model = model
        self.vectors = [load_file(file) for file in files]
        self.coefficients = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.zeros(len(files))) for name in self.vectors[0]}
        )

    def forward(self, **batch: Tensor) -> Any:
        parameters = dict(self.model.named_parameters())
        state = {}
        for name in self.vectors[0]:
            numbers = self.coefficients[name.replace(".", "/")]
            pairs = zip(self.vectors, numbers, strict=True)
            state[name] = parameters[name] + sum(vector[name] * number for vector, number in pairs)
        return torch.func.functional_call(self.model, state, (), batch)


def adapter(config: Any, kind: str, count: int, **fields: Any) -> Callable[[Workload, nn.Module, Path], nn.Module]:
    """A model with an adapter on the first vectors of a kind."""

    def attach(workload: Workload, model: nn.Module, folder: Path) -> nn.Module:
        pool = {f"v{t}": str(folder / f"{kind}-{t}.safetensors") for t in range(count)}
        return get_peft_model(model, config(pool=pool, target_modules=workload.shape.targets(model), **fields))

    return attach


atlas, concrete = partial(adapter, AtlasConfig), partial(adapter, ConcreteConfig)


class FunctionalMask(Functional):
    """The official Concrete: a relaxed Bernoulli sample of a mask over its mean, by autograd's own operations."""

    def __init__(self, model: nn.Module, files: list[Path]) -> None:
        super().__init__(model, files)
        self.coefficients.requires_grad_(False)
        self.logits = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.zeros_like(value)) for name, value in self.vectors[0].items()}
        )

    def forward(self, **batch: Tensor) -> Any:
        parameters = dict(self.model.named_parameters())
        state = {}
        for name in self.vectors[0]:
            logits = self.logits[name.replace(".", "/")]
            mask = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=logits).rsample()
            mask = mask / mask.mean()
            state[name] = parameters[name] + sum(0.3 * (mask * vector[name]) for vector in self.vectors)
        return torch.func.functional_call(self.model, state, (), batch)


def full(workload: Workload, model: nn.Module, folder: Path) -> nn.Module:
    """The targeted weights themselves are trained."""
    for name in workload.shape.targets(model):
        model.get_submodule(name).weight.requires_grad_(True)
    return model


def functional(workload: Workload, model: nn.Module, folder: Path) -> nn.Module:
    """The official way with four vectors."""
    return Functional(model, [folder / f"dense-{t}.safetensors" for t in range(4)])


def mask(count: int) -> Callable[[Workload, nn.Module, Path], nn.Module]:
    """The official way of Concrete."""
    return lambda workload, model, folder: FunctionalMask(model, [folder / f"dense-{t}.safetensors" for t in range(count)])


ROWS: dict[str, tuple[str, Callable[[Workload, nn.Module, Path], nn.Module]]] = {
    "full": ("full fine-tuning of the same weights", full),
    "full-again": ("A/A row: its range is the noise of this run", full),
    "base": ("the frozen base; its eval is what eval is compared with", lambda workload, model, folder: model),
    "atlas-4": ("4 dense vectors in float32", atlas("dense", 4)),
    "atlas-16": ("16 dense vectors in float32", atlas("dense", 16)),
    "atlas-4-float16": ("4 dense vectors in float16 with a scale", atlas("dense", 4, vector_dtype="float16")),
    "atlas-16-disk": ("16 dense vectors, read from their files", atlas("dense", 16, placement="disk")),
    "atlas-4-partition": ("4 dense vectors in 10 parts", atlas("dense", 4, granularity="partition", partition=10)),
    "atlas-lora-16": ("16 LoRA vectors of rank 16", atlas("lora", 16)),
    "concrete-4": ("Concrete on 4 dense vectors, lambda fixed", concrete("dense", 4)),
    "concrete-16": ("Concrete on 16 dense vectors, lambda fixed", concrete("dense", 16)),
    "concrete-4-layer": (
        "Concrete on 4 dense vectors, lambda of each layer trained",
        concrete("dense", 4, learn_coefficients="layer"),
    ),
    "concrete-4-row": ("Concrete on 4 dense vectors, a logit a row", concrete("dense", 4, granularity="row")),
    "concrete-lora-4-rank": ("Concrete on directions of 4 LoRA vectors", concrete("lora", 4, granularity="rank")),
    "mask-4": ("Concrete on 4 dense vectors as its official code computes it", mask(4)),
    "mask-16": ("Concrete on 16 dense vectors as its official code computes it", mask(16)),
    "functional-4": ("4 dense vectors, composed as in the official code", functional),
}


class Row:
    """One way of training, on its own copy of the model (frozen weights are shared)."""

    def __init__(self, name: str, workload: Workload, folder: Path) -> None:
        torch.manual_seed(1)
        self.batch = workload.batch
        model = workload.fresh(share=not name.startswith("full"))
        head = model.get_submodule(workload.shape.head).requires_grad_(False)
        self.model = ROWS[name][1](workload, model, folder).train()
        head.requires_grad_(True)

    def loss(self) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def step(self) -> None:
        """Forward and backward."""
        self.loss().backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def evaluate(self) -> None:
        """One forward without a graph; the mode is set once, before it is timed."""
        self.model(**self.batch)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all rows."""
    device, workload = torch.device("cpu"), _workload(args)
    write_vectors(workload, folder)
    rows = {name: Row(name, workload, folder) for name in args.methods}
    found: dict[str, dict[str, Any]] = {name: {"note": ROWS[name][0], "step_ms": [], "eval_ms": []} for name in rows}
    for name, row in rows.items():
        found[name]["bytes_saved"] = measure.bytes_saved(row.model, row.loss)
        row.step()
        found[name]["peak_bytes"] = _peak(name, args, folder) if args.memory else None
    for number in range(args.rounds):
        for key, body in (("step_ms", Row.step), ("eval_ms", Row.evaluate)):
            for row in rows.values():
                row.model.train(key == "step_ms")
                if key == "eval_ms":
                    row.evaluate()  # composes, where a weight is kept
            for name in measure.rotated(list(rows), number):
                watch = Stopwatch(device)
                with watch.running():
                    for _ in range(args.steps):
                        body(rows[name])
                found[name][key].append(watch.ms / args.steps)
    for row in found.values():
        row["step_to_full"] = asdict(Spread.of_ratio(row["step_ms"], found["full"]["step_ms"]))
        row["eval_to_base"] = asdict(Spread.of_ratio(row["eval_ms"], found["base"]["eval_ms"]))
        row["bytes_to_full"] = row["bytes_saved"] / found["full"]["bytes_saved"]
    settings = {"rounds": args.rounds, "steps": args.steps, "layers": args.layers, "quick": args.quick, "dtype": args.dtype}
    entries = sum(workload.model.get_submodule(name).weight.numel() for name in workload.shape.targets(workload.model))
    return {**measure.environment(device), "settings": settings, "entries": entries, "rows": found}


def _workload(args: argparse.Namespace) -> Workload:
    sizes = measure.pick_sizes("llama", args.quick, layers=args.layers, width=None, length=None, batch=None)
    return measure.make_workload("llama", sizes, DTYPES[args.dtype], torch.device("cpu"))


def _peak(name: str, args: argparse.Namespace, folder: Path) -> int | None:
    """Growth of the resident set over two steps, in a process of its own whose vectors are loaded."""
    options = ["--layers", str(args.layers), "--dtype", args.dtype, "--peak-of", name, "--folder", str(folder)]
    value = measure.run_alone(__file__, *options, *(["--quick"] if args.quick else []))
    return None if value == "None" else int(value)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=" ".join(f"{key}={value}" for key, value in report["settings"].items()), title_justify="left")
    for column in ("row", "step ms", "step / full", "eval / base", "saved MB", "saved / full", "peak MB", "peak B / entry"):
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for name, row in report["rows"].items():
        peak = row["peak_bytes"]
        table.add_row(
            name,
            f"{Spread.of(row['step_ms']).median:.1f}",
            Spread(**row["step_to_full"]).text(),
            Spread(**row["eval_to_base"]).text(),
            f"{row['bytes_saved'] / 1e6:.2f}",
            f"{row['bytes_to_full']:.3f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            "-" if peak is None else f"{peak / report['entries']:.1f}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print and write; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=None, help="blocks of the model; 12, and 1 with --quick")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(ROWS), help="full and base are needed")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="peak memory, one process per row")
    parser.add_argument("--quick", action="store_true", help="a tiny model, no memory processes")
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; benchmarks/results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.layers = args.layers or (1 if args.quick else 12)
    args.memory = not args.quick if args.memory is None else args.memory
    torch.set_num_threads(1)
    if args.peak_of:
        row = Row(args.peak_of, _workload(args), args.folder)
        print(measure.resident_growth(lambda: [row.step() for _ in range(2)]))
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, Path(scratch))
    console = Console(width=140)
    show(report, console)
    path = measure.write_json(report, args.name or f"composition-{args.dtype}{'-quick' * args.quick}", args.out)
    console.print(f"Written: {path.name}")
    return report


if __name__ == "__main__":
    main()
