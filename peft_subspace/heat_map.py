"""A picture of what was learned: coefficients over blocks and task vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def draw_coefficients(coefficients: Mapping[str, Tensor], names: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draw coefficients as a heat map, one row a task vector and one column a block; several of a block by their mean.

    Args:
        coefficients: block -> `[T]` or `[T, K]`, as `model.base_model.coefficients()` gives them.
        names: of the T vectors, `config.vector_names`.
        path: of the picture; its ending chooses the format. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    columns = [value.float().cpu().reshape(len(names), -1).mean(1) for value in coefficients.values()]
    values = torch.stack(columns, 1)
    limit = float(values.abs().max()) or 1.0
    longest = max(map(len, coefficients), default=0)  # of the names below, 5 points high
    size = max(6.0, 0.12 * len(columns) + 2), 0.3 * len(names) + 0.045 * longest + 0.8
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), list(names), fontsize=8)
    step = max(1, len(columns) // 40)
    axes.set_xticks(range(0, len(columns), step), list(coefficients)[::step], rotation=90, fontsize=5)
    figure.colorbar(image, ax=axes, label="coefficient", pad=0.01)
    figure.savefig(os.fspath(path), dpi=130)
