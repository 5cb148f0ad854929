"""Distillation of a model into its own adapted form: features of every block, or logits, of one and the same input.

    L_fd = sum_l w_l mean_{real tokens, channels} (F_l^S - F_l^T)^2          F_l: output of block l, [batch, tokens, d]

Source: PELA (arXiv:2310.10700); its official code takes the plain mean over all elements, padding too, and w_l = 1 / n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

Normalize = Literal["layernorm", "cosine"]


def feature_distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None = None,
    normalize: Normalize | None = None,
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean squared distance of features, layer by layer.

    Args:
        student: F_l^S, `[batch, tokens, d]` each (any shape, if there is no mask).
        teacher: F_l^T of the same shapes; get no gradient.
        mask: `[batch, tokens]`, nonzero where a token counts; it applies to the features whose first two axes it has. None
            takes the plain mean, as the official code does.
        normalize: "layernorm" gives every token zero mean and unit variance first; "cosine" unit length, so that a token costs
            2 (1 - cos) / d. None takes the features as they are.
        layer_weights: w_l; None for 1 / n.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: numbers or shapes of features differ, or there are none.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{len(student)} features of the student and {len(teacher)} of the teacher: they must pair up.")
    weights = [1 / len(student)] * len(student) if layer_weights is None else list(layer_weights)
    if len(weights) != len(student):
        raise ValueError(f"{len(weights)} layer_weights for {len(student)} layers.")
    total: Any = 0.0
    for layer, (ours, theirs, weight) in enumerate(zip(student, teacher, weights, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(f"feature {layer}: the student's is {list(ours.shape)}, the teacher's {list(theirs.shape)}.")
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = _normalized(ours.to(dtype), normalize), _normalized(theirs.detach().to(dtype), normalize)
        squares = (ours - theirs).square()
        if mask is not None and squares.shape[:2] == mask.shape:
            squares = squares[mask.to(squares.device, torch.bool)]
        total = total + weight * (squares.mean() if squares.numel() else squares.sum())
    return total


def _normalized(features: Tensor, normalize: Normalize | None) -> Tensor:
    if normalize is None:
        return features
    if normalize == "layernorm":
        return F.layer_norm(features, features.shape[-1:])
    if normalize == "cosine":
        return F.normalize(features, dim=-1)
    raise ValueError(f"normalize={normalize!r} is not known. Accepted: None, 'layernorm', 'cosine'.")


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """The original model for a while: adapters and trained copies of modules off, eval mode, no gradients.

    Nothing that PEFT's `disable_adapter` would touch is touched (it switches `requires_grad` of the active adapter off and on,
    also where the user had frozen it). The random state is put back, so that a model that draws inside its forward (the mask of
    a masked autoencoder) draws the same for the student, as long as nothing else draws before it.
    """
    switches: list[Any] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [switch._disable_adapters for switch in switches]
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for switch in switches:
            switch._disable_adapters = True
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for switch, disabled in zip(switches, before, strict=True):
            switch._disable_adapters = disabled
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def recorded_features(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules, in the order in which they are called; of a tuple or a ModelOutput its first tensor.

    Only what is called inside the block is recorded, so a recomputation by gradient checkpointing in backward is not.
    """
    features: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        features.append(
            output if isinstance(output, Tensor) else next(iter(output.values() if hasattr(output, "values") else output))
        )

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The modules whose outputs are distilled.

    Args:
        model: a model.
        names: endings of module names, such as "encoder.layer.3" or "embeddings"; None for the members of every list of blocks:
            the outermost `nn.ModuleList`s with two or more members of one class.

    Raises:
        ValueError: a name that no module has, or no list of blocks in the model.
    """
    modules = dict(model.named_modules())
    if names is not None:
        found = []
        for wanted in names:
            matches = [module for name, module in modules.items() if name == wanted or name.endswith(f".{wanted}")]
            if not matches:
                lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
                raise ValueError(f"features name {wanted!r}, which {type(model).__name__} does not have. Its lists: {lists}.")
            found += matches
        return found
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no list of equal blocks. Name the modules to distil with `features`.")
    return [block for name in outermost for block in modules[name]]
