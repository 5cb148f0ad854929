"""Tables and the picture of `peft-subspace inspect`."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..functional.stacked import rank_for_energy
from ..task_vectors.compare import Comparison, cosines_of
from ..task_vectors.errors import OutputError, RecipeError

MOST_BLOCKS = 40  # rows of the table


def show(found: Comparison) -> None:
    """Print what was measured."""
    console = Console()
    summary = Table(title="Task vectors", title_justify="left")
    for column in ("model", "norm", "norm / base", "changed entries"):
        summary.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for name, norm, relative, density in zip(found.names, found.norms, found.relative, found.density, strict=True):
        summary.add_row(name, f"{norm:.4g}", *((f"{relative:.3g}", f"{density:.1%}") if found.base else "--"))
    console.print(summary)
    if len(found.names) > 1:
        table = Table(title="Cosines", title_justify="left")
        for column in ("", *(str(number + 1) for number in range(len(found.names)))):
            table.add_column(column, justify="right")
        for number, row in enumerate(found.cosines.tolist()):
            table.add_row(f"{number + 1} {found.names[number]}", *(f"{value:.3f}" for value in row))
        console.print(table)
        console.print(f"Signs differ at {found.sign_conflict:.1%} of the entries that at least two models change.")
    console.print(_blocks(found))
    if found.spectra:
        console.print(_spectra(found))


def _blocks(found: Comparison) -> Table:
    table = Table(title="Blocks", title_justify="left")
    table.add_column("block", overflow="fold")
    for number in range(len(found.names)):
        table.add_column(f"norm {number + 1}" + (" / base" if found.base else ""), justify="right")
    if len(found.names) > 1:
        table.add_column("mean cosine", justify="right")
    for name, dots in list(found.blocks.items())[:MOST_BLOCKS]:
        base = found.base.get(name, 0.0) ** 0.5
        cells = [f"{float(value) ** 0.5 / (base or 1.0):.3g}" for value in dots.diagonal()]
        if len(found.names) > 1:
            cosines = cosines_of(dots)
            count = len(found.names) * (len(found.names) - 1)
            cells.append(f"{float(cosines.sum() - cosines.diagonal().sum()) / count:.3f}")
        table.add_row(name, *cells)
    if len(found.blocks) > MOST_BLOCKS:
        table.add_row(f"and {len(found.blocks) - MOST_BLOCKS} more", *[""] * (len(table.columns) - 1))
    return table


def _spectra(found: Comparison) -> Table:
    table = Table(title="Rank that holds 90 % (99 %) of the squared norm", title_justify="left")
    table.add_column("weight", overflow="fold")
    for number in range(len(found.names)):
        table.add_column(str(number + 1), justify="right")
    for name, values in list(found.spectra.items())[:MOST_BLOCKS]:
        table.add_row(name, *(f"{rank_for_energy(one, 0.9)} ({rank_for_energy(one, 0.99)})" for one in values))
    if len(found.spectra) > MOST_BLOCKS:
        table.add_row(f"and {len(found.spectra) - MOST_BLOCKS} more", *[""] * len(found.names))
    return table


def check_plot(path: Path) -> None:
    """See that a picture can be drawn there, before the models are read for it.

    Raises:
        RecipeError: matplotlib is not installed, or does not know the file's ending.
        OutputError: there is no such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise RecipeError("--plot needs matplotlib: pip install 'peft-subspace[examples]'.") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise RecipeError(f"{path}: a picture ends in one of {', '.join(sorted(known))}.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}.")


def draw(found: Comparison, path: Path) -> None:
    """A picture: relative norm by block, cosines, and the spectra if there are some.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = 2 + bool(found.spectra)
    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels)
    for number, name in enumerate(found.names):
        heights = [
            float(dots[number, number]) ** 0.5 / (found.base.get(b, 0.0) ** 0.5 or 1.0) for b, dots in found.blocks.items()
        ]
        axes[0].plot(range(len(heights)), heights, marker="o", label=os.path.basename(name) or name)
    axes[0].set(
        xlabel="block, in the order of the model",
        ylabel="norm / base" if found.base else "norm",
        title="Size of the task vectors",
    )
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    image = axes[1].imshow(found.cosines.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [os.path.basename(name) or name for name in found.names]
    axes[1].set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes[1].set_yticks(range(len(labels)), labels)
    axes[1].set_title(f"Cosines; signs differ at {found.sign_conflict:.0%}")
    figure.colorbar(image, ax=axes[1], shrink=0.8)
    if found.spectra:
        _draw_spectra(found, axes[2])
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error


def _draw_spectra(found: Comparison, axes: object) -> None:
    """Mean share of the squared norm over all weights, against the rank."""
    from typing import Any, cast

    import torch

    panel = cast(Any, axes)
    for number, name in enumerate(found.names):
        curves = [values[number].double().square() for values in found.spectra.values() if values[number].numel()]
        longest = max((curve.numel() for curve in curves), default=0)
        shares = [
            torch.nn.functional.pad((c.cumsum(0) / c.sum()), (0, longest - c.numel()), value=1.0) for c in curves if c.sum() > 0
        ]
        if shares:
            mean = torch.stack(shares).mean(0).numpy()
            panel.plot(range(1, longest + 1), mean, label=os.path.basename(name) or name)
    panel.set(xscale="log", xlabel="rank", ylabel="share of the squared norm, mean over weights", title="Spectrum")
    panel.legend()
