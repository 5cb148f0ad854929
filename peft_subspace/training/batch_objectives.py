"""Objectives of a model and a batch, for a loop of one's own or `CoefficientTrainer`: negation, entropy, information, UFM.

Each is called with a model, its inputs and the `Moment`, and returns a loss and the output of the model.
`training.objectives` has the same as pure functions of logits, with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .objectives import entropy_loss, information_maximization_loss, negation_loss, threshold_at, trusted_set, ufm_loss

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """What an objective may want to know beside its batch.

    Attributes:
        progress: share of the training that is done, in [0, 1].
        rows: `[n]` numbers of the batch's rows in their data set, where the objective keeps something about them.
        control: a labelled batch of the control set.
    """

    progress: float = 0.0
    rows: Tensor | None = None
    control: Inputs | None = None


def logits_of(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any]:
    """Logits and whole output of a model, without its labels: no loss of its own is computed."""
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    return (outputs.logits if hasattr(outputs, "logits") else outputs), outputs


@dataclass
class Negation:
    """-CE(inputs) + CE(control): unlearn a task and keep another. Without bound below; stop by the control's accuracy."""

    needs_control: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False

    def __call__(self, model: nn.Module, inputs: Inputs, moment: Moment) -> tuple[Tensor, Any]:
        """The loss of a labelled batch and a control batch, and the output for the former.

        Raises:
            ValueError: no control batch, or no labels.
        """
        if moment.control is None or "labels" not in inputs or "labels" not in moment.control:
            raise ValueError("Negation needs labelled inputs and a labelled control batch: give `control_dataset`.")
        kept, _ = logits_of(model, moment.control)
        target, outputs = logits_of(model, inputs)
        return negation_loss((target, inputs["labels"]), (kept, moment.control["labels"])), outputs


@dataclass
class Entropy:
    """Mean entropy of the predictions for an unlabelled batch."""

    needs_control: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False

    def __call__(self, model: nn.Module, inputs: Inputs, moment: Moment) -> tuple[Tensor, Any]:
        """The loss of a batch, and the model's output."""
        logits, outputs = logits_of(model, inputs)
        return self.of(logits), outputs

    @staticmethod
    def of(logits: Tensor) -> Tensor:
        """The loss of logits `[n, classes]`."""
        return entropy_loss(logits)


class InformationMaximization(Entropy):
    """The same less the entropy of the mean prediction, which keeps all inputs from being given one class."""

    @staticmethod
    def of(logits: Tensor) -> Tensor:
        """The loss of logits `[n, classes]`."""
        return information_maximization_loss(logits)


@dataclass
class Ufm:
    """UFM for unlabelled rows: `training.objectives.ufm_loss` with a rising threshold and a trusted set for every epoch.

    Args:
        strong: batch -> its strong view, such as tokens left out of the mask, or augmented images.
        temperature: of the targets; below 1 sharpens.
        start: threshold at the start.
        end: threshold at the end.
        most: trusted rows of each predicted class; None for min(n / classes / 10, 100), rounded down.

    Rows of the trusted set come in their turn, as all others; the official code fills a quarter of each batch with them.
    """

    strong: Callable[[Inputs], Inputs]
    temperature: float = 0.5
    start: float = 0.9
    end: float = 0.99
    most: int | None = None
    trusted: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    epoch: int = field(default=-1, init=False, repr=False)
    needs_control: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = True

    def __call__(self, model: nn.Module, inputs: Inputs, moment: Moment) -> tuple[Tensor, Any]:
        """The loss of a batch, and the output for the strong view; no gradient goes through the weak one."""
        with torch.no_grad():
            weak, _ = logits_of(model, inputs)
        strong, outputs = logits_of(model, self.strong(inputs))
        known: dict[str, Tensor] = {}
        if moment.rows is not None:
            labels = [self.trusted.get(row, -1) for row in moment.rows.tolist()]
            tensor = torch.tensor(labels, device=weak.device)
            known = {"trusted": tensor >= 0, "labels": tensor.clamp_min(0)}
        threshold = threshold_at(moment.progress, self.start, self.end)
        return ufm_loss(weak, strong, threshold, temperature=self.temperature, **known), outputs

    def trust(self, rows: Tensor, probabilities: Tensor, epoch: int) -> None:
        """Choose the trusted set of an epoch, by the numbers `[n]` and present predictions `[n, classes]` of all rows."""
        rows, order = rows.cpu().unique(return_inverse=True)  # processes may repeat rows to fill a batch
        found = torch.empty(len(rows), probabilities.shape[1])
        found[order] = probabilities.float().cpu()
        mask, labels = trusted_set(found, self.most)
        self.trusted = {int(row): int(label) for row, label in zip(rows[mask], labels[mask], strict=True)}
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The trusted set, for a run that is resumed within an epoch."""
        return {"trusted": sorted(self.trusted.items()), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.trusted, self.epoch = {int(row): int(label) for row, label in state["trusted"]}, int(state["epoch"])
