"""How a LoRA was initialised, and what that took out of its base. Imports no PEFT.

    W_adapted = (W - P(W)) + s B A

PiSSA and OLoRA take a part P out of the base, which the adapter begins with. PEFT's files do not have P: it is made again of
the base's own weight. Other ways to start take out what no file tells (it was made of data, of random numbers or by a
quantiser), so adapters of those are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .deltas import LoraDelta, Read
from .errors import InputError
from .headers import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["pissa", "olora"]

# `init_lora_weights` -> why its adapter says nothing without the base that it was trained on; None: the base is as it was.
STARTS: dict[str, str | None] = {
    **dict.fromkeys(("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")),
    "corda": "took a part out of its base that was made of data",
    "lora_ga": "took a part out of its base that was made of gradients",
    "loftq": "quantised its base",
}
_RANDOM = re.compile(r"pissa_niter_\d+")
_CONVERTED = (
    "or save it as a plain LoRA from there, by `model.save_pretrained(OUT, path_initial_model_for_weight_conversion=START)`, "
    "where START is the adapter as it was saved before training"
)


def part_taken(owner: str, start: Any) -> Part | None:
    """What a LoRA took out of its base when it was initialised.

    Args:
        owner: the adapter, for errors.
        start: `init_lora_weights` of its config.

    Returns:
        "pissa" or "olora", None if the base is as it was.

    Raises:
        InputError: a part that cannot be made again, or a value that is not known.
    """
    value = str(start).lower()
    if value in ("pissa", "olora"):
        return value  # type: ignore[return-value]
    if value in STARTS and STARTS[value] is None:
        return None
    why = STARTS.get(value) or ("took a random approximation out of its base" if _RANDOM.fullmatch(value) else None)
    if why is None:
        accepted = ", ".join(map(repr, ("pissa", "olora", *(name for name, reason in STARTS.items() if reason is None))))
        raise InputError(
            f"{owner}: init_lora_weights={start!r} is not known here, and it may have changed the base that the adapter "
            f"belongs to. Accepted: {accepted}. Where the adapter was trained, merge it into its model "
            f"(`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
        )
    raise InputError(
        f"{owner}: init_lora_weights={start!r} {why}, and its file does not have it. Where the adapter was trained, merge it "
        f"into its model (`model.merge_and_unload().save_pretrained(...)`) and give that model instead"
        + ("." if value == "loftq" else f", {_CONVERTED}.")
    )


def oriented(lora: LoraDelta, shape: tuple[int, ...]) -> LoraDelta | None:
    """The same update for a weight of this shape, stored the other way round if it must be; None if it does not fit."""
    flipped = replace(lora, transposed=not lora.transposed)
    return next((one for one in (lora, flipped) if one.shape == shape), None)


@dataclass(frozen=True)
class ResidualDelta:
    """s B A - P(W): a LoRA that took a part out of its base, on one weight. It has rank 2 r.

    P is the best approximation of W of rank r (PiSSA), or s Q_r R_r with W = Q R (OLoRA), of W as it is stored.

    Attributes:
        owner: the adapter and the layer, for errors.
        lora: s B A.
        part: which P.
        weight: W in the base's file; None until the base is known.

    Source: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), and PEFT's `LoraLayer.pissa_init` and `olora_init`, which round
    the residual W - P to the base's dtype; here the sum is rounded once.
    """

    owner: str
    lora: LoraDelta
    part: Part
    weight: TensorHeader | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.weight is None else self.weight.shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return self.lora.headers if self.weight is None else (*self.lora.headers, self.weight)

    @property
    def rank(self) -> int:
        return 2 * self.lora.rank

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as `[in, out]`."""
        return self.lora.transposed

    def on(self, weight: TensorHeader) -> ResidualDelta:
        """The same on this weight.

        Raises:
            InputError: the weight has another shape than the one that the adapter was trained on.
        """
        lora = oriented(self.lora, weight.shape)
        if lora is None or len(weight.shape) != 2:
            raise InputError(f"{self.owner}: its delta {list(self.lora.shape)} does not fit the weight {list(weight.shape)}.")
        return replace(self, lora=lora, weight=weight)

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """left `[rows, 2 r]` and right `[2 r, columns]` in float32.

        Cost: an SVD (PiSSA) or a QR decomposition (OLoRA) of the weight.

        Raises:
            InputError: a weight that has no such part, because its singular values r and r + 1 are equal, or its first r
                columns are not independent.
        """
        import torch

        assert self.weight is not None
        matrix, r = read(self.weight).float(), self.lora.rank
        if self.part == "pissa":
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            taken, rest = u[:, :r] * s[:r], vh[:r]
            determined = r >= len(s) or float(s[r - 1] - s[r]) > 1e-6 * float(s[0]) or float(s[r - 1]) <= 1e-6 * float(s[0])
            lacking = f"its singular values {r} and {r + 1} are equal"
        else:
            q, triangle = torch.linalg.qr(matrix)
            taken, rest = q[:, :r] * self.lora.scale, triangle[:r]
            diagonal = triangle.diagonal().abs()
            determined = float(diagonal[:r].min()) > 1e-6 * float(diagonal.max())
            lacking = f"its first {r} columns are not independent"
        if not determined:
            raise InputError(
                f"{self.owner}: init_lora_weights={self.part!r} took a part out of {self.weight.name!r} that cannot be made "
                f"again, because {lacking}. Where the adapter was trained, merge it into its model "
                f"(`model.merge_and_unload().save_pretrained(...)`) and give that model instead, {_CONVERTED}."
            )
        left, right = self.lora.factors(read)
        return torch.cat([left, -taken], 1), torch.cat([right, rest])
