"""SVFit: train the leading singular values of the pretrained weight, and nothing else.

    W = U diag(s) V^T,      W' = W_e + U_r diag(s_r + delta) V_r^T = W + U_r diag(delta) V_r^T          delta: [r], starts at 0

Source: Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values"
(arXiv:2409.05926), of which only the abstract and the introduction could be read; there is no official code. The paper's split
into W_r and the rest W_e is the same map. Here W stays as it is and `delta` is what is stored, so that the start is the base to
the bit, weight decay pulls towards the pretrained values, and an update smaller than a rounding of sigma is not lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Delta, Geometry, SubspaceConfig, SubspaceModel
from ..base.delta import Weight
from ..base.geometry import bias_of
from ..functional import svd
from ..functional.directions import (
    FORMS,
    Form,
    built_linear,
    choose_form,
    factored_linear,
    scale_channels,
    scale_matrix,
    scale_rows,
)
from ..functional.low_rank import autocasts
from ..registration import register

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL = 50e6  # bytes of all bases in float16 that go into the file without being asked for


@dataclass
class SvfitConfig(SubspaceConfig):
    """SVFit: `W' = W + U_r diag(delta) V_r^T` with frozen singular vectors and r trained numbers per weight.

    Args:
        r: how many of the largest singular values are trained: a number (lowered to what a smaller weight has, see
            `lowered_ranks`) or "full".
        energy: instead of `r`: as many as hold this share of the weight's squared norm, sum of s_i^2. On trained weights 0.99
            is nearly all of them. The ranks go into `rank_pattern`.
        max_r: upper bound with `energy`.
        svd: "gram" (default; float64 eigenvectors of the smaller Gram matrix, the most reproducible and, for wide layers, the
            cheapest exact way), "full" (LAPACK's SVD in float32), or "lowrank" (randomised, seconds for the widest layers, but
            a subspace that only the file can give back). Embeddings always take "gram".
        svd_niter: power iterations of "lowrank".
        seed: of "lowrank".
        svd_device: where to decompose, such as "cuda" or "cpu"; "auto" is where the weight lies.
        scale: "additive" trains delta (the paper: a step of Adam moves every sigma_i by the learning rate); "relative" trains
            z = delta / s (by the learning rate times s_i: one rate suits layers and directions of all sizes).
        nonnegative: keep s + delta at or above zero (where it would be below, it stays at zero and gets no gradient).
        save_basis: whether the file has the singular vectors. Without them it holds r numbers a layer and three times that in
            all; loading then decomposes the base again, and refuses a base with other bits. "auto" saves them with
            svd="lowrank", on a quantised base, and where they are below 50 MB in all, but not for r="full".
        basis_dtype: of the basis, in memory and in the file; "auto": float16 if it is saved, else the base's dtype.
        form: "auto" chooses the cheapest of the equal forms for each call; or "one-sided", "built", "factored".
        bias: "none", "all" or "svfit_only": biases of the base that are trained too. They change the base: with the adapter
            disabled its output is not the original one.
        dropout: probability of dropping a direction's share of one token, in training.
    """

    method: ClassVar[str] = "SVFIT"
    title: ClassVar[str] = "SVFit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.05926"
    recommended_learning_rate: ClassVar[float] = 0.1

    r: int | Literal["full"] | None = field(default=None, metadata={"help": "Number of trained singular values, or 'full'."})
    energy: float | None = field(default=None, metadata={"help": "Choose r by the share of the squared norm."})
    max_r: int | None = field(default=None, metadata={"help": "Upper bound with `energy`."})
    svd: Literal["gram", "full", "lowrank"] = field(default="gram", metadata={"help": "How to decompose."})
    svd_niter: int = field(default=8, metadata={"help": "Power iterations of 'lowrank'."})
    seed: int = field(default=0, metadata={"help": "Seed of 'lowrank'."})
    svd_device: str = field(default="auto", metadata={"help": "Where to decompose."})
    scale: Literal["additive", "relative"] = field(default="additive", metadata={"help": "Train delta or delta / s."})
    nonnegative: bool = field(default=False, metadata={"help": "Keep singular values at or above zero."})
    save_basis: bool | Literal["auto"] = field(default="auto", metadata={"help": "Put the singular vectors into the file."})
    basis_dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(default="auto", metadata={"help": "Of the basis."})
    form: Form | Literal["auto"] = field(default="auto", metadata={"help": "How to compute the update."})
    bias: Literal["none", "all", "svfit_only"] = field(default="none", metadata={"help": "Biases that are trained too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.energy is not None:
            raise ValueError(f"r={self.r!r} and energy={self.energy!r}: give one of them, the other follows from the weight.")
        if self.r is None and self.energy is None:
            self.r = "full"
        for name, value in (("r", self.r), *self.rank_pattern.items()):
            if not (value is None or value == "full" or _is_positive(value)):
                raise ValueError(f"{name}={value!r}: `r` should be a positive integer value or 'full'.")
        for name in ("max_r", "svd_niter"):
            value = getattr(self, name)
            if not (value is None and name == "max_r") and not _is_positive(value):
                raise ValueError(f"{name}={value!r} should be a positive integer value.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy!r} is a share of the squared norm: it must be in (0, 1].")
        if self.max_r is not None and self.energy is None:
            raise ValueError(f"max_r={self.max_r!r} bounds what `energy` chooses; set `energy`, or `r` alone.")
        choices: dict[str, tuple[Any, ...]] = {
            "svd": ("gram", "full", "lowrank"),
            "scale": ("additive", "relative"),
            "save_basis": ("auto", True, False),
            "basis_dtype": ("auto", *DTYPES),
            "form": ("auto", *FORMS),
            "bias": ("none", "all", "svfit_only"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known. Accepted: {', '.join(map(repr, accepted))}.")
        if self.svd == "lowrank" and self.save_basis is False:
            raise ValueError(
                "svd='lowrank' finds another subspace each time: its basis must be in the file. Leave save_basis on."
            )
        if self.svd == "lowrank" and self.energy is not None:
            raise ValueError(
                "svd='lowrank' does not see the whole spectrum, so `energy` cannot be told. Use 'gram', or set `r`."
            )

    @property
    def keeps_basis(self) -> bool:
        """Whether the file has the basis; "auto" is decided when an adapter is put on a model."""
        return self.save_basis is not False


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def matrix_shape(geometry: Geometry) -> tuple[tuple[int, ...], int, int]:
    """How a weight is seen as matrices: (stack, rows, columns).

    A convolution is `[out, in * kernel]`, one matrix for each group; a stack of experts one for each; a vector one column.
    """
    shape = geometry.shape
    if geometry.kind == "weight":
        return (shape[:-2], shape[-2], shape[-1]) if len(shape) > 1 else ((), shape[0], 1)
    if geometry.groups > 1:
        return (geometry.groups,), shape[0] // geometry.groups, math.prod(shape[1:])
    return (), shape[0], math.prod(shape[1:])


class SvfitDelta(Delta):
    """One SVFit adapter on one weight.

    `shift` `[*, r]` is trained: delta, or z = delta / s. Frozen: `singular_values` s `[*, r]`; `probe` `[*, r]`, by which a
    basis that was made again is recognised; `basis` `[*, r, d]`, the singular vectors of the smaller side as rows. A stack of
    matrices has its own of each.
    """

    takes_over: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ("singular_values", "probe", "basis")

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.stack, self.rows, self.columns = matrix_shape(geometry)
        # Convolutions with a kernel, and embeddings, can be scaled at their output only; else the smaller side is cheaper.
        mixes_space = geometry.kind == "conv" and not (geometry.pointwise and geometry.groups == 1)
        self.left = mixes_space or geometry.kind == "embedding" or self.rows <= self.columns
        self.config = config
        self.method = "gram" if geometry.kind == "embedding" else config.svd
        limit = min(self.rows, self.columns)
        r = limit if config.r == "full" else min(config.r or config.max_r or limit, limit)
        self.register_buffer("basis", None, persistent=config.keeps_basis)
        self.register_buffer("counterpart", None, persistent=False)  # U^T W or (W V)^T, for the factored form only
        self._resize(r, kept=r if config.keeps_basis else 0)
        self._is_whole = False  # the basis is there and is known to fit
        self._is_shared = False
        self._has_moved = False
        self._counterpart_of: tuple[int, ...] | None = None  # address and versions of what it was made from

    if TYPE_CHECKING:  # a type checker cannot follow buffers
        basis: Tensor
        counterpart: Tensor | None
        singular_values: Tensor
        probe: Tensor

    def _resize(self, r: int, kept: int) -> None:
        self.shift = nn.Parameter(torch.zeros(*self.stack, r, dtype=torch.float32))
        self.register_buffer("singular_values", torch.zeros(*self.stack, r))
        self.register_buffer("probe", torch.zeros(*self.stack, r))
        width = self.rows if self.left else self.columns
        file_dtype = torch.float16 if self.config.keeps_basis else torch.float32
        self.basis = torch.zeros(*self.stack, kept, width, dtype=DTYPES.get(self.config.basis_dtype, file_dtype))

    @property
    def r(self) -> int:
        """Number of trained singular values."""
        return self.shift.shape[-1]

    # What depends on the weight ----------------------------------------------------------------------------------------

    def is_incomplete(self, saved: dict[str, Tensor] | None = None) -> bool:
        if torch.compiler.is_compiling():
            return self.basis.shape[-2] < self.r
        return saved is not None or not self._is_whole

    def prepare(self, weight: Weight, siblings: Sequence[Any], saved: dict[str, Tensor] | None = None) -> None:
        """Decompose the weight, or look along with an adapter that has done so; check it against a file's values.

        Cost: see `functional.svd.leading_singular`; none if a sibling has as many directions, or the file has the basis.
        """
        config = self.config
        from_file = saved is not None and bool((saved["singular_values"] != 0).any())
        if from_file and config.keeps_basis:
            self._share_equal(siblings)
            self._is_whole = True
            return
        alike = [other for other in siblings if self._is_alike(other) and other._is_filled()]
        if from_file:
            mine = [self] if self._is_filled() else []
            source = next((other for other in (*mine, *alike) if other.r >= self.r and self._fits(other, saved)), None)
        else:
            # a copy of an adapter, as of a policy for its reference, must find the basis of that one, whatever base it is from
            alike = [other for other in alike if other._is_trusted()]
            alike.sort(key=lambda other: not config.is_like(other.config))
            known = config.r is not None or saved is not None  # ranks by energy are decided when an adapter is made, not later
            source = next((other for other in alike if known and other.r >= self.r), None)
        if source is None:
            self._decompose(weight(), from_file, saved, decide=saved is None)
            self._share_equal(alike)
        elif source is not self:
            self._look_along(source, from_file)
        if config.init_weights is False and not from_file and not self.shift.any():  # else somebody copied values into it
            z = 0.5 * torch.randn_like(self.shift)
            self.shift.data.copy_(z if config.scale == "relative" else z * self.singular_values)
        self._is_whole = True

    def _is_filled(self) -> bool:
        return self.basis.shape[-2] == self.r and bool((self.basis != 0).any())

    def _is_trusted(self) -> bool:
        """Whether the basis belongs to the values: it was made of the weight, or came with them in a file."""
        return self._is_whole or (self.config.keeps_basis and bool(self.singular_values.any()))

    def _is_alike(self, other: Any) -> bool:
        mine, theirs = self.config, other.config
        names = ["basis_dtype", "keeps_basis", *(("svd_niter", "seed") if self.method == "lowrank" else ())]
        return self.method == other.method and all(getattr(mine, name) == getattr(theirs, name) for name in names)

    def _fits(self, source: SvfitDelta, saved: Any) -> bool:
        values, basis = source.singular_values[..., : self.r], source.basis[..., : self.r, :]
        return svd.differs(values, svd.probe(basis), saved["singular_values"], saved["probe"], basis.dtype) is None

    def _share_equal(self, siblings: Sequence[Any]) -> None:
        """One basis for all adapters of a weight: the leading rows of the largest, where they are the same bits."""
        for other in siblings:
            small, large = sorted((self, other), key=lambda delta: delta.basis.shape[-2])
            rows = large.basis[..., : small.basis.shape[-2], :]
            if rows.numel() and small.basis.dtype == rows.dtype and torch.equal(small.basis, rows):
                small.basis, small._is_shared, large._is_shared = rows, True, True

    def _look_along(self, source: SvfitDelta, from_file: bool) -> None:
        if not from_file:
            self.singular_values = source.singular_values[..., : self.r].clone()
            self.probe = source.probe[..., : self.r].clone()
        self.basis = source.basis[..., : self.r, :]  # a view: adapters of one weight share their directions
        self._is_shared = source._is_shared = True

    def _decompose(self, weight: Tensor, from_file: bool, saved: Any, decide: bool) -> None:
        config = self.config
        matrix = weight.reshape(*self.stack, self.rows, self.columns)
        side: svd.Side = "left" if self.left else "right"
        options = (side, self.method, config.svd_niter, config.seed, config.svd_device)
        found = svd.leading_singular(matrix, self.r, *options)  # type: ignore[arg-type]
        if config.r is None and decide:
            total = float(matrix.double().square().sum())
            r = svd.rank_for_energy(found.values, config.energy, total) or self.r  # None: `max_r` holds less
            found = svd.Singular(found.values[..., :r], found.basis[..., :r, :].clone())
            if r != self.r:
                device = self.shift.device
                self._resize(r, kept=0)
                self.shift.data = self.shift.data.to(device)
        probe = svd.probe(found.basis)
        if from_file:
            problem = svd.differs(found.values, probe, saved["singular_values"], saved["probe"])
            if problem:
                raise ValueError(
                    f"the adapter was trained on a base with other bits: {problem}. Load the base in the dtype, and without "
                    f"the quantisation, that it was trained with (this weight is {weight.dtype}), or load the adapter there "
                    f"through PeftModel and save it with its basis: `model.keep_basis()`, then `model.save_pretrained(...)`."
                )
        else:
            self.singular_values, self.probe = found.values.float(), probe.float()
        narrow = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
        automatic = torch.float16 if config.keeps_basis else narrow
        self.basis = found.basis.to(DTYPES.get(config.basis_dtype, automatic))

    def lowered(self) -> int | None:
        given = self.config.r
        return self.r if isinstance(given, int) and self.r < given else None

    def decided(self) -> dict[str, Any]:
        return {"r": self.r} if self.config.r is None else {}

    # How it is kept ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Values that arrive may belong to another base, which may arrive with them: look again at the next use."""
        self._is_whole, self._has_moved, self.counterpart = False, False, None
        if f"{prefix}basis" in state_dict and self._is_shared:
            self.basis, self._is_shared = self.basis.clone(), False  # values are copied in place, and others look along
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_shared and not keep_vars and f"{prefix}basis" in destination:  # files know no views of one storage
            destination[f"{prefix}basis"] = destination[f"{prefix}basis"].clone(memory_format=torch.contiguous_format)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts of a model leave s and the probe in float32: by them a base is recognised."""
        kept = {name: getattr(self, name) for name in ("singular_values", "probe")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16) and not before.is_meta:
                setattr(self, name, before.to(after.device))
        return self

    # The update --------------------------------------------------------------------------------------------------------

    def relative(self) -> Tensor:
        """z = delta / s `[*, r]`; 0 for a direction that the weight does not have."""
        z = self.shift.to(torch.promote_types(self.shift.dtype, torch.float32))
        if self.config.scale == "additive":
            z = z * svd.inverse(self.singular_values, max(self.rows, self.columns))
        return z.clamp(min=-1) if self.config.nonnegative else z

    def call(self, base_layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with W' in the form that `choose_form` finds cheapest.

        Output side y0 + U (z * U^T (y0 - b)) where there are no more outputs than inputs, input side W (x + V (z * V^T x)) + b
        where there are more. The base layer is called as it is, also a quantised one. Keeps `[n, r]` for backward, not x.
        """
        geometry, z = self.geometry, self.relative()
        z = z if self.multiplier == 1 else z * self.multiplier
        dropout = self.dropout if self.training else 0.0
        if geometry.kind == "linear":
            form = self._form(base_layer, x, dropout)
            bias = getattr(base_layer, "bias", None)
            if form == "factored":
                counterpart = self._counterpart(geometry.canonical(base_layer.weight), base_layer.weight._version)
                down, up = (counterpart, self.basis) if self.left else (self.basis, counterpart)
                return factored_linear(x, bias, down, up, z, dropout)
            if form == "built":
                return built_linear(x, geometry.canonical(base_layer.weight), bias, self.basis, z, self.left)
        if geometry.kind != "conv":
            if self.left:  # the bias is read after the call, with which ZeRO-3 would release it
                y0 = base_layer(x, *args, **kwargs)
                return scale_rows(y0, self.basis, z, bias_of(base_layer), dropout)
            return base_layer(scale_rows(_as_under_autocast(x), self.basis, z, None, dropout), *args, **kwargs)
        if x.ndim == len(geometry.kernel) + 1:  # one sample without a batch axis
            return self.call(base_layer, x[None], *args, **kwargs)[0]
        stack = (self.basis, z) if self.stack else (self.basis[None], z[None])
        if self.left:
            y0 = base_layer(x, *args, **kwargs)
            return scale_channels(y0, *stack, bias_of(base_layer), dropout)
        return base_layer(scale_channels(_as_under_autocast(x), *stack, None, dropout), *args, **kwargs)

    def _form(self, base_layer: Any, x: Tensor, dropout: float) -> Form:
        config, weight, tokens = self.config, base_layer.weight, x.numel() // max(1, x.shape[-1])
        plain = (
            not (self.geometry.quantized or autocasts(x) or weight.is_meta or weight.requires_grad) and x.dtype == weight.dtype
        )
        possible = {"one-sided": True, "built": plain and not dropout, "factored": plain and self._may_factor(x)}
        if config.form != "auto":
            return config.form if possible[config.form] else "one-sided"
        train = torch.is_grad_enabled()  # a frozen adapter computes what a trained one does, and may pass a gradient on
        return choose_form(tokens, self.rows, self.columns, self.r, train, possible["built"], possible["factored"])

    def _may_factor(self, x: Tensor) -> bool:
        """A full basis, in float32: in a narrower dtype the factors would not be the weight. Not before the adapter has moved:
        its start must be the base to the bit. Not in a compiled graph, which cannot ask whether it has.
        """
        full = self.r == min(self.rows, self.columns) >= 64 or self.config.form == "factored"
        if torch.compiler.is_compiling() or not full or {x.dtype, self.basis.dtype} != {torch.float32}:
            return False
        if not self._has_moved:
            self._has_moved = bool(self.shift.detach().any())
        return self._has_moved and self.r == min(self.rows, self.columns)

    @torch.no_grad()
    def _counterpart(self, weight: Tensor, version: int) -> Tensor:
        """U^T W `[k, in]`, or (W V)^T `[k, out]`; made again when the weight was written to (which `.data` hides)."""
        made_of, counterpart = (weight.data_ptr(), version, self.basis._version), self.counterpart
        if counterpart is None or self._counterpart_of != made_of:
            self._counterpart_of = None  # another thread may come between what is set here
            self.counterpart = counterpart = self.basis @ (weight if self.left else weight.t())
            self._counterpart_of = made_of
        return counterpart

    def delta_weight(self, weight: Weight) -> Tensor:
        whole = weight()
        matrix = whole.reshape(*self.stack, self.rows, self.columns)
        matrix = matrix.to(torch.promote_types(torch.promote_types(matrix.dtype, self.shift.dtype), torch.float32))
        return scale_matrix(matrix, self.basis, self.relative(), self.left).reshape(whole.shape)

    @torch.no_grad()
    def lora_factors(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """B = U, A = z U^T W (or B = W V z, A = V^T): exact, no SVD; rank = how many directions have moved."""
        if self.geometry.kind == "weight" or self.stack or self.geometry.transposed:
            return None
        z, whole = self.relative(), weight()
        moved = z.nonzero()[:, 0] if z.any() else torch.zeros(1, dtype=torch.long, device=z.device)
        rows, z = self.basis.double()[moved], z.double()[moved]
        matrix = whole.reshape(self.rows, self.columns).double()
        down, up = (z[:, None] * (rows @ matrix), rows.t()) if self.left else (rows, matrix @ rows.t() * z)
        return down.float().reshape(-1, *whole.shape[1:]), up.float()

    @classmethod
    @torch.no_grad()
    def combine(cls, deltas: list[SvfitDelta], weights: list[float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """delta = sum_a w_a delta_a in the common basis. Exact."""
        first, widest = deltas[0], max(deltas, key=lambda delta: delta.r)
        total = torch.zeros_like(widest.singular_values, dtype=torch.float64)
        for delta, weight in zip(deltas, weights, strict=True):
            common = widest.basis[..., : delta.r, :]
            if delta.basis.dtype != common.dtype or not torch.equal(delta.basis, common):
                raise ValueError(
                    "the adapters have different bases (another svd, seed, basis_dtype or base): their sum is no SVFit "
                    "adapter. Merge them into the model one after the other instead."
                )
            total[..., : delta.r] += weight * delta.relative().double() * delta.singular_values.double()
        z = total * svd.inverse(widest.singular_values.double(), max(first.rows, first.columns))
        if first.config.nonnegative and bool((z < -1).any()):
            raise ValueError("the sum has negative singular values, which nonnegative=True does not allow.")
        tensors = {"shift": z if first.config.scale == "relative" else total}
        names = cls.frozen if first.config.keeps_basis else cls.frozen[:2]
        return {"r": widest.r}, {**tensors, **{name: getattr(widest, name) for name in names}}


def _as_under_autocast(x: Tensor) -> Tensor:
    """In the dtype that the base layer will compute in anyway."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) and x.dtype != torch.float64 else x


class SvfitModel(SubspaceModel):
    """The tuner of SVFit."""

    prefix = "svfit_"
    delta_cls = SvfitDelta
    peft_config: dict[str, SvfitConfig]

    def _prepare_targets(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        """Decide "auto" of `save_basis`: it fixes what the file holds, so it must be known before the first tensor is made."""
        if config.save_basis != "auto":
            return
        geometries = {(name, weight): g for name, weights in targets.items() for weight, g in weights.items()}
        with torch.device("meta"):
            size = sum(
                2 * math.prod(self.delta_cls(geometry, config.for_layer(*key)).basis.shape)
                for key, geometry in geometries.items()
            )
        needed = config.svd == "lowrank" or any(geometry.quantized for geometry in geometries.values())
        config.save_basis = needed or (config.r != "full" and size <= SMALL)

    def keep_basis(self, adapter_name: str | None = None, keep: bool = True) -> None:
        """Decide anew whether saving writes the basis, for an adapter that is loaded.

        Args:
            adapter_name: the adapter, None for the active one.
            keep: True makes the file independent of the base's bits (another dtype, a quantised base); False makes it small.

        Raises:
            ValueError: a low-rank basis, which cannot be made again.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = self.config_of(adapter_name)
        if not keep and config.svd == "lowrank":
            raise ValueError("svd='lowrank' finds another subspace each time: its basis must be in the file.")
        layers = [layer for _, layer in self.named_subspace_layers() if layer.has_adapter(adapter_name)]
        for layer in layers:
            layer.complete(adapter_name)
        deltas = [delta for layer in layers for delta in layer.deltas(adapter_name).values()]
        dtypes = {delta.basis.dtype for delta in deltas}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # one for the file, and no layer may lose bits
        dtype = torch.float32 if dtype == torch.float64 else dtype
        for delta in deltas:
            delta.register_buffer("basis", delta.basis.to(dtype), persistent=keep)
        for each in (config, *(delta.config for delta in deltas)):
            each.basis_dtype, each.save_basis = str(dtype).removeprefix("torch."), keep


register(SvfitConfig, SvfitModel)
