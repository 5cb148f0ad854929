"""SVFit adapter files as deltas: a scaling of the base's own weight along its singular vectors. Imports no PEFT."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .adapters import CONV1D_MODELS, Adapter, by_layer, is_embedding_module
from .deltas import Delta, Read, columns_of
from .errors import InputError
from .headers import TensorHeader
from .sources import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR = re.compile(r"(?P<module>.+)\.svfit_delta(?:_(?P<weight>\w+))?\.(?P<tensor>shift|singular_values|probe|basis)")


@dataclass(frozen=True)
class SpectralDelta:
    """U diag(z) U^T W, or W V diag(z) V^T: an SVFit adapter on one weight, of rank r.

    Attributes:
        owner: the adapter and the layer, for errors.
        shift: `[r]`, delta or z = delta / s.
        values: s `[r]`.
        probe: `[r]`, by which a basis that is made again is recognised.
        basis: `[r, d]`, U^T or V^T; None where the file does not have it, and the weight is decomposed.
        config: of the adapter.
        embedding: the weight is an embedding, decomposed on the side of its `dim`.
        swapped: a matrix that is stored as `[in, out]`.
        weight: W in the base's file; None until the base is known.
    """

    owner: str
    shift: TensorHeader
    values: TensorHeader
    probe: TensorHeader
    basis: TensorHeader | None
    config: dict[str, Any]
    embedding: bool
    swapped: bool
    weight: TensorHeader | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.weight is None else self.weight.shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        own = (self.shift, self.values, self.probe)
        return own + tuple(header for header in (self.basis, self.weight) if header is not None)

    @property
    def rank(self) -> int:
        return self.shift.shape[0]

    def on(self, weight: TensorHeader) -> SpectralDelta:
        """The same on this weight.

        Raises:
            InputError: the weight has another size than the one that the adapter was trained on.
        """
        bound = replace(self, weight=weight)
        width = weight.shape[0] if bound._acts_on_rows else columns_of(weight.shape)
        wanted = None if self.basis is None else self.basis.shape[-1]
        if len(weight.shape) < 2 or self.rank > min(weight.shape[0], columns_of(weight.shape)) or wanted not in (None, width):
            found = "" if wanted is None else f" of {wanted} values"
            raise InputError(f"{self.owner}: its {self.rank} directions{found} do not fit the weight {list(weight.shape)}.")
        return bound

    @property
    def _acts_on_rows(self) -> bool:
        """Whether the basis is that of the rows of the stored matrix, by the rule of `SvfitDelta`."""
        assert self.weight is not None
        rows, columns = self.weight.shape[0], columns_of(self.weight.shape)
        if self.swapped:
            rows, columns = columns, rows
        kernel = columns_of(self.weight.shape[1:]) > 1 and len(self.weight.shape) > 2
        return (kernel or self.embedding or rows <= columns) != self.swapped

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """left `[rows, r]` and right `[r, columns]` in float32.

        Cost: 2 r rows columns flops; a decomposition more (`functional.svd.leading_singular`) if the file has no basis.

        Raises:
            InputError: the base is not the one that the adapter was trained on; only seen where it has to be decomposed.
        """
        from ..functional import svd

        assert self.weight is not None
        stored = read(self.weight)
        matrix = stored.float().flatten(1)
        values = read(self.values).float()
        z = read(self.shift).float()
        if self.config.get("scale", "additive") == "additive":
            z = z * svd.inverse(values, max(matrix.shape))
        if self.config.get("nonnegative"):
            z = z.clamp(min=-1)
        basis = self._decomposed(stored, values, read) if self.basis is None else read(self.basis)
        basis = basis.float()
        if self._acts_on_rows:
            return basis.t(), z[:, None] * (basis @ matrix)
        return (matrix @ basis.t()) * z, basis

    def _decomposed(self, stored: Tensor, values: Tensor, read: Read) -> Tensor:
        """The basis of the weight, made as the adapter makes it, and checked against the file's values."""
        import torch

        from ..functional import svd

        method: Any = "gram" if self.embedding else self.config.get("svd", "gram")
        found = svd.leading_singular(stored.flatten(1), self.rank, "left" if self._acts_on_rows else "right", method)
        problem = svd.differs(found.values, svd.probe(found.basis), values, read(self.probe).float())
        if problem:
            raise InputError(
                f"{self.owner}: was trained on a base with other bits: {problem}. Give the base that it was trained on, in its "
                f"dtype, or save the adapter with its basis: `model.keep_basis()`, then `model.save_pretrained(...)`."
            )
        narrow = stored.dtype if stored.dtype in (torch.float16, torch.bfloat16) else torch.float32
        named = str(self.config.get("basis_dtype", "auto"))
        return found.basis.to(narrow if named == "auto" else getattr(torch, named))


def read_svfit(checkpoint: Checkpoint, model_type: str | None) -> Adapter:
    """Read what an SVFit adapter changes; its deltas are complete when they are put on a weight (`SpectralDelta.on`).

    Raises:
        InputError: tensors that are missing, or stacks of matrices (experts, convolutions with groups), by layer.
    """
    parts, saved = by_layer(checkpoint, _TENSOR, "svfit_", "an SVFit adapter")
    deltas: dict[str, Delta] = {}
    for (module, weight), tensors in parts.items():
        owner = f"{checkpoint.name}: {module!r}"
        lost = [name for name in ("shift", "singular_values", "probe") if name not in tensors]
        if lost:
            raise InputError(f"{owner} has no {' and no '.join(lost)}.")
        if len(tensors["shift"].shape) != 1:
            raise InputError(
                f"{owner} is adapted as a stack of matrices (experts, or a convolution with groups). Merge the adapter into "
                f"its model first (`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
            )
        embedding = weight is None and is_embedding_module(module)
        swapped = embedding or (weight is None and model_type in CONV1D_MODELS)
        deltas[f"{module}.{weight or 'weight'}"] = SpectralDelta(
            owner, tensors["shift"], tensors["singular_values"], tensors["probe"], tensors.get("basis"),
            checkpoint.config, embedding, swapped,
        )  # fmt: skip
    return Adapter(deltas, saved, checkpoint.config.get("base_model_name_or_path"))
