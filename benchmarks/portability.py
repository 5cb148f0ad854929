"""What becomes of an SVFit adapter without its basis when the base's bits change, on MiniLM's weights.

    python benchmarks/portability.py

For every query, value and feed-forward weight: a random update delta_i ~ s_i N(0, 0.1) is loaded onto the weight as it is
rounded to another format. Shown are the relative change of dW if the basis were simply made again (what PiSSA, PSOFT and others
do), the change with the basis in the file, and for how many weights the check refuses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import assets
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import measure
from peft_subspace.functional import svd


def to_int8(weight: Tensor) -> Tensor:
    """Rounded to 8 bits, absmax of each row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def to_nf4(weight: Tensor) -> Tensor:
    """Rounded to 16 levels at the quantiles of a normal distribution, absmax of blocks of 64, like bitsandbytes' nf4."""
    levels = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 16))
    levels = levels / levels.abs().max()
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (levels[(blocks / scale)[..., None].sub(levels).abs().argmin(-1)] * scale).reshape(weight.shape)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "the same bits": lambda w: w,
    "float64 and back": lambda w: w.double().float(),
    "float16": lambda w: w.half().float(),
    "bfloat16": lambda w: w.bfloat16().float(),
    "int8 rows": to_int8,
    "nf4 blocks": to_nf4,
}


def update(weight: Tensor, values: Tensor, basis: Tensor, delta: Tensor) -> Tensor:
    """dW = U (delta / s) U^T W in float64."""
    basis = basis.double()
    return basis.T @ ((delta / values.double())[:, None] * (basis @ weight.double()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 384])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = load_file(Path(assets.model_path("minilm")) / "model.safetensors")
    names = [n for n in tensors if n.endswith(("query.weight", "value.weight", "output.dense.weight")) and "encoder" in n]
    weights = {n: tensors[n].float() for n in names if tensors[n].shape[0] <= tensors[n].shape[1]}
    rows = []
    for r in options.ranks:
        for label, round_to in FORMATS.items():
            changes, kept, refused = [], [], 0
            for weight in weights.values():
                mine = svd.leading_singular(weight, r, "left")
                delta = mine.values * 0.1 * torch.randn(r, dtype=torch.float64)
                other = round_to(weight)
                theirs = svd.leading_singular(other, r, "left")
                wanted = update(weight, mine.values, mine.basis, delta)
                again = update(other, mine.values, theirs.basis, delta)
                from_file = update(other, mine.values, mine.basis.half(), delta)
                changes.append(float((again - wanted).norm() / wanted.norm()))
                kept.append(float((from_file - wanted).norm() / wanted.norm()))
                found = (mine.values.float(), svd.probe(mine.basis).float())
                refused += svd.differs(theirs.values, svd.probe(theirs.basis), *found) is not None
            rows.append(
                {
                    "r": r, "format": label, "made_again": [min(changes), statistics.median(changes), max(changes)],
                    "from_file": max(kept), "refused": refused, "weights": len(weights),
                }
            )  # fmt: skip
    table = Table("r", "the base, rounded to", "dW changes by: least, median, most", "with the basis in the file", "refused")
    for row in rows:
        low, middle, high = row["made_again"]
        table.add_row(
            str(row["r"]), row["format"], f"{low:.0e}  {middle:.0e}  {high:.0e}", f"{row['from_file']:.0e}",
            f"{row['refused']} of {row['weights']}",
        )  # fmt: skip
    Console(width=130).print(table)
    measure.write_json({**measure.environment(torch.device("cpu")), "rows": rows}, "portability", options.out)


if __name__ == "__main__":
    main()
