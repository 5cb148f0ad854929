"""Objectives for combining task vectors, as pure functions of logits.

    addition      sum over the tasks of CE
    negation      -CE(target) + CE(control)
    entropy       mean over the samples of -sum_c p_c log p_c
    information   entropy less that of the mean of p over the samples
    UFM           sum_i w_i CE(strong_i, q_i) / sum_i w_i          q: sharpened prediction on the weak view, or a trusted label

Source: aTLAS (arXiv:2407.02880) and its official code; entropy is AdaMerging's (arXiv:2310.02575), information maximization
SHOT's (arXiv:2002.08546). UFM is written as aTLAS's code documents it, not as it was released: there every sample is trusted
with a label that never changes, sharpening does nothing, and a batch without a sure sample gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def addition_loss(tasks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over tasks of the mean cross-entropy of each.

    Args:
        tasks: (logits `[n, classes]`, labels `[n]`) of every task; their heads and numbers of classes may differ.

    Raises:
        ValueError: no tasks.
    """
    losses = [F.cross_entropy(logits.float(), labels) for logits, labels in tasks]
    if not losses:
        raise ValueError("addition_loss needs the logits and labels of at least one task.")
    return torch.stack(losses).sum()


def negation_loss(target: tuple[Tensor, Tensor], control: tuple[Tensor, Tensor]) -> Tensor:
    """-CE(target) + CE(control): unlearn the target and keep the control. Without bound below; watch the control's accuracy.

    Args:
        target: logits `[n, classes]` and labels `[n]` of what is to be forgotten.
        control: the same of what is to be kept.
    """
    return F.cross_entropy(control[0].float(), control[1]) - F.cross_entropy(target[0].float(), target[1])


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions in nats, from `log_softmax`: no epsilon, no NaN for sure predictions.

    Args:
        logits: `[..., classes]`.
    """
    logarithms = F.log_softmax(logits.float(), -1)
    finite = logarithms.masked_fill(logarithms == -torch.inf, 0.0)  # a class that is masked out has no share in the entropy
    return -(logarithms.exp() * finite).sum(-1).mean()


def information_maximization_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions less the entropy of their mean, in nats: answers that are sure, and not all the same.

    Entropy alone is least where every input gets one class. This is minus the information that an input gives about the class:
    0 where all answers are alike, -ln(classes) where they are sure and all classes as frequent. It presumes that the classes
    are about as frequent in a batch as among all inputs. The mean is over one call: of one sample the loss is 0, and two
    halves of a batch, of an accumulation or of two processes, give another loss than the whole.

    Args:
        logits: `[..., classes]`; the mean is over all but the last dimension.

    Source: Krause et al., "Discriminative clustering by regularized information maximization" (2010); with given heads as in
    SHOT (arXiv:2002.08546).
    """
    mean = F.softmax(logits.float(), -1).reshape(-1, logits.shape[-1]).mean(0)
    return entropy_loss(logits) + (mean * mean.where(mean > 0, 1.0).log()).sum()  # a class that nothing has has no share


# Those that need no labels, by their names in recipes.
UNLABELLED: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy_loss,
    "information_maximization": information_maximization_loss,
}


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """q_c = p_c^(1 / temperature) / sum: below 1 sharpens, 1 changes nothing, above 1 flattens.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive: below 1 sharpens, above 1 flattens.")
    return F.softmax(probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / temperature, -1)


def ufm_loss(
    weak: Tensor,
    strong: Tensor,
    threshold: float,
    *,
    temperature: float = 1.0,
    trusted: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Unsupervised FixMatch: fit the strong view to what the model says with confidence about the weak one.

    q = sharpen(softmax(weak)), or one-hot of `labels` where a sample is trusted; w = 1 where max q > threshold or a sample is
    trusted; the loss is sum w CE(strong, q) / sum w, and 0 (with a graph) if no sample counts.

    Args:
        weak: logits `[n, classes]` of the plain view; no gradient goes through them.
        strong: logits `[n, classes]` of the augmented view.
        threshold: in [0, 1); see `threshold_at`.
        temperature: of `sharpen`.
        trusted: `[n]` booleans, and
        labels: `[n]` classes of the trusted samples, as `trusted_set` gives them; both or neither.

    Raises:
        ValueError: shapes that differ, or one of `trusted` and `labels` without the other.
    """
    if weak.shape != strong.shape or (trusted is None) != (labels is None):
        raise ValueError(
            f"the weak view is {list(weak.shape)}, the strong one {list(strong.shape)}: they must be equal; `trusted` and "
            f"`labels` go together."
        )
    targets = sharpen(F.softmax(weak.detach().float(), -1), temperature)
    sure = targets.amax(-1) > threshold
    if trusted is not None and labels is not None:
        targets = torch.where(trusted[:, None], F.one_hot(labels.where(trusted, 0), weak.shape[-1]).to(targets.dtype), targets)
        sure = sure | trusted
    losses = F.cross_entropy(strong.float(), targets, reduction="none")
    return torch.where(sure, losses, 0.0).sum() / sure.sum().clamp_min(1)


def trusted_set(probabilities: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The most confident samples of every predicted class: a mask `[n]`, and the predicted classes `[n]`.

    Args:
        probabilities: `[n, classes]`, of all samples that are adapted to, by the present model.
        most: for each class; None for min(n / classes / 10, 100), rounded down.
    """
    count, classes = probabilities.shape
    most = min(count // classes // 10, 100) if most is None else most
    confidence, labels = probabilities.max(-1)
    mask = torch.zeros(count, dtype=torch.bool, device=probabilities.device)
    for label in range(classes):
        (mine,) = torch.nonzero(labels == label, as_tuple=True)
        mask[mine[confidence[mine].argsort(descending=True, stable=True)[:most]]] = True
    return mask, labels


def threshold_at(progress: float, start: float = 0.9, end: float = 0.99) -> float:
    """A threshold that rises with the share of the training that is done, in [0, 1]."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
