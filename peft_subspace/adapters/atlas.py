"""aTLAS: learn how to combine task vectors, one coefficient for each vector and block of parameters.

    tau_t = theta_t - theta_0        theta_b = theta_0,b + sum_t lambda[t, b] tau_t,b        lambda: 0 at the start, trained

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" (arXiv:2407.02880), and its
official code, `fredzzhang/atlas`; the paper's tables could not be read. What differs from that code is in docs/atlas.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Delta, Geometry
from ..base.active import OfAdapter
from ..base.delta import Weight
from ..functional import composition
from ..functional.choices import CHOICES, MAX_PARTS, Constraint
from ..functional.composition import LowRank, Vector
from ..functional.groups import Groups, along_axis, groups_from
from ..registration import register
from .blocks import OpenedPool
from .pooled import PooledConfig, PooledModel, add_directions, is_integer, is_number, is_texts


@dataclass
class AtlasConfig(PooledConfig):
    """aTLAS: `W' = W + sum_t lambda_t tau_t` with frozen task vectors; only the coefficients are trained and saved.

    Args:
        granularity: what has a coefficient of its own for each vector: "block" (a parameter tensor; the paper), "task" (the
            whole model: learned task arithmetic), "row" or "column" (output or input channel), "partition" (K random parts of a
            block).
        partition: K, 1 to 256, for "partition". Blocks of one dimension keep one coefficient.
        partition_seed: of the random parts.
        tie_blocks: groups of endings of parameter names that share coefficients within a layer, such as
            `[["q_proj.weight", "k_proj.weight"], ["weight", "bias"]]`.
        fused_splits: ending of a parameter's name -> n: its rows have n coefficients, as a fused q, k, v weight has three.
        init: start value of the coefficients, or name of a vector -> value (0 for the others). 0.3 is task arithmetic.
        selected: name of a parameter -> names of the vectors that it is composed of; all, where it says nothing. Others are not
            read there and their coefficients stay at zero. `training.selection.select_vectors` makes it from gradients.
        constraint: None; "nonnegative" (a negative coefficient counts as zero and gets no gradient); or "softmax" (of what is
            trained, over the vectors: the coefficients of a block are shares of one; with `init=0` each is 1 / T, so that a new
            adapter is the average of the vectors instead of the base).
        pool, base, exclude_pool, block_types, vector_dtype, placement, max_vector_bytes, strict, provenance: of `PooledConfig`.
            In the leave-one-out protocol `exclude_pool` has the target task's own vector.
    """

    method: ClassVar[str] = "ATLAS"
    title: ClassVar[str] = "aTLAS"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02880"
    recommended_learning_rate: ClassVar[float] = 1e-2
    granularity: Literal["task", "block", "row", "column", "partition"] = field(
        default="block", metadata={"help": "What has a coefficient of its own."}
    )
    partition: int | None = field(default=None, metadata={"help": "Number of random parts of a block."})
    partition_seed: int = field(default=0, metadata={"help": "Of the random parts."})
    tie_blocks: list[list[str]] | None = field(default=None, metadata={"help": "Endings of names that share coefficients."})
    fused_splits: dict[str, int] = field(default_factory=dict, metadata={"help": "Ending of a name -> parts of its rows."})
    init: float | dict[str, float] = field(default=0.0, metadata={"help": "Start value of the coefficients."})
    selected: dict[str, list[str]] | None = field(default=None, metadata={"help": "Parameter -> vectors that it is made of."})
    constraint: Literal["nonnegative", "softmax"] | None = field(default=None, metadata={"help": "On the coefficients."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES["atlas"])
        starts = self.init.values() if isinstance(self.init, dict) else [self.init]
        self.check_kind("init", all(map(is_number, starts)), "a finite number, or a table of them by name,")
        self._check_groups()
        self._check_names()

    def _check_groups(self) -> None:
        if (self.partition is None) != (self.granularity != "partition"):
            raise ValueError(
                f"partition={self.partition!r} with granularity={self.granularity!r}: the number of parts goes with "
                f"granularity='partition', and with no other."
            )
        parts, ties, splits = self.partition, self.tie_blocks or [], self.fused_splits
        fits = parts is None or (is_integer(parts) and 1 <= parts <= MAX_PARTS)
        self.check_kind("partition", fits, f"a number of parts from 1 to {MAX_PARTS}")
        self.check_kind("partition_seed", is_integer(self.partition_seed), "a whole number")
        fits = isinstance(ties, (list, tuple)) and all(map(is_texts, ties))
        self.check_kind("tie_blocks", fits, "a list of lists of endings")
        fits = isinstance(splits, dict) and is_texts([*splits]) and all(is_integer(n) and n > 0 for n in splits.values())
        self.check_kind("fused_splits", fits, "a table of a positive number of parts for each ending")

    def _check_names(self) -> None:
        chosen = {} if self.selected is None else self.selected
        fits = isinstance(chosen, dict) and is_texts([*chosen]) and all(map(is_texts, chosen.values()))
        self.check_kind("selected", fits, "a table of the names of vectors for each parameter")
        if self.selected is not None and (self.granularity == "task" or self.tie_blocks):
            raise ValueError(
                "selected: blocks that share coefficients (granularity='task', tie_blocks) share their vectors too."
            )
        if self.selected is not None and self.constraint == "softmax":
            raise ValueError("selected: with constraint='softmax' a vector that is left out would keep its share of one.")
        self.check_in_pool("init", self.init if isinstance(self.init, dict) else ())
        self.check_in_pool("selected", (name for names in chosen.values() for name in names))
        if self.constraint == "softmax" and len(self.vector_names) == 1:
            raise ValueError(f"constraint='softmax': the share of {self.vector_names[0]!r} alone would always be one.")

    def start(self, count: int) -> list[float]:
        """Start value of every vector's coefficients."""
        if isinstance(self.init, dict):
            return [float(self.init.get(name, 0.0)) for name in self.vector_names]
        return [float(self.init)] * count

    def tie(self, name: str) -> str:
        """Blocks for which this is the same share their coefficients."""
        if self.granularity == "task":
            return "*"
        for number, endings in enumerate(self.tie_blocks or []):
            for ending in sorted(endings, key=len, reverse=True):
                if name == ending or name.endswith(f".{ending}"):
                    return f"{number}:{name.removesuffix(ending)}"
        return name


