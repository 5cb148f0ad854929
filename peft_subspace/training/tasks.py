"""Tasks of a merged model: batches of each, with labels or without, and how the merged model answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .objectives import addition_loss, entropy_loss

Logits = Callable[[nn.Module, Any], Tensor]


@dataclass
class Task:
    """One task of a merged model.

    Args:
        name: of the task.
        batches: such as a DataLoader; gone through again and again.
        logits: `(model, batch) -> [..., classes]`; see `pooled_logits` and `token_logits`.
        labels: key of a batch's labels, which `logits` does not get: the loss is the cross-entropy with them. None for
            unlabelled batches.
        objective: the loss of unlabelled batches from the logits: `entropy_loss` (AdaMerging, Concrete),
            `information_maximization_loss`, which keeps a task from collapsing onto one class, or one of your own.
    """

    name: str
    batches: Iterable[Any]
    logits: Logits
    labels: str | None = None
    objective: Callable[[Tensor], Tensor] = entropy_loss

    def __post_init__(self) -> None:
        if self.labels is not None and self.objective is not entropy_loss:
            raise ValueError(f"task {self.name!r}: with `labels` the loss is the cross-entropy; leave `objective` out.")
        try:
            signature(self.objective).bind(None)
        except TypeError as error:
            raise ValueError(
                f"task {self.name!r}: objective={self.objective!r} is called with logits alone. Accepted are functions such as "
                f"entropy_loss and information_maximization_loss; objectives of a model and a batch are CoefficientTrainer's."
            ) from error

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The objective, or the cross-entropy, of one batch in nats.

        Raises:
            ValueError: the batch is no table, or has no labels under that key.
        """
        if self.labels is None:
            return self.objective(self.logits(model, batch))
        if not isinstance(batch, Mapping) or self.labels not in batch:
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"The batches of task {self.name!r} have no {self.labels!r}, its labels; there is: {keys}.")
        inputs = {key: value for key, value in batch.items() if key != self.labels}
        return addition_loss([(self.logits(model, inputs), batch[self.labels])])


def pooled_logits(head: nn.Module) -> Logits:
    """Answers of an encoder with a head of the task's own: `head(pooler_output)`, or of the first token without a pooler.

    The head is put into evaluation mode and frozen.
    """
    head.eval().requires_grad_(False)

    def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        out = model(**batch)
        pooled = getattr(out, "pooler_output", None)
        found: Tensor = head(out.last_hidden_state[:, 0] if pooled is None else pooled)
        return found

    return logits


def token_logits(tokens: Sequence[int], position: int = -1) -> Logits:
    """Answers of a generative model: its logits of some tokens (first tokens of the labels) at one position.

    Args:
        tokens: ids; the entropy is over these only.
        position: -1 for the last one (pad on the left), 0 for the first of a decoder.
    """

    def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        found: Tensor = model(**batch).logits[:, position, list(tokens)]
        return found

    return logits


class Stream:
    """Endless batches of one task for one process, in an order of their own: going on needs their number alone."""

    def __init__(self, task: Task, seed: int, rank: int, world: int) -> None:
        self.task, self.rank, self.world = task, rank, world
        self.taken = 0
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._passes = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.task.batches:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"The task {self.task.name!r} has no batches, or `batches` can be gone through only once.")

    def _next(self) -> Any:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws from torch's generator
            torch.set_rng_state(self._random)
            batch = next(self._passes)
            self._random = torch.get_rng_state()
        self.taken += 1
        return batch

    def next(self) -> Any:
        """This process's batch out of the next `world`."""
        return [self._next() for _ in range(self.world)][self.rank]

    def skip(self, count: int) -> None:
        """Leave out batches that a run has used before."""
        for _ in range(count):
            self._next()
