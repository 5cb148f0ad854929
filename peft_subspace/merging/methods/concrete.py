"""Concrete: replay a learned mask, m / mean(m) sum_t lambda_t tau_t; `functional.concrete_mask` has the maths in training."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.task_vectors.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from peft_subspace.functional.concrete_mask import Mask
    from peft_subspace.functional.groups import Groups
    from peft_subspace.merging.learned import Learned
    from peft_subspace.task_vectors.headers import TensorHeader

_LOCAL = threading.local()


class StoredLogits:
    """Logits in a file, read a range at a time; of a packed mask 1 and -1."""

    def __init__(self, header: TensorHeader, count: int) -> None:
        self.header, self.count = header, count

    def numel(self) -> int:
        """How many."""
        return self.count

    def __getitem__(self, where: slice) -> Tensor:
        from peft_subspace.functional.bits import unpack_bits
        from peft_subspace.task_vectors.reading import Reader

        if not hasattr(_LOCAL, "reader"):
            _LOCAL.reader = Reader()
        start, stop = where.start, min(where.stop, self.count)
        if self.header.dtype != "U8":
            stored: Tensor = _LOCAL.reader.stored(self.header, start, stop, 0)
            return stored.clone()
        first = start // 8
        packed = _LOCAL.reader.stored(self.header, first, -(-stop // 8), 0)
        bits = unpack_bits(packed, 8 * packed.numel())[start - 8 * first : stop - 8 * first]
        return bits.float().mul_(2).sub_(1)


@dataclass(frozen=True)
class ReplayedMask:
    """m of one tensor, its rescaling and lambda.

    Args:
        mask: m, from the file.
        groups: pi, where the mask has fewer logits than the tensor entries.
        values: m of all groups.
        scale: 1 / mean(m), or 1.
        coefficients: lambda `[T]`.
    """

    mask: Mask
    groups: Groups | None
    values: Tensor | None
    scale: Tensor
    coefficients: Tensor

    def part(self, start: int, stop: int) -> Tensor:
        """m of the entries [start, stop)."""
        if self.groups is None or self.values is None:
            first = start // 8 * 8  # where a byte of packed bits, and a draw of noise, begins
            return self.mask.part(first, stop)[start - first :]
        return self.groups.at(start, stop, self.values.device).spread(self.values)

    def applied(self, deltas: Sequence[Tensor], start: int) -> list[Tensor]:
        """m / mean(m) * tau_t of tiles that begin at the entry `start`, in any shape: as `save_masked_vectors` has it."""
        if not deltas:
            return []
        like = deltas[0]
        m = self.part(start, start + like.numel()).to(like).view(like.shape)
        scale = self.scale.to(like)
        return [(delta * m).mul_(scale) for delta in deltas]


@dataclass(frozen=True)
class SavedMask:
    """A mask in an adapter's file.

    Args:
        header: of the logits, or of the packed mask.
        numbers: of the coefficients `[T]`.
        shape: of the tensor that is masked.
        block: what the adapter's config says about the tensor.
        config: the adapter's config.
    """

    header: TensorHeader
    numbers: TensorHeader
    shape: tuple[int, ...]
    block: Mapping[str, Any]
    config: Mapping[str, Any]
    is_sum: bool = False

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """What is read."""
        return self.header, self.numbers

    def open(self) -> ReplayedMask:
        """One pass over the mask, for its mean."""
        import torch

        from peft_subspace.functional.concrete_mask import Mask, mean_scale
        from peft_subspace.functional.groups import groups_from
        from peft_subspace.task_vectors.reading import read_tensor

        spec = self.block.get("groups")
        logits: Any = StoredLogits(self.header, _count(self.shape, self.block))
        stream = (self.config["seed"], self.block["name"], "evaluation")
        mask = Mask(logits, self.config["eval_mask"], self.config["temperature"], stream, portable=True)
        numbers = read_tensor(self.numbers).float()
        if self.config["learn_coefficients"] is not None and self.config["clamp_coefficients"]:
            numbers = numbers.clamp(0, 1)
        scale = mean_scale(mask) if self.config["rescale"] else torch.ones((), dtype=torch.float64)
        if not bool(scale.isfinite()) or not bool(numbers.isfinite().all()):
            raise InputError(f"{self.header.path}: {self.header.name!r} has values that are not finite.")
        groups = None if spec is None else groups_from(spec, self.shape)
        return ReplayedMask(mask, groups, None if spec is None else mask.values(), scale, numbers)


def _count(shape: tuple[int, ...], block: Mapping[str, Any]) -> int:
    count = 1
    for size in shape:
        count *= size
    groups = block.get("groups")
    return count if groups is None else int(groups["count"])


def saved_mask(learned: Learned, block: Mapping[str, Any], base: TensorHeader) -> SavedMask:
    """Find and check the mask of one tensor; see `merging.learned`.

    Raises:
        InputError: the mask is of another size, or of directions of factors, which files of deltas do not have.
    """
    if block.get("by_rank"):
        raise InputError(
            f"{learned.checkpoint.name}: masks directions of low-rank vectors (granularity='rank'), which a merge of tensors "
            f"does not see. Write its update with `save_task_vector`, or export it as a LoRA, and merge that."
        )
    is_packed = learned.config.get("save_mask") == "hard"
    header = learned.tensor(f"{block['mask']}.{'mask' if is_packed else 'logits'}")
    numbers = learned.tensor(block["coefficients"])
    count, found = _count(base.shape, block), 1
    for size in header.shape:
        found *= size
    if found != (-(-count // 8) if is_packed else count) or numbers.shape != (len(learned.records),):
        raise InputError(
            f"{learned.checkpoint.name}: {header.name!r} is {list(header.shape)} with {list(numbers.shape)} coefficients, and "
            f"a mask of {count} entries for {len(learned.records)} task vectors is expected. Save the adapter again."
        )
    return SavedMask(header, numbers, base.shape, block, learned.config)


def merge(inputs: Inputs) -> Tensor:
    """lambda_0 m / mean(m) sum_t lambda_t tau_t, with `lambda` of the recipe for lambda_0: 1 replays what was learned.

    Cost: 1 read and a pass over the mask before; 2 flops for each entry of each vector, and those of the mask.
    Source: Concrete (arXiv:2312.06173); the operations of `functional.concrete_mask.Masked`, in their order: the same bits for
    dense vectors.
    """
    from peft_subspace.functional.concrete_mask import weighted_sum

    learned, n = inputs.learned, inputs.tensors[0].numel()
    like = inputs.tensors[0]
    pairs = [pair for pair in zip(learned.coefficients.to(like), inputs.tensors, strict=True) if float(pair[0]) != 0]
    delta = weighted_sum([number for number, _ in pairs], [tensor for _, tensor in pairs], like)
    total: Tensor = learned.part(inputs.start, inputs.start + n).to(like) * delta
    total.mul_(learned.scale.to(like))
    factor = inputs.options["lambda"]
    return total if factor == 1.0 else total.mul_(factor)
