"""Concrete: a learned mask, shared by all task vectors, that merges them without interference.

    W = W_0 + m / mean(m) * sum_t lambda_t tau_t        m: a mask with one logit for each entry; a Concrete sample in training

Source: Tang et al., "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion"
(arXiv:2312.06173), and its official code; the paper's tables could not be read. What differs is in docs/concrete.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Delta, Geometry
from ..base.active import OfAdapter
from ..base.delta import Weight
from ..base.kinds import OwnWeightLayer
from ..functional import composition
from ..functional.bits import pack_bits, unpack_bits
from ..functional.choices import CHOICES
from ..functional.composition import Dense, LowRank, Vector
from ..functional.concrete_mask import Mask, Masked, add_weighted, masked_sum
from ..functional.groups import along_axis, groups_from
from ..functional.noise import fingerprint
from ..registration import register
from ..task_vectors.bundles import file_name
from ..task_vectors.pool import DTYPES
from .blocks import OpenedPool
from .pooled import PooledConfig, PooledModel, add_directions, is_integer, is_number, save_task_vector_file


@dataclass
class ConcreteConfig(PooledConfig):
    """Concrete: `W' = W + m / mean(m) * sum_t lambda_t tau_t`; the mask's logits are trained, on request lambda too.

    Args:
        granularity: what has a logit of its own: "element" (an entry; the paper), "row" or "column" (an output or input
            channel; of a vector an entry), "rank" (a direction of the task vectors where all have factors, else an entry; not
            in the paper; on linear layers no weight is made).
        temperature: T of the samples in training. Near 0 they are near 0 or 1, at 1 they are spread.
        init: start value of the logits. With equal logits the mean mask changes nothing: it starts as task arithmetic.
        coefficients: lambda at the start, or name of a vector -> value (0 for the others).
        learn_coefficients: None keeps lambda; "task" trains one for each vector, "layer" one for each vector and parameter.
        clamp_coefficients: keep trained lambdas in [0, 1]: one outside counts as the nearest end and gets no gradient.
        rescale: divide the mask by its mean over each tensor.
        stochastic: train on samples of the mask; False trains the evaluation mask itself, without noise.
        train_mask: train the logits; False keeps them, and takes the evaluation mask in training too.
        eval_mask: outside of training: "mean" (sigmoid of the logits), "sample" (one drawn with `seed`), "hard" (1 where the
            logit is not negative).
        seed: of all samples.
        save_mask: what the file has: logits in "float32", with which a run can go on from a checkpoint to the same bits; in
            "bfloat16", where the rounded logits count in evaluation too, so that a loaded adapter gives the same bits; or the
            "hard" mask with one bit for each logit. `save_mask_as` changes it before the last save.
        pool, base, exclude_pool, block_types, vector_dtype, placement, max_vector_bytes, strict, provenance: of `PooledConfig`.
    """

    method: ClassVar[str] = "CONCRETE"
    title: ClassVar[str] = "Concrete"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.06173"
    recommended_learning_rate: ClassVar[float] = 1e-3

    granularity: Literal["element", "row", "column", "rank"] = field(
        default="element", metadata={"help": "What has a logit of its own."}
    )
    temperature: float = field(default=0.5, metadata={"help": "Of the samples in training."})
    init: float = field(default=0.0, metadata={"help": "Start value of the logits."})
    coefficients: float | dict[str, float] = field(default=0.3, metadata={"help": "Lambda at the start."})
    learn_coefficients: Literal["task", "layer"] | None = field(default=None, metadata={"help": "Which lambdas are trained."})
    clamp_coefficients: bool = field(default=True, metadata={"help": "Keep trained lambdas in [0, 1]."})
    rescale: bool = field(default=True, metadata={"help": "Divide the mask by its mean over each tensor."})
    stochastic: bool = field(default=True, metadata={"help": "Train on samples of the mask."})
    train_mask: bool = field(default=True, metadata={"help": "Train the logits."})
    eval_mask: Literal["mean", "sample", "hard"] = field(default="mean", metadata={"help": "The mask outside of training."})
    seed: int = field(default=0, metadata={"help": "Of all samples."})
    save_mask: Literal["float32", "bfloat16", "hard"] = field(default="float32", metadata={"help": "What the file has."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES["concrete"])
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r} must be a positive number; the paper has 0.5.")
        self.check_kind("seed", is_integer(self.seed), "an integer")
        self.check_kind("init", is_number(self.init), "a finite number")
        starts = self.coefficients.values() if isinstance(self.coefficients, dict) else [self.coefficients]
        self.check_kind("coefficients", all(map(is_number, starts)), "a finite number, or a table of them by name,")
        for name in ("clamp_coefficients", "rescale", "stochastic", "train_mask"):
            self.check_kind(name, isinstance(getattr(self, name), bool), "True or False")
        self.check_in_pool("coefficients", self.coefficients if isinstance(self.coefficients, dict) else ())
        if self.save_mask == "hard" and self.eval_mask != "hard":
            raise ValueError(
                f"save_mask='hard' keeps which logits are not negative, and eval_mask={self.eval_mask!r} needs their values. "
                f"Set eval_mask='hard' too, or save_mask='bfloat16'."
            )

    def start(self) -> list[float]:
        """Start value of every vector's coefficient."""
        given = self.coefficients
        return [float(given.get(name, 0.0) if isinstance(given, dict) else given) for name in self.vector_names]

    @property
    def has_bits(self) -> bool:
        """Whether an adapter of this config comes with a packed mask instead of logits."""
        return self.is_from_file and self.save_mask == "hard"