def groups_of(geometry: Geometry, config: Any) -> dict[str, Any] | None:
    """Which of a block's entries have coefficients of their own, for `groups_from` and the file; None for one group."""
    name = config.block
    split = next((n for ending, n in config.fused_splits.items() if name == ending or name.endswith(f".{ending}")), None)
    if split is not None:
        if geometry.shape[0] % split:
            raise ValueError(f"fused_splits: its {geometry.shape[0]} rows cannot be divided into {split} equal parts.")
        return along_axis(geometry, 0, geometry.shape[0] // split)
    if config.granularity == "row":
        return along_axis(geometry, 0)
    if len(geometry.shape) < 2:
        return None
    if config.granularity == "column":
        return along_axis(geometry, 1)
    if config.granularity == "partition":
        return {"count": config.partition, "seed": config.partition_seed, "name": name}
    return None


class AtlasDelta(Delta):
    """The coefficients of one block: `coefficients` `[T]`, or `[T, K]`, float32, trained.

    Blocks that share coefficients look at those of the first of them, which alone has the tensor.
    """

    composes_weight: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.names: list[str] = config.vector_names
        self.constraint: Constraint | None = config.constraint
        self.spec = groups_of(geometry, config)
        shape = geometry.native(torch.empty(geometry.shape, device="meta")).shape
        self.groups = None if self.spec is None else groups_from(self.spec, shape, keep=True)
        self.parameter_name: str = config.block  # `block` is the name of a tied tensor that the pool knows
        opened: OpenedPool | None = config.opened
        self.pool = None if opened is None else opened.pool
        self.block = config.block if opened is None else opened.source_of(config.block)
        self.selected: list[str] | None = (config.selected or {}).get(self.block)
        self.vectors: list[Vector | None] | None = None
        tie = config.tie(self.block)
        own = () if self.groups is None else (self.groups.count,)
        leader = None if opened is None else opened.leaders.setdefault((tie, own), self)
        if leader is None or leader is self:
            start = torch.tensor(config.start(len(self.names)), dtype=torch.float32)
            values = start.view(-1, *[1] * len(own)).expand(-1, *own).clone()
            values = values if config.init_weights else values + 0.5 * torch.randn(values.shape)
            if self.selected is not None:
                values[[name not in self.selected for name in self.names]] = 0.0
            self.coefficients = nn.Parameter(values)
        else:
            self.__dict__["leader"] = leader  # not a child: its tensor is in the file once, and has one place in the model

    @classmethod
    def check(cls, geometry: Geometry, config: Any) -> None:
        """A quantised weight cannot be composed: all its vectors must be of low rank."""
        groups = groups_of(geometry, config)
        if geometry.quantized and (groups is not None or not config.opened.is_low_rank(config.block)):
            raise ValueError(
                "the weight is quantised and cannot be composed with dense task vectors, or by rows, columns or parts. Use "
                "LoRA adapters as task vectors with granularity='block', or load the base unquantised."
            )

    @classmethod
    def applies(cls, config: Any) -> bool:
        return config.opened is None or config.block in config.opened.blocks

    @property
    def trained(self) -> tuple[Tensor, ...]:
        owner = self.__dict__.get("leader", self)
        return (owner.coefficients,)

    def as_plain_sum(self) -> list[float] | None:
        values = self.values().detach().flatten(1) if self.groups is not None else self.values().detach()[:, None]
        return values[:, 0].tolist() if bool((values == values[:, :1]).all()) else None

    def values(self) -> Tensor:
        """lambda, `[T]` or `[T, K]`, with the constraint."""
        return composition.constrained(self.trained[0], self.constraint)

    def file_entry(self, places: Mapping[Any, str]) -> dict[str, Any]:
        """Where the file has this block's coefficients; see `PooledModel`."""
        owner = self.__dict__.get("leader", self)
        return {"coefficients": f"{places[owner]}.coefficients", **({} if self.spec is None else {"groups": self.spec})}

    # The vectors -------------------------------------------------------------------------------------------------------

    def is_incomplete(self, saved: dict[str, Tensor] | None = None) -> bool:
        return self.vectors is None

    def prepare(self, weight: Weight, siblings: Sequence[Any], saved: dict[str, Tensor] | None = None) -> None:
        """Get the vectors: those that another adapter has, by reference, or out of their files."""
        alike = [o for o in siblings if o.vectors is not None and (o.names, o.selected) == (self.names, self.selected)]
        if self.pool is not None:
            self.vectors = self.pool.vectors(self.block, self.selected)
        elif alike:
            self.vectors = alike[0].vectors

    def _loaded(self) -> list[Vector | None]:
        assert self.vectors is not None  # a layer completes its adapters before it uses them
        return self.vectors

    # The update --------------------------------------------------------------------------------------------------------

    @property
    def adds(self) -> bool:
        """Vectors of low rank on a layer that is called: B (lambda * (A x)) costs less than a weight."""
        called = self.geometry.kind in ("linear", "embedding") and not self.geometry.reads_own_weight
        vectors = [vector for vector in self._loaded() if vector is not None]
        return called and self.groups is None and bool(vectors) and all(isinstance(v, LowRank) for v in vectors)

    def accumulate(self, total: Tensor) -> None:
        composition.accumulate(total, self._loaded(), self.values(), self.groups)

    def pull_back(self) -> Callable[[Tensor], Sequence[Tensor | None]]:
        """dL/dlambda[t] = <G, tau_t>; see `functional.composition.inner_products`."""
        numbers = self.trained[0].detach()
        numbers = numbers.clone() if self.constraint else numbers  # which an optimizer may change before backward
        return partial(_pulled, self._loaded(), self.groups, numbers, self.constraint)

    def forward(self, x: Tensor, y0: Tensor, out: Tensor) -> Tensor:
        """out + B (lambda * (A x)) with the stacked factors of all vectors.

        Cost: 2 n R (in + out) flops for n rows and R = sum of the ranks; keeps `[n, R]` for backward.
        """
        left, right, ranks = composition.stacked(self._loaded(), out)
        return add_directions(self.geometry, x, out, left, right, composition.spread(self.values(), ranks))

    def delta_weight(self, weight: Weight) -> Tensor:
        shape = self.geometry.native(torch.empty(self.geometry.shape, device="meta")).shape
        total = composition.combination(self._loaded(), self.values(), shape, self.groups)
        return self.geometry.canonical(total)

    @torch.no_grad()
    def lora_factors(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """Stacked factors of the vectors that are not off, if all are of low rank: exact."""
        if not self.adds or self.geometry.kind != "linear":
            return None
        found = [(c, v) for c, v in zip(self.values().tolist(), self._loaded(), strict=True) if isinstance(v, LowRank) and c]
        pairs = [(v.right, v.left * c) for c, v in found]
        if not pairs:
            zero = torch.zeros(1, self.geometry.in_features)
            return zero, torch.zeros(self.geometry.out_features, 1)
        down, up = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], 1)
        return (up.t(), down.t()) if self.geometry.swapped else (down, up)

    @classmethod
    @torch.no_grad()
    def combine(cls, deltas: list[AtlasDelta], weights: list[float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """lambda = sum_a w_a lambda_a, for adapters with the same vectors and granularity. Exact."""
        first = deltas[0]
        if first.constraint == "softmax":
            raise ValueError(
                "a weighted sum of coefficients under constraint='softmax' is no softmax. Activate the adapters together, "
                "which adds them up, or write each with save_task_vector and merge the files."
            )
        alike = all(d.names == first.names and d.values().shape == first.values().shape for d in deltas)
        if not alike or any(a is not b for d in deltas for a, b in zip(d._loaded(), first._loaded(), strict=True)):
            raise ValueError(
                "the adapters have other task vectors or another granularity: their sum is no aTLAS adapter of either kind. "
                "Activate both, which adds them up, or merge them into the model one after the other."
            )
        total = sum(weight * delta.values().double() for delta, weight in zip(deltas, weights, strict=True))
        assert isinstance(total, Tensor)
        if first.constraint == "nonnegative" and bool((total < 0).any()):
            raise ValueError("the sum has negative coefficients, which constraint='nonnegative' does not allow.")
        return {}, {"coefficients": total} if "leader" not in first.__dict__ else {}


def _pulled(
    vectors: list[Vector | None], groups: Groups | None, numbers: Tensor, constraint: Constraint | None, grad: Tensor
) -> tuple[Tensor]:
    found = composition.inner_products(grad, vectors, groups).to(numbers.dtype)
    return (composition.through_constraint(found, numbers, constraint),)


class AtlasModel(PooledModel):
    """The tuner of aTLAS."""

    prefix = "atlas_"
    delta_cls = AtlasDelta

    def coefficients(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Name of every block -> its coefficients `[T]` or `[T, K]`, detached; rows in the order of `config.vector_names`."""
        adapter_name = self.chosen_adapter(adapter_name)
        return OfAdapter(adapter_name, ((d.block, d.values().detach().clone()) for d in self.deltas(adapter_name)))

    def coefficient_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimizer groups: the coefficients with a rate of their own, then whatever else is trained.

        Coefficients move by about `lr` a step and want 100 to 10,000 times the rate of weights; and a Trainer exempts
        parameters with "norm" or "bias" in their names from weight decay, which would be those of norms and biases.
        """
        deltas = [delta for name in self.peft_config for delta in self.deltas(name)]
        own = {id(tensor): tensor for delta in deltas for tensor in delta.trained if tensor.requires_grad}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": list(own.values()), "lr": lr, "weight_decay": weight_decay}]
        return [*groups, {"params": rest}] if rest else groups


register(AtlasConfig, AtlasModel)
