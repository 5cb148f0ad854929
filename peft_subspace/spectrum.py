"""The singular values of a model's weights: how many of them hold how much, as a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters.svfit import SvfitConfig, SvfitModel, matrix_shape
from .base import SubspaceConfig
from .base.targets import find_targets, resolve_targets
from .functional.svd import rank_for_energy, spectrum

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class WeightSpectrum:
    """Singular values of one weight.

    Attributes:
        name: of the weight in the model.
        shape: of the matrix that is decomposed; a convolution's is `[out, in * kernel]` (of one group).
        values: all min(m, n) of them, descending, `[*, k]`; a stack (groups, experts) has its own of each.
        ranks: share of the squared norm -> how many of the leading values hold it.
    """

    name: str
    shape: tuple[int, int]
    values: Tensor
    ranks: dict[float, int] = field(default_factory=dict)

    @property
    def full(self) -> int:
        """How many there are."""
        return self.values.shape[-1]


def weight_spectra(
    model: nn.Module, target_modules: Any = "all-linear", energies: Sequence[float] = (0.9, 0.99)
) -> list[WeightSpectrum]:
    """Decompose weights of a model, without vectors. For choosing `r` or `energy` of SVFit.

    Args:
        model: a model, with or without adapters; nothing of it changes.
        target_modules: as in `SvfitConfig`: names, a regular expression, "all-linear", "all-conv", or None for PEFT's default.
        energies: shares of the squared norm, in (0, 1].

    Returns:
        One entry for each weight, in the model's order.

    Raises:
        ValueError: a name that matches nothing, or an energy out of range.

    Cost: an eigendecomposition in float64 of the smaller Gram matrix for each weight: 0.1 s at 768 wide on one CPU core, which
    grows with the cube.
    """
    for energy in energies:
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy!r} is a share of the squared norm: it must be in (0, 1].")
    return [
        WeightSpectrum(
            name,
            (matrix.shape[-2], matrix.shape[-1]),
            values,
            {e: rank_for_energy(values, e) or values.shape[-1] for e in energies},
        )
        for name, matrix in _matrices(model, target_modules)
        for values in [spectrum(matrix)]
    ]


@torch.no_grad()
def _matrices(model: nn.Module, target_modules: Any) -> Iterator[tuple[str, Tensor]]:
    config: SubspaceConfig = SvfitConfig(target_modules=target_modules)
    resolve_targets(config, model)
    for name, geometries in find_targets(model, config, SvfitModel._check_target_module_exists).items():
        for weight, geometry in geometries.items():
            stack, rows, columns = matrix_shape(geometry)
            whole = geometry.canonical(SvfitModel.base_weight(model, name, weight))
            yield f"{name}.{weight}", whole.reshape(*stack, rows, columns)


def spectrum_table(spectra: Sequence[WeightSpectrum]) -> Table:
    """A table for `rich.print`: per weight its size, its largest and smallest value, and r at each energy."""
    from rich.table import Table

    energies = list(spectra[0].ranks) if spectra else []
    table = Table("weight", "matrix", "largest", "smallest", *(f"r at {100 * energy:g} %" for energy in energies))
    for one in spectra:
        ranks = [f"{one.ranks[energy]} ({100 * one.ranks[energy] / one.full:.0f} %)" for energy in energies]
        sizes = " x ".join(map(str, [*one.values.shape[:-1], *one.shape]))
        table.add_row(one.name, sizes, f"{float(one.values.max()):.3g}", f"{float(one.values.min()):.2g}", *ranks)
    return table


def draw_spectrum(spectra: Sequence[WeightSpectrum], path: str | os.PathLike[str]) -> None:
    """Draw the energy that the leading values hold, one line a weight, lines of one kind of layer in one colour.

    Args:
        spectra: what `weight_spectra` gives.
        path: of the picture; its ending chooses the format. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    kinds = list(dict.fromkeys(_kind(one.name) for one in spectra))
    for one in spectra:
        held = one.values.square().reshape(-1, one.full).sum(0).cumsum(0)
        share = torch.arange(1, one.full + 1) / one.full
        color = f"C{kinds.index(_kind(one.name)) % 10}"
        axes.plot(100 * share, 100 * held / held[-1].clamp_min(1e-300), color=color, alpha=0.6, linewidth=1)
    for index, kind in enumerate(kinds[:10]):
        axes.plot([], [], color=f"C{index}", label=kind)
    for energy in spectra[0].ranks if spectra else ():
        axes.axhline(100 * energy, color="gray", linewidth=0.6, linestyle=":")
    axes.set(xlabel="leading singular values, % of all", ylabel="share of the squared norm, %", xlim=(0, 100), ylim=(0, 101))
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(os.fspath(path), dpi=130)


def _kind(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(part for part in parts[-2:] if not part.isdigit())
