"""What merged encoders of `merge_tasks.py` score, and the search for lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.merge_tasks_models import Task, accuracy, new_model
from peft_subspace.task_vectors.task_vector import TaskVector

State = Mapping[str, Tensor]
COARSE = (
    0.2,
    0.4,
    0.8,
    1.6,
    3.2,
)  # of lambda; then whole steps while the best is at the edge, and the two half steps beside it
BOUNDS = (0.05, 12.8)


class Scorer:
    """Scores of merged encoders on the tasks, relative to the single-task models."""

    def __init__(self, base: Path, tasks: Sequence[Task], singles: Sequence[Path], kind: str) -> None:
        self.tasks = tasks
        self.base: State = load_file(base / "model.safetensors")
        self.models: list[nn.Module] = []
        self.deltas: list[State] = []
        self.single: dict[str, list[float]] = {"held_out": [], "test": []}
        for task, single in zip(tasks, singles, strict=True):
            vector = TaskVector.open(str(single / "encoder"), str(base))
            delta = {name: vector[name].float() if name in vector else torch.zeros_like(x) for name, x in self.base.items()}
            model = new_model(task.classes)
            model.classifier.load_state_dict(load_file(single / "head.safetensors"))
            self.deltas.append(delta)
            self.models.append(model.eval())
        self._load([{name: x + delta[name] for name, x in self.base.items()} for delta in self.deltas])
        self.single = {part: self._accuracies(part) for part in self.single}

    def _load(self, encoders: Sequence[State]) -> None:
        for model, encoder in zip(self.models, encoders, strict=True):
            missing = model.bert.load_state_dict(dict(encoder), strict=False).missing_keys
            if any("position_ids" not in name for name in missing):
                raise RuntimeError(f"a merged encoder lacks {', '.join(missing)}")

    def _accuracies(self, part: str) -> list[float]:
        return [accuracy(model, getattr(task, part)) for model, task in zip(self.models, self.tasks, strict=True)]

    def relative(self, encoders: Sequence[State], part: str) -> list[float]:
        """Accuracy of encoder k on task k over that of the single-task model."""
        self._load(encoders)
        return [score / single for score, single in zip(self._accuracies(part), self.single[part], strict=True)]

    def scaled(self, deltas: Sequence[State], factor: float, part: str) -> list[float]:
        """The same with theta_0 + factor delta_k."""
        return self.relative([{n: x + factor * d[n] for n, x in self.base.items()} for d in deltas], part)


def best_lambda(score: Any) -> dict[float, float]:
    """Held-out scores by lambda, the best one inside of what was tried (or at `BOUNDS`)."""
    found = {factor: score(factor) for factor in COARSE}
    step = 2.0
    while True:
        best = max(found, key=found.__getitem__)
        beside = [round(best * step, 4), round(best / step, 4)]
        fresh = [factor for factor in beside if factor not in found and BOUNDS[0] <= factor <= BOUNDS[1]]
        if not fresh and step == 2.0:
            step = 2**0.5
            continue
        if not fresh or len(found) >= len(COARSE) + 6:
            return found
        found |= {factor: score(factor) for factor in fresh}
        if step < 2:
            return found
