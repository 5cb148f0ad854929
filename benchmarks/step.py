"""Train steps side by side: FLoRA, PEFT's tuners, the floors, and FLoRA as its official code computes it.

    python benchmarks/step.py --model llama --rounds 7 --methods flora,lora,dora
    python benchmarks/step.py --quick

A step is forward, backward and AdamW. All methods run in one process on the same frozen weights with the same targets,
head, batch and optimizer; the order rotates from round to round and every ratio is made within a round. See README.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import peft
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import DTYPES, SHAPES, Shape, Spread, Stopwatch, Workload
from peft_subspace import FloraConfig, SvfitConfig

# Providers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a provider is asked for.

    Attributes:
        shape: the kind of model.
        targets: full names of the layers to adapt.
        r: rank of a linear layer's or a convolution's channels.
        r_spatial: rank of a convolution's kernel modes, for methods that have one.
    """

    shape: Shape
    targets: list[str]
    r: int
    r_spatial: int


@dataclass(frozen=True)
class Provider:
    """One row of the table: how to put a method on a frozen model.

    Attributes:
        attach: changes the model in place (or wraps it) and leaves its own parameters trainable.
        note: what the row is, with any setting that is not `r`.
        conv: whether the method knows convolutions.
    """

    attach: Callable[[nn.Module, Request], nn.Module]
    note: str
    conv: bool = True


def _nothing(model: nn.Module, request: Request) -> nn.Module:
    return model


def _gradient_to_embeddings(model: nn.Module, request: Request) -> nn.Module:
    model.get_submodule(request.shape.embeddings).register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def _with_peft(make_config: Callable[[Request], peft.PeftConfig]) -> Callable[[nn.Module, Request], nn.Module]:
    return lambda model, request: peft.get_peft_model(model, make_config(request))


