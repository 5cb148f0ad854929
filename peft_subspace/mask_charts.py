"""Pictures of a learned mask: its density by parameter, its probabilities, and the entropy over the steps. Need matplotlib."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .training.merge_trainer import Look


def draw_density(density: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Draw the share that a mask lets through as one bar a parameter.

    Args:
        density: name -> share, `model.base_model.density()`.
        path: of the picture; its ending chooses the format.
    """
    figure = _figure(max(6.0, 0.12 * len(density) + 2), 4.0)
    axes = figure.subplots()
    axes.bar(range(len(density)), list(density.values()), color="#7a9cc6")
    step = max(1, len(density) // 40)
    axes.set_xticks(range(0, len(density), step), list(density)[::step], rotation=90, fontsize=5)
    axes.set_ylabel("density")
    axes.set_ylim(0, 1)
    _save(figure, path)


def draw_probabilities(probabilities: Mapping[str, Tensor], path: str | os.PathLike[str], bins: int = 50) -> None:
    """Draw the histogram of all probabilities of a mask: how far it is from undecided (1/2) and from hard (0 and 1).

    Args:
        probabilities: name -> sigmoid of the logits, `model.base_model.mask_probabilities()`.
        path: of the picture.
        bins: of the histogram.
    """
    counts = sum(torch.histc(value.float().cpu(), bins, 0, 1) for value in probabilities.values())
    assert isinstance(counts, Tensor)
    figure = _figure(6.0, 3.5)
    axes = figure.subplots()
    axes.bar(((torch.arange(bins) + 0.5) / bins).tolist(), (counts / counts.sum()).tolist(), width=1 / bins, color="#7a9cc6")
    axes.set_xlabel("probability of an entry")
    axes.set_ylabel("share of the entries")
    _save(figure, path)


def draw_history(history: Sequence[Look | Mapping[str, Any]] | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw the loss of every task over the steps, its mean, and the metrics, phase after phase.

    Args:
        history: of `MergeTrainer.train`; or the history.json that it, and a merge that learns, write: its path, or what
            `json.load` makes of it.
        path: of the picture.

    Raises:
        ValueError: no looks, or a file that is no history.
    """
    history = _looks(history)
    metrics = sorted({name for look in history for name in look.metrics})
    figure = _figure(7.0, 3.5 if not metrics else 6.0)
    top, *rest = figure.subplots(1 + bool(metrics), 1, squeeze=False)[:, 0]
    at, before, last = [], 0, None
    for look in history:
        if last is not None and look.phase != last.phase:
            before += last.step
            for axes in (top, *rest):
                axes.axvline(before, color="#999999", linewidth=0.8)
        at.append(before + look.step)
        last = look
    for name in history[0].loss:
        top.plot(at, [look.loss[name] for look in history], linewidth=0.9, label=name)
    top.plot(at, [look.mean for look in history], "k", label="mean")
    top.set_ylabel(f"{history[0].measure}, nats")
    top.legend(fontsize=7)
    for name in metrics:
        pairs = [(step, look.metrics[name]) for step, look in zip(at, history, strict=True) if name in look.metrics]
        rest[0].plot(*zip(*pairs, strict=True), label=name)
        rest[0].legend(fontsize=7)
    (rest[0] if rest else top).set_xlabel("step (a line: the mask is frozen, the coefficients follow)")
    _save(figure, path)


def _looks(history: Any) -> list[Look]:
    from .training.merge_trainer import Look

    where = "history"
    if isinstance(history, (str, os.PathLike)):
        where = os.fspath(history)
        try:
            history = json.loads(Path(history).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: cannot be read as a history.json of MergeTrainer: {error}.") from error
    try:
        found = [look if isinstance(look, Look) else Look(**look) for look in history]
    except TypeError as error:
        raise ValueError(f"{where}: is no history of MergeTrainer, a list of looks: {error}.") from error
    if not found:
        raise ValueError(f"{where}: has no looks to draw.")
    return found


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    figure.tight_layout()
    figure.savefig(os.fspath(path), dpi=130)