class ConcreteDelta(Delta):
    """The mask of one parameter.

    Tensors: `logits`, in the parameter's own layout, or one for each row, column or direction, float32; from a file with a hard
    mask `mask` instead, uint8, 8 logits each. `coefficients` `[T]`, float32. Parameters where they are trained, else buffers.
    Layers that share a parameter look at the tensors of the first of them.
    """

    composes_weight: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.names: list[str] = config.vector_names
        self.config = config
        opened: OpenedPool | None = config.opened
        self.pool = None if opened is None else opened.pool
        self.block = config.block if opened is None else opened.source_of(config.block)
        self.vectors: list[Vector | None] | None = None
        self.folded: tuple[Any, ...] | None = None  # what the fixed coefficients were when the vectors were summed
        self.shape = tuple(geometry.native(torch.empty(geometry.shape, device="meta")).shape)
        self.by_rank: bool = config.granularity == "rank" and opened is not None and opened.is_low_rank(config.block)
        self.spec = groups_of(geometry, config.granularity)
        self.groups = None if self.spec is None else groups_from(self.spec, self.shape)
        self.parameter_name: str = config.block  # `block` is the name of a tied tensor that the pool knows
        self.learns_mask: bool = config.train_mask and not config.has_bits
        leader = self if opened is None else opened.leaders.setdefault(("mask", self.block), self)
        if leader is not self:
            self.__dict__["leader"] = leader  # not a child: its tensors are in the file once, and have one place in the model
            return
        self._make_mask(config, self._logit_shape())
        self._make_coefficients(config, opened)

    def _logit_shape(self) -> tuple[int, ...]:
        if self.by_rank and self.pool is not None:
            return (sum(self.pool.ranks(self.block)),)
        return self.shape if self.groups is None else (self.groups.count,)

    def _make_mask(self, config: Any, shape: tuple[int, ...]) -> None:
        if config.has_bits:
            self.register_buffer("mask", torch.zeros(-(-math.prod(shape) // 8), dtype=torch.uint8))
            self.logit_count = math.prod(shape)
            return
        logits = torch.full(shape, float(config.init))
        if not config.init_weights:
            logits = logits + torch.randn(shape)
        if config.train_mask:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)

    def _make_coefficients(self, config: Any, opened: OpenedPool | None) -> None:
        start = torch.tensor(config.start(), dtype=torch.float32)
        if config.learn_coefficients is None:
            self.register_buffer("coefficients", start)
            return
        tie = "*" if config.learn_coefficients == "task" else self.block
        owner = self if opened is None else opened.leaders.setdefault(("coefficients", tie), self)
        if owner is self:
            self.coefficients = nn.Parameter(start)
        else:
            self.__dict__["other_owner"] = owner

    @classmethod
    def check(cls, geometry: Geometry, config: Any) -> None:
        """A quantised weight cannot be composed."""
        by_rank = config.granularity == "rank" and config.opened.is_low_rank(config.block)
        if geometry.quantized and not by_rank:
            raise ValueError(
                "the weight is quantised and cannot be composed with masked task vectors. Use LoRA adapters as task vectors "
                "with granularity='rank', or load the base unquantised."
            )

    @classmethod
    def frozen_in(cls, config: Any) -> tuple[str, ...]:
        """The packed mask, and what the config does not train."""
        mask = () if config.train_mask else ("logits",)
        return ("mask", *mask, *(() if config.learn_coefficients else ("coefficients",)))

    @classmethod
    def applies(cls, config: Any) -> bool:
        return config.opened is None or config.block in config.opened.blocks

    def file_entry(self, places: Mapping[Any, str]) -> dict[str, Any]:
        """Where the file has the mask and the coefficients of this parameter; see `PooledModel`."""
        entry: dict[str, Any] = {"name": self.block, "mask": places[self.owner]}
        entry["coefficients"] = f"{places[self.coefficient_owner]}.coefficients"
        entry |= {} if self.spec is None else {"groups": self.spec}
        return entry | ({"by_rank": True} if self.by_rank else {})

    # Values ------------------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> ConcreteDelta:
        """The Delta with the tensors of this parameter."""
        found: ConcreteDelta = self.__dict__.get("leader", self)
        return found

    @property
    def trained(self) -> tuple[Tensor, ...]:
        owner = self.owner
        return (owner.bits if owner.bits is not None else owner.logits, self.coefficient_owner.coefficients)

    @property
    def bits(self) -> Tensor | None:
        """The packed mask of a file that has no logits."""
        found = self._buffers.get("mask")
        return found

    @property
    def coefficient_owner(self) -> ConcreteDelta:
        """The Delta with the coefficients."""
        found: ConcreteDelta = self.owner.__dict__.get("other_owner", self.owner)
        return found

    def values(self) -> Tensor:
        """lambda `[T]`, with the constraint."""
        coefficients = self.trained[1]
        learned = isinstance(coefficients, nn.Parameter)
        return coefficients.clamp(0, 1) if learned and self.config.clamp_coefficients else coefficients

    def as_plain_sum(self) -> list[float] | None:
        """With equal logits, whose mask is 1 once it is divided by its mean; one that lets nothing through is 0."""
        if self.config.eval_mask == "sample" or not self.config.rescale:
            return None
        logits = self.flat_logits()
        if bool((logits != logits[:1]).any()):
            return None
        closed = self.config.eval_mask == "hard" and bool((logits < 0).any())
        return [0.0 if closed else value for value in self.values().tolist()]

    def flat_logits(self) -> Tensor:
        """The logits as they count in evaluation, flat; of a packed mask 1 and -1."""
        owner = self.owner
        if owner.bits is not None:
            return unpack_bits(owner.bits, owner.logit_count).to(torch.float32).mul_(2).sub_(1)
        flat = owner.logits.reshape(-1)
        return flat.to(torch.bfloat16) if self.config.save_mask == "bfloat16" else flat

    def current_mask(self) -> Mask:
        """The mask of this moment: in training a sample, which belongs to the seed, the parameter and the logits as they are.

        So all batches of a step see one mask, all processes the same, and a run that goes on draws what it would have drawn.
        """
        owner = self.owner
        if not (self.training and owner.learns_mask and self.config.stochastic):
            return self.eval_mask()
        if torch.compiler.is_compiling():  # a number of the sample in the graph would make a graph of each
            return Mask(owner.logits.detach().reshape(-1), "sample", self.config.temperature)
        flat = owner.logits.detach().reshape(-1)
        return Mask(flat, "sample", self.config.temperature, (self.config.seed, owner.block), salt=fingerprint(flat))

    def eval_mask(self) -> Mask:
        """The mask outside of training."""
        stream = (self.config.seed, self.owner.block, "evaluation")
        kind = self.config.eval_mask
        return Mask(self.flat_logits().detach(), kind, self.config.temperature, stream, portable=True)

    # The vectors -------------------------------------------------------------------------------------------------------

    def is_incomplete(self, saved: dict[str, Tensor] | None = None) -> bool:
        return self.owner.vectors is None or (saved is not None and self.owner is self)

    def prepare(self, weight: Weight, siblings: Sequence[Any], saved: dict[str, Tensor] | None = None) -> None:
        """Get the vectors: those that another adapter has, by reference, or out of their files.

        Fixed coefficients are multiplied in once, one vector after the other: memory does not depend on their number.
        """
        if self.owner is not self:
            self.owner.prepare(weight, ())
            return
        if saved is None:
            self._take_frozen(siblings)
        fixed = not isinstance(self.trained[1], nn.Parameter)
        numbers = (saved or {}).get("coefficients", self.trained[1])
        folds = fixed and not self.by_rank
        self.folded = tuple(numbers.tolist()) if folds else None
        for other in (sibling.owner for sibling in siblings):
            alike = other.folded == self.folded and other.by_rank == self.by_rank and other.vectors is not None
            if alike and _same_vectors(self, other) and _kept(other.config) == _kept(self.config):
                self.vectors = other.vectors
                return
        if self.pool is not None:
            found = self.pool.each(self.block)
            self.vectors = [_folded(found, list(self.folded), self.shape, self.config)] if self.folded else list(found)

    @torch.no_grad()
    def _take_frozen(self, siblings: Sequence[Any]) -> None:
        """A further adapter of a config that is in use has the same mask and coefficients where it does not train them.

        A copy of the trained values, as of a policy for its reference, then is that adapter.
        """
        for other in (sibling.owner for sibling in siblings if self.config.is_like(sibling.config)):
            for name, buffer in self._buffers.items():
                theirs = other._buffers.get(name)
                if buffer is not None and theirs is not None and theirs.shape == buffer.shape:
                    buffer.copy_(theirs)
            return

    def _masked(self, mask: Mask) -> Masked:
        numbers = None if self.owner.folded else self.values().detach().clone()
        return Masked(mask, self._loaded(), numbers, self.groups, self.config.rescale)

    def _loaded(self) -> list[Vector | None]:
        vectors = self.owner.vectors
        assert vectors is not None  # a layer completes its adapters before it uses them
        return vectors

    def masked_vector(self, number: int) -> Tensor | None:
        """m / mean(m) * tau of one vector with the evaluation mask, in the parameter's own layout; None where it has none."""
        if self.pool is None:
            raise ValueError(f"{self.block}: this copy of the model has no pool. Load the adapter again.")
        vector = self.pool.one(self.block, number)
        if vector is None:
            return None
        total = torch.zeros(self.shape)
        Masked(self.eval_mask(), [vector], None, self.groups, self.config.rescale).accumulate(total)
        return total

    # The update --------------------------------------------------------------------------------------------------------

    @property
    def adds(self) -> bool:
        """Masked directions on a layer that is called: B (m * lambda * (A x)) costs less than a weight."""
        called = self.geometry.kind in ("linear", "embedding") and not self.geometry.reads_own_weight
        return self.by_rank and called

    def accumulate(self, total: Tensor) -> None:
        if self.by_rank:
            left, right, scale = self._directions(self.current_mask())
            total.view(left.shape[0], -1).addmm_(left.to(total) * scale.to(total), right.to(total))
        else:
            self._masked(self.current_mask()).accumulate(total)

    def pull_back(self) -> Callable[[Tensor], Sequence[Tensor | None]]:
        """See `functional.concrete_mask`."""
        if self.by_rank:
            return partial(self._pulled_directions, *self._directions())
        mask, logits = self.current_mask(), self.trained[0]
        return partial(self._pulled, self._masked(mask), logits, logits._version, mask.kind != "hard")

    def _pulled(self, masked: Masked, logits: Tensor, version: int, has_slope: bool, grad: Tensor) -> list[Tensor | None]:
        if logits._version != version:
            raise RuntimeError(
                f"{self.block}: the logits of its mask were changed between forward and backward, which makes the mask again "
                f"from them. Call backward before the optimizer's step."
            )
        numbers = self.trained[1]
        found, products = masked.pull_back(grad, logits.requires_grad and has_slope, numbers.requires_grad)
        if products is not None:
            inside = (numbers == self.values()).to(products.device)
            products = (products * inside).to(numbers)
        return [None if found is None else found.view(logits.shape).to(logits.dtype), products]

    def _pulled_directions(self, left: Tensor, right: Tensor, scale: Tensor, grad: Tensor) -> list[Tensor | None]:
        """dL/dscale[r] = left[:, r]^T G right[r]; the rest is R numbers, which autograd takes care of."""
        grad = (grad.to_dense() if grad.is_sparse else grad).reshape(left.shape[0], -1).to(left.dtype)
        products = ((left.t() @ grad) * right).sum(1)
        wanted = [tensor for tensor in self.trained if tensor.requires_grad]
        found = iter(torch.autograd.grad(scale, wanted, products.to(scale.dtype), retain_graph=True, allow_unused=True))
        return [next(found) if tensor.requires_grad else None for tensor in self.trained]

    def _directions(self, mask: Mask | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Stacked factors `[rows, R]`, `[R, columns]`, and m / mean(m) * lambda of every direction `[R]`.

        With a graph for the last, if no mask is given.
        """
        m = self._graph_mask() if mask is None else mask.values()
        m = m / m.mean().clamp_min(torch.finfo(m.dtype).tiny) if self.config.rescale else m
        left, right, ranks = composition.stacked(self._loaded(), m)
        return left, right, m * composition.spread(self.values(), ranks).to(m.dtype)

    def _graph_mask(self) -> Tensor:
        """m of all logits, with a graph."""
        mask, logits = self.current_mask(), self.trained[0]
        m = mask.values()
        if mask.kind == "hard":
            return m
        m = m.to(torch.promote_types(logits.dtype, torch.float32))
        # the kernel's own values, with the gradient that they have: dm/dx times what goes into x
        slope = mask.slope(m)
        x = logits.reshape(-1).to(m.dtype)
        return m + slope * (x - x.detach())

    def forward(self, x: Tensor, y0: Tensor, out: Tensor) -> Tensor:
        """out + B (m * lambda * (A x)) with the stacked factors of all vectors.

        Cost: 2 n R (in + out) flops for n rows and R = sum of the ranks; keeps `[n, R]` for backward.
        """
        left, right, scale = self._directions()
        return add_directions(self.geometry, x, out, left.to(out.dtype), right.to(out.dtype), scale)

    def delta_weight(self, weight: Weight) -> Tensor:
        """The update with the evaluation mask, also in training: a merged model is no sample."""
        training, self.training = self.training, self.training and torch.compiler.is_compiling()
        try:
            return self.geometry.canonical(self._dense())
        finally:
            self.training = training

    def _dense(self) -> Tensor:
        if self.by_rank:
            left, right, scale = self._directions()
            return ((left * scale) @ right).view(self.shape)
        logits = self.trained[0]
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # the very operations of `accumulate`
            total = torch.zeros(self.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
            self._masked(self.current_mask()).accumulate(total)
            return total
        wide = torch.promote_types(logits.dtype, torch.float32)
        numbers = logits.new_ones(1, dtype=wide) if self.owner.folded else self.values()
        delta = composition.combination(self._loaded(), numbers, self.shape)
        m = self._graph_mask()
        if self.groups is not None:
            m = m[self.groups.part(0, delta.numel(), m.device)]
        return masked_sum(delta.view(-1), m.to(delta.dtype), self.config.rescale).view(self.shape)

    @classmethod
    def combine(cls, deltas: list[Any], weights: list[float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Two masks have no sum that is one."""
        raise ValueError(
            "each Concrete adapter has a mask of its own, and their weighted sum is no adapter of that kind. Activate several, "
            "which adds them up, or write each with save_task_vector and merge the files."
        )

    @torch.no_grad()
    def lora_factors(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """Stacked factors with the scale of every direction multiplied in, for "rank"; else there are none."""
        if not self.adds or self.geometry.kind != "linear":
            return None
        left, right, scale = self._directions(self.eval_mask())
        down, up = right, left * scale
        return (up.t(), down.t()) if self.geometry.swapped else (down, up)


def groups_of(geometry: Geometry, granularity: str) -> dict[str, Any] | None:
    """The rows or columns that have logits of their own, for `groups_from` and the file; None where every entry has one."""
    axis = {"row": 0, "column": 1}.get(granularity)
    if axis is None or len(geometry.shape) < 2:
        return None
    return along_axis(geometry, axis)


def _same_vectors(one: ConcreteDelta, other: ConcreteDelta) -> bool:
    """Whether two adapters have the same files by the same names; a copy without a pool goes by the names."""
    if one.names != other.names or one.pool is None or other.pool is None:
        return one.names == other.names
    return [(e.digest, e.places) for e in one.pool.entries] == [(e.digest, e.places) for e in other.pool.entries]


def _kept(config: Any) -> tuple[Any, ...]:
    return config.vector_dtype, config.placement


@torch.no_grad()
def _folded(vectors: Any, numbers: list[float], shape: tuple[int, ...], config: Any) -> Vector:
    """sum_t lambda_t tau_t: as stacked factors if all are of low rank, else dense; no vector is held beside it."""
    total: Tensor | None = None
    factors: list[LowRank] = []
    for number, vector in zip(numbers, vectors, strict=True):
        if number == 0 or vector is None:
            continue
        if isinstance(vector, LowRank) and total is None:
            factors.append(LowRank(vector.left * number, vector.right))
            continue
        total = torch.zeros(math.prod(shape)) if total is None else total
        add_weighted(total, vector, number)
    if total is None:
        if not factors:
            return Dense(torch.zeros(math.prod(shape)))
        return LowRank(torch.cat([f.left for f in factors], 1), torch.cat([f.right for f in factors]))
    for vector in factors:
        add_weighted(total, vector, 1.0)
    scale = float(total.abs().max()) if config.vector_dtype == "float16" else 1.0
    return Dense((total / (scale or 1.0)).to(DTYPES[config.vector_dtype]), scale, config.placement == "device")


class ConcreteModel(PooledModel):
    """The tuner of Concrete."""

    prefix = "concrete_"
    delta_cls = ConcreteDelta

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The tensors of the file: logits in the dtype, or packed to the bits, that the config asks for."""
        found = {}
        for key, tensor in super()._get_adapter_state_dict(model, config, *args, **kwargs).items():
            if not key.endswith(".logits"):
                found[key] = tensor
            elif config.save_mask == "hard":
                found[key.removesuffix("logits") + "mask"] = pack_bits(tensor >= 0)
            else:
                found[key] = tensor.to(getattr(torch, config.save_mask))
        return found

    def _deltas(self, adapter_name: str) -> list[ConcreteDelta]:
        """Those with tensors of their own."""
        return [delta for delta in self.deltas(adapter_name) if delta.owner is delta]

    def sample_mask(self, mode: bool, adapter_name: str | None = None) -> None:
        """Sample the mask as in training, or not, whatever mode the rest of the model (its dropout) is in."""
        adapter_name = self.chosen_adapter(adapter_name)
        for delta in self.deltas(adapter_name):
            delta.train(mode)
        self._forget_weights()

    def freeze_mask(self, adapter_name: str | None = None) -> None:
        """End the training of the logits: from now on the evaluation mask is used in training too, for the coefficients."""
        adapter_name = self.chosen_adapter(adapter_name)
        self.config_of(adapter_name).train_mask = False
        for delta in self._deltas(adapter_name):
            delta.learns_mask = delta.config.train_mask = False
            if "logits" in delta._parameters:
                logits = delta._parameters.pop("logits")
                assert logits is not None
                delta.register_buffer("logits", logits.detach())
        self._forget_weights()

    def set_eval_mask(self, kind: str, adapter_name: str | None = None) -> None:
        """Change the mask outside of training: "mean", "sample" or "hard", as `eval_mask` of the config.

        Raises:
            ValueError: another kind, or one that needs logits where only hard bits are there or will be saved.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = self.config_of(adapter_name)
        if config.save_mask == "hard" and kind != "hard":
            raise ValueError(
                f"eval_mask={kind!r} needs logits, and save_mask='hard' keeps their signs alone. Call save_mask_as first, or "
                f"load a file with logits."
            )
        accepted = CHOICES["concrete"]["eval_mask"]
        if kind not in accepted:
            raise ValueError(f"eval_mask={kind!r} is not known. Accepted: {', '.join(map(repr, accepted))}.")
        for each in (config, *(delta.config for delta in self.deltas(adapter_name))):
            each.eval_mask = kind
        self._forget_weights()

    def save_mask_as(self, kind: str, adapter_name: str | None = None) -> None:
        """Change what the file will have, for a smaller one; the model evaluates by what is left, so that a loaded one agrees.

        Args:
            kind: "float32", "bfloat16" or "hard", as `save_mask` of the config; "hard" sets `eval_mask="hard"` too.
            adapter_name: the adapter, None for the active one.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = self.config_of(adapter_name)
        if config.has_bits:
            raise ValueError(
                f"The adapter {adapter_name!r} came from a file with a hard mask and has no logits to save as {kind!r}."
            )
        for each in (config, *(delta.config for delta in self.deltas(adapter_name))):
            each.save_mask, each.eval_mask = kind, "hard" if kind == "hard" else each.eval_mask
            each.check_choices(CHOICES["concrete"])
        self._forget_weights()

    def _forget_weights(self) -> None:
        for _, layer in self.named_subspace_layers():
            if isinstance(layer, OwnWeightLayer):
                layer.forget_weights()

    def coefficients(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Name of every parameter -> lambda `[T]`, detached; in the order of `config.vector_names`."""
        adapter_name = self.chosen_adapter(adapter_name)
        return OfAdapter(adapter_name, ((d.block, d.values().detach().clone()) for d in self._deltas(adapter_name)))

    @torch.no_grad()
    def save_masked_vectors(self, folder: str | os.PathLike[str], adapter_name: str | None = None) -> dict[str, str]:
        """Write m / mean(m) * tau_t of every task vector as a task-vector file: for TIES and other recipes, and for aTLAS.

        Args:
            folder: where; each file appears when it is whole.
            adapter_name: the adapter, None for the active one; its evaluation mask is taken.

        Returns:
            Name of the vector -> its file, a pool for another config.

        Raises:
            ValueError: the mask is on directions of factors, not on entries.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = self.config_of(adapter_name)
        deltas = self._deltas(adapter_name)
        if any(delta.by_rank for delta in deltas):
            raise ValueError("granularity='rank' masks directions of factors, and files have entries. Use `save_task_vector`.")
        os.makedirs(folder, exist_ok=True)
        found = {}
        for number, name in enumerate(config.vector_names):
            path = os.path.join(os.fspath(folder), file_name(name))
            tensors = {delta.block: delta.masked_vector(number) for delta in deltas}
            save_task_vector_file(path, {key: value for key, value in tensors.items() if value is not None}, config)
            found[name] = path
        return found

    @torch.no_grad()
    def mask_probabilities(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Name of every parameter -> sigmoid of its logits, float32; of a packed mask 0 and 1."""
        adapter_name = self.chosen_adapter(adapter_name)
        adapter_name = self.chosen_adapter(adapter_name)
        return OfAdapter(adapter_name, ((delta.block, _probabilities(delta)) for delta in self._deltas(adapter_name)))

    @torch.no_grad()
    def density(self, adapter_name: str | None = None) -> dict[str, float]:
        """Name of every parameter -> mean of its mask in evaluation, before rescaling: the share that is let through."""
        adapter_name = self.chosen_adapter(adapter_name)
        adapter_name = self.chosen_adapter(adapter_name)
        found = ((d.block, float(d.eval_mask().values().double().mean())) for d in self._deltas(adapter_name))
        return OfAdapter(adapter_name, found)


def _probabilities(delta: ConcreteDelta) -> Tensor:
    logits = delta.flat_logits().float()
    found = (logits >= 0).float() if delta.bits is not None else torch.sigmoid(logits)
    return found.view(delta.shape) if found.numel() == math.prod(delta.shape) else found


register(ConcreteConfig, ConcreteModel)