class OfficialFlora(nn.Module):
    """FLoRA in the order of the official code: the dense dW is built in every call and applied as a second base layer.

    Written from the formula `dW = s G x_0 U_in x_1 U_out x_2 U_kh x_3 U_kw`; modes are [in, out, kernel...].
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, r: int, r_spatial: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        out_features, in_features, *kernel = base.weight.shape
        sizes = [in_features, out_features, *kernel]
        ranks = [min(r, in_features), min(r, out_features), *(min(r_spatial, k) for k in kernel)]
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.core = nn.Parameter(torch.zeros(ranks, **options))
        self.factors = nn.ParameterList(
            torch.randn(size, rank, **options) * (2 * rank) ** -0.5 for size, rank in zip(sizes, ranks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.core
        for factor in self.factors:  # contracts the first axis and appends the new one: the order stays
            delta = torch.tensordot(delta, factor, dims=([0], [1]))
        delta = (self.scale * delta.transpose(0, 1)).to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return self.base(x) + F.linear(x, delta)
        return self.base(x) + F.conv2d(x, delta, None, self.base.stride, self.base.padding, self.base.dilation)


def _official_flora(model: nn.Module, request: Request) -> nn.Module:
    for name in request.targets:
        parent, _, child = name.rpartition(".")
        base: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, OfficialFlora(base, request.r, request.r_spatial))
    return model


LORA = _with_peft(lambda q: peft.LoraConfig(r=q.r, lora_alpha=q.r, target_modules=q.targets))

# A further method is one more row.
PROVIDERS = {
    "lora": Provider(LORA, "PEFT LoRA: what ratios are made to"),
    "lora-again": Provider(LORA, "A/A row: LoRA a second time; its range is the noise of this run"),
    "floor-1": Provider(_nothing, "only the head trains"),
    "floor-2": Provider(_gradient_to_embeddings, "frozen base, gradient down to the first block's input"),
    "flora": Provider(
        _with_peft(lambda q: FloraConfig(r=q.r, r_spatial=q.r_spatial, target_modules=q.targets)),
        "FLoRA of this package",
    ),
    "flora-official": Provider(_official_flora, "FLoRA with dW built in every forward, as in the official code"),
    **{
        f"svfit-{r}": Provider(
            _with_peft(lambda q, r=r: SvfitConfig(r=r, target_modules=q.targets)),
            f"SVFit of this package, r={r}, whatever --r is",
        )
        for r in (16, 64, 256, "full")
    },
    "dora": Provider(
        _with_peft(lambda q: peft.LoraConfig(r=q.r, lora_alpha=q.r, use_dora=True, target_modules=q.targets)), "PEFT DoRA"
    ),
    "loha": Provider(_with_peft(lambda q: peft.LoHaConfig(r=q.r, alpha=q.r, target_modules=q.targets)), "PEFT LoHa"),
    "lokr": Provider(_with_peft(lambda q: peft.LoKrConfig(r=q.r, alpha=q.r, target_modules=q.targets)), "PEFT LoKr"),
    "oft": Provider(
        _with_peft(lambda q: peft.OFTConfig(r=0, oft_block_size=32, target_modules=q.targets)),
        "PEFT OFT, blocks of 32 (its default), whatever r is",
    ),
    "vera": Provider(
        _with_peft(lambda q: peft.VeraConfig(r=256, target_modules=q.targets)),
        "PEFT VeRA, r=256 (its default), whatever r is",
        conv=False,
    ),
}
ALWAYS = ["lora", "lora-again", "floor-2"]  # a ratio without these three says nothing


# Running -------------------------------------------------------------------------------------------------------------


class Trainee:
    """One method on its own copy of the model, with its optimizer."""

    def __init__(self, provider: Provider, workload: Workload, r: int, r_spatial: int) -> None:
        torch.manual_seed(1)
        self.batch = workload.batch
        self.device = next(iter(workload.batch.values())).device
        model = workload.fresh()
        head = model.get_submodule(workload.shape.head)
        request = Request(workload.shape, workload.shape.targets(model), r, r_spatial)
        head.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = provider.attach(model, request).train()
        self.adapter_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        head.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def loss(self) -> Tensor:
        """One forward."""
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def step(self) -> Tensor:
        """Forward, backward, update."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def peak_on_gpu(self) -> int | None:
        """Peak of one step over what is held before it; None on a CPU, where only a fresh process can tell."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - before


def peak_in_fresh_process(method: str, argv: list[str]) -> int | None:
    """Growth of the resident set over two steps, in a process that does nothing else. None if it cannot be read."""
    value = measure.run_alone(__file__, *argv, "--peak-of", method)
    return None if value == "None" else int(value)


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measure all methods; see the module's docstring."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    sizes = measure.pick_sizes(
        args.model, args.quick, layers=args.layers, width=args.width, length=args.length, batch=args.batch
    )
    workload = measure.make_workload(args.model, sizes, DTYPES[args.dtype], device)
    names, left_out = choose(args.methods, workload.shape.conv)
    trainees = {name: Trainee(PROVIDERS[name], workload, args.r, args.r_spatial) for name in names}

    rows: dict[str, dict[str, Any]] = {}
    for name, trainee in trainees.items():
        saved = measure.bytes_saved(trainee.model, trainee.loss)
        first_loss = float(trainee.step())
        trainee.step()  # warm: off the zero start, with all of the optimizer's state
        peak = trainee.peak_on_gpu()
        if args.memory and device.type == "cpu":
            peak = peak_in_fresh_process(name, argv)
        rows[name] = {
            "note": PROVIDERS[name].note,
            "adapter_parameters": trainee.adapter_parameters,
            "bytes_saved": saved,
            "peak_bytes": peak,
            "first_loss": first_loss,
            "step_ms": [],
        }
    for round_number in range(args.rounds):
        for name in measure.rotated(names, round_number):
            watch = Stopwatch(device)
            with watch.running():
                for _ in range(args.steps):
                    loss = trainees[name].step()
            if not torch.isfinite(loss):
                raise RuntimeError(f"{name}: the loss is {float(loss)}; a diverged run measures nothing.")
            rows[name]["step_ms"].append(watch.ms / args.steps)
    add_ratios(rows)
    return {
        **measure.environment(device),
        "settings": {
            "model": args.model, **asdict(sizes), "targets": len(workload.shape.targets(workload.model)), "r": args.r,
            "r_spatial": args.r_spatial, "dtype": args.dtype, "rounds": args.rounds, "steps": args.steps,
            "clock": "CUDA events" if device.type == "cuda" else "process CPU time",
        },
        "left_out": left_out,
        "rows": rows,
    }  # fmt: skip


def choose(methods: str, conv: bool) -> tuple[list[str], list[str]]:
    """Methods to run in table order, and those that cannot (no convolutions).

    Raises:
        ValueError: an unknown method.
    """
    wanted = list(PROVIDERS) if methods == "all" else methods.split(",")
    unknown = sorted(set(wanted) - set(PROVIDERS))
    if unknown:
        raise ValueError(f"--methods names {unknown}. Accepted: all, {', '.join(PROVIDERS)}.")
    names = [name for name in PROVIDERS if name in wanted or name in ALWAYS]
    left_out = [name for name in names if conv and not PROVIDERS[name].conv]
    return [name for name in names if name not in left_out], left_out


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Add time ratios (per round: median, low, high) and byte ratios, to LoRA and to the official FLoRA if it ran."""
    for row in rows.values():
        for base in ("lora", "flora-official"):
            if base in rows:
                row[f"time_to_{base}"] = asdict(Spread.of_ratio(row["step_ms"], rows[base]["step_ms"]))
                row[f"bytes_to_{base}"] = row["bytes_saved"] / rows[base]["bytes_saved"]
        row["bytes_over_floor_2"] = row["bytes_saved"] - rows["floor-2"]["bytes_saved"]


