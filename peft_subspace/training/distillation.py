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
from torch import Tensor, nn

Normalize = Literal["layernorm", "cosine"]


def feature_distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None = None,
    normalize: Normalize | None = None,
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean squared distance of features, layer by layer.

    Args:
        student: F_l^S, `[batch, tokens, d]` each (any shape, if there is no mask).
        teacher: F_l^T of the same shapes; get no gradient.
        mask: `[batch, tokens]`, nonzero where a token counts; it applies to the features whose first two axes it has. A list
            has one for each layer. None takes the plain mean, as the official code does.
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
    masks = [mask] * len(student) if mask is None or isinstance(mask, Tensor) else list(mask)
    total: Any = 0.0
    for layer, (ours, theirs, weight, kept) in enumerate(zip(student, teacher, weights, masks, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(f"feature {layer}: the student's is {list(ours.shape)}, the teacher's {list(theirs.shape)}.")
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = _normalized(ours.to(dtype), normalize), _normalized(theirs.detach().to(dtype), normalize)
        total = total + weight * masked_mean((ours - theirs).square(), kept)
    return total


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that count, if the mask has the first two axes of the values; else over all."""
    if mask is not None and values.shape[:2] == mask.shape:
        values = values[mask.to(values.device, torch.bool)]
    return values.mean() if values.numel() else values.sum()


def _normalized(features: Tensor, normalize: Normalize | None) -> Tensor:
    if normalize is None:
        return features
    if normalize == "layernorm":
        return F.layer_norm(features, features.shape[-1:])
    if normalize == "cosine":
        return F.normalize(features, dim=-1)
    raise ValueError(f"normalize={normalize!r} is not known. Accepted: None, 'layernorm', 'cosine'.")


class Features(list[Tensor]):
    """Recorded outputs, and beside them the modules that they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []


@contextmanager
def recorded_features(modules: Sequence[nn.Module]) -> Iterator[Features]:
    """Collect the outputs of modules, in the order in which they are called; of a tuple or a ModelOutput its first tensor.

    Only what is called inside the block is recorded, so a recomputation by gradient checkpointing in backward is not.
    """
    features = Features()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        values = output.values() if hasattr(output, "values") and not isinstance(output, Tensor) else output
        features.append(output if isinstance(output, Tensor) else next(iter(values)))
        features.modules.append(module)

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
            an `nn.ModuleList` of two or more members of one class (of one member, if there is no such list). Members that have
            such a list themselves, called `blocks`, `layers` or `layer` (stages of a Swin), give way to its members.

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
    several = [name for name, module in modules.items() if _is_list_of_blocks(module)]
    lists = several or [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == 1]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no list of equal blocks. Name the modules to distil with `features`.")
    return [block for name in outermost for member in modules[name].children() for block in _inner_blocks(member)]


def _is_list_of_blocks(module: nn.Module) -> bool:
    members = list(module.children())
    return isinstance(module, nn.ModuleList) and len(members) > 1 and len({type(block) for block in members}) == 1


def _inner_blocks(member: nn.Module) -> list[nn.Module]:
    inner = next((child for name in ("blocks", "layers", "layer") if (child := getattr(member, name, None)) is not None), None)
    if not isinstance(inner, (nn.ModuleList, nn.Sequential)) or len({type(block) for block in inner}) != 1:
        return [member]
    return [block for child in inner for block in _inner_blocks(child)]