# Showing -------------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table and the sentences that compare FLoRA."""
    settings = report["settings"]
    table = Table(title=" ".join(f"{key}={value}" for key, value in settings.items()), title_justify="left")
    for column in ("method", "adapter params", "step ms", "time / LoRA", "saved MB", "over floor 2", "saved / LoRA", "peak MB"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, row in report["rows"].items():
        peak = row["peak_bytes"]
        table.add_row(
            name,
            f"{row['adapter_parameters']:,}",
            f"{Spread.of(row['step_ms']).median:.1f}",
            Spread(**row["time_to_lora"]).text(),
            f"{row['bytes_saved'] / 1e6:.2f}",
            f"{row['bytes_over_floor_2'] / 1e6:+.2f}",
            f"{row['bytes_to_lora']:.3f}",
            "-" if peak is None else f"{peak / 1e6:.1f}",
        )
    console.print(table)
    for name in report["left_out"]:
        console.print(f"{name} is left out: it knows no convolutions.")
    base_loss = report["rows"]["floor-2"]["first_loss"]
    for name, row in report["rows"].items():
        if abs(row["first_loss"] - base_loss) > 0.01 * abs(base_loss):
            console.print(f"{name} does not start at the base: first loss {row['first_loss']:.3f}, base {base_loss:.3f}.")
    again = Spread(**report["rows"]["lora-again"]["time_to_lora"])
    console.print(f"A/A: LoRA against itself {again.text(3)}. No claim smaller than this.")
    flora = report["rows"].get("flora")
    if flora and "time_to_flora-official" in flora:
        time = Spread(**flora["time_to_flora-official"])
        extra = flora["bytes_over_floor_2"] / report["rows"]["flora-official"]["bytes_over_floor_2"]
        console.print(
            f"flora against flora-official: {1 / time.median:.2f}x as fast ({1 / time.high:.2f}-{1 / time.low:.2f}); saved for "
            f"backward: {_less(flora['bytes_to_flora-official'])} in all, {_less(extra)} over floor 2."
        )


def _less(ratio: float) -> str:
    return f"{100 * (1 - ratio):.0f} % less"


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--methods", default="all", help=f"all, or some of {','.join(PROVIDERS)}")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--r-spatial", type=int, default=2, help="rank of FLoRA's kernel modes")
    parser.add_argument("--rounds", type=int, help="7; 2 with --quick")
    parser.add_argument("--steps", type=int, help="steps per method and round; 2, 1 with --quick")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="CPU: peak memory, one process per method")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 rounds, no memory processes")
    for name in ("layers", "width", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own; length: tokens, or pixels of a side")
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; benchmarks/results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.steps = args.steps or (1 if args.quick else 2)
    args.memory = not args.quick if args.memory is None else args.memory
    args.name = args.name or f"step-{args.model}-{args.dtype}-{torch.device(args.device).type}{'-quick' * args.quick}"
    return args


def print_peak(args: argparse.Namespace) -> None:
    """What `peak_in_fresh_process` starts: one method alone."""
    torch.set_num_threads(args.threads)
    sizes = measure.pick_sizes(
        args.model, args.quick, layers=args.layers, width=args.width, length=args.length, batch=args.batch
    )
    workload = measure.make_workload(args.model, sizes, DTYPES[args.dtype], torch.device(args.device))
    trainee = Trainee(PROVIDERS[args.peak_of], workload, args.r, args.r_spatial)
    print(measure.resident_growth(lambda: [trainee.step() for _ in range(2)]))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print and write; returns the report."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.peak_of:
        print_peak(args)
        return {}
    report = run(args, argv)
    console = Console(width=140)
    show(report, console)
    path = measure.write_json(report, args.name, args.out)
    console.print(f"Written: {path.name}")
    return report


if __name__ == "__main__":
    main()
