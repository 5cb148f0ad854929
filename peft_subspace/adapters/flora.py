"""FLoRA: a Tucker core and one factor per mode, for weights of any order.

    dW = s * G x_0 U_0 x_1 U_1 ... x_{N-1} U_{N-1},      W' = W + dW

Source: Si et al., "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning" (ICLR 2025,
arXiv:2405.14739) and its official code (`FLoRALayer`). Other methods share the name (a gradient compressor, a federated
LoRA, a batched LoRA); this is none of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Delta, Geometry, SubspaceConfig, SubspaceLayer, SubspaceModel
from ..base.active import OfAdapter
from ..base.config import find_pattern
from ..base.convolution import add_low_rank_convolution
from ..base.delta import Weight
from ..base.gradients import mean_gradients
from ..functional import tucker
from ..functional.low_rank import add_low_rank
from ..registration import register


@dataclass
class FloraConfig(SubspaceConfig):
    """FLoRA: `dW = s * G x_n U_n`, with a trained core G and trained factors U_n.

    Modes are ordered as in a weight, `[out, in, *kernel]` (the official code has `in` first). A linear layer has
    r_out r_in + out r_out + in r_in parameters, a convolution prod(r) + sum_n d_n r_n.

    Args:
        r: rank of the channel modes: one number for both, `[r_out, r_in]`, or one rank for every mode of the weight. A number
            is an upper bound: it is lowered to the size of a smaller mode and to what the other ranks can use, which
            `lowered_ranks`, the log and the model card say. A list is taken as it is.
        r_spatial: rank of the kernel modes of a convolution, one number (lowered to the kernel's size) or one per mode.
        scale: s; None makes one learning rate suit layers of all widths, see `default_scale`. The official code has 1.
        init_weights: True is the reference (U_n ~ N(0, 1 / (2 r_n)), G = 0); "orthogonal" has orthonormal columns of the same
            norm; "gradient" is "orthogonal" until `initialize_from_gradients` fills in the leading directions of the loss's
            gradient; False has a random core, so that the start differs from the base (for tests).
        energy: choose every rank as the smallest that keeps this share of the squared norm of the weight (of the gradient,
            with `init_weights="gradient"`); `r` and `r_spatial` are then upper bounds. The ranks go into `rank_pattern`.
        scale_pattern: layer name or regular expression -> the scale there.
    """

    method: ClassVar[str] = "FLORA"
    title: ClassVar[str] = "FLoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.14739"
    recommended_learning_rate: ClassVar[float] = 1e-2
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "scale_pattern": "scale"}

    r: int | list[int] = field(default=8, metadata={"help": "Rank of the channel modes: a number, [r_out, r_in] or all modes."})
    r_spatial: int | list[int] = field(default=2, metadata={"help": "Rank of a convolution's kernel modes."})
    scale: float | None = field(default=None, metadata={"help": "Factor s of the update."})
    init_weights: bool | Literal["orthogonal", "gradient"] = field(  # type: ignore[assignment]
        default=True, metadata={"help": "True, False, 'orthogonal' or 'gradient'."}
    )
    energy: float | None = field(default=None, metadata={"help": "Choose ranks that keep this share of the energy."})
    scale_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Layer name or regex -> scale."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("r", self.r), ("r_spatial", self.r_spatial), *self.rank_pattern.items()):
            ranks = value if isinstance(value, (list, tuple)) else [value]
            if not ranks or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
                raise ValueError(f"{name}={value!r}: `r` should be a positive integer value, or a list of them, one per mode.")
        for name, scale in (("scale", self.scale), *self.scale_pattern.items()):
            if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale != 0):
                raise ValueError(f"{name}={scale!r}: a scale is a finite number other than zero.")
        if not isinstance(self.init_weights, bool) and self.init_weights not in ("orthogonal", "gradient"):
            raise ValueError(
                f"init_weights={self.init_weights!r} is not known. Accepted: True, False, 'orthogonal', 'gradient'."
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy!r} is a share of the squared norm: it must be in (0, 1].")


def mode_ranks(geometry: Geometry, config: Any) -> list[int]:
    """Rank of every mode of a weight, `[r_out, r_in, *r_kernel]`.

    Raises:
        ValueError: a rank of a list is larger than its mode, or the list has the wrong length.
    """
    shape, spatial = geometry.shape, len(geometry.kernel)
    r, r_spatial = config.r, config.r_spatial
    if isinstance(r, int):
        ranks = [min(r, size) for size in shape[: len(shape) - spatial]]
    elif len(r) in (len(shape) - spatial, len(shape)):
        ranks = list(r)
    else:
        raise ValueError(
            f"r={r} has {len(r)} ranks, but the weight {list(shape)} has {len(shape)} modes ({spatial} of the kernel)."
        )
    if len(ranks) < len(shape):
        more = [min(r_spatial, k) for k in geometry.kernel] if isinstance(r_spatial, int) else list(r_spatial)
        if len(more) != spatial:
            raise ValueError(
                f"r_spatial={r_spatial} has {len(more)} ranks, but the kernel {list(geometry.kernel)} has {spatial} modes."
            )
        ranks += more
    if any(rank > size for rank, size in zip(ranks, shape, strict=True)):
        raise ValueError(
            f"the ranks {ranks} are larger than the modes {list(shape)} of the weight; in a list each may be at most its mode. "
            f"A single number is lowered where a layer is smaller; rank_pattern sets the ranks of one layer."
        )
    return tucker.useful_ranks(ranks) if isinstance(r, int) else ranks


def default_scale(geometry: Geometry, ranks: Sequence[int]) -> float:
    """The scale at which the first step of Adam moves a layer's output as far as it does for LoRA with `lora_alpha = 2 r`.

    The first step moves every entry of the core by the learning rate eta. With factors N(0, 1 / (2 r_n)) and inputs of unit
    variance the output then moves by about s eta sqrt(1/2) prod_n sqrt(d_n / 2) over the input modes n; LoRA's by
    2 eta sqrt(r / 3). An embedding looks up one row, so its wide mode adds nothing; LoRA's there moves by 2 eta sqrt(r).
    So one learning rate suits layers of all widths; with the official code's constant 1 it is too hot for wide ones. The best
    rate is above LoRA's all the same, see docs/flora.md ("Learning rate").
    """
    if geometry.kind == "embedding":
        return 4 * math.sqrt(ranks[0])
    modes = geometry.shape[1:] if geometry.kind != "weight" else geometry.shape[-1:]
    return 2 * math.sqrt(2 * ranks[0] / 3) / math.prod(math.sqrt(size / 2) for size in modes)


class FloraDelta(Delta):
    """One FLoRA adapter on one weight: `core` `[r_0, ..., r_{N-1}]` and `factor_n` `[d_n, r_n]`.

    A kernel mode of size 1 has no factor: it would only rescale the core.
    """

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        ranks = mode_ranks(geometry, config)
        self.ceiling: int | None = config.r if isinstance(config.r, int) else None
        self.scale = default_scale(geometry, ranks) if config.scale is None else float(config.scale)
        self.core = nn.Parameter(torch.zeros(ranks, dtype=torch.float32))
        for mode, (size, rank) in enumerate(zip(geometry.shape, ranks, strict=True)):
            if size > 1 or mode < 2:
                self.register_parameter(f"factor_{mode}", nn.Parameter(torch.empty(size, rank, dtype=torch.float32)))
        self.reset_parameters(config.init_weights)
        self.dense = not self._factored_is_cheaper()

    @classmethod
    def check(cls, geometry: Geometry, config: Any) -> None:
        mode_ranks(geometry, config)

    def lowered(self) -> list[int] | None:
        ranks, spatial = list(self.core.shape), len(self.geometry.kernel)
        channels = ranks[: len(ranks) - spatial]
        return ranks if self.ceiling is not None and any(rank < self.ceiling for rank in channels) else None

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool | str) -> None:
        """Reference initialisation: Kaiming normal with a = sqrt(3) on `[d_n, r_n]` is N(0, 1 / (2 r_n)), whatever d_n."""
        for factor in self.factors():
            if factor is None or factor.is_meta:
                continue
            if isinstance(init_weights, str):
                nn.init.orthogonal_(factor)
                factor.mul_(reference_norm(factor))
            else:
                nn.init.normal_(factor, std=(2 * factor.shape[1]) ** -0.5)
        if init_weights is False:
            nn.init.normal_(self.core, std=0.5)
        if self.geometry.padding_idx is not None and not self.factor_1.is_meta:
            self.factor_1[self.geometry.padding_idx] = 0  # the padding row stays the base's: it gets no gradient

    if TYPE_CHECKING:  # a factor is registered by number, which a type checker cannot follow
        factor_0: Tensor
        factor_1: Tensor

    def factors(self) -> list[Any]:
        """The factor of every mode; None where a kernel mode of size 1 has none."""
        return [getattr(self, f"factor_{mode}", None) for mode in range(self.core.ndim)]

    def _factored_is_cheaper(self) -> bool:
        """Multiply-adds for one position: r_in in + prod(r_out, r_in, kernel) + r_out out, against the layer's own.

        A depthwise convolution is cheaper than its own factors. Building dW costs once per call what is paid back over
        the positions, but its gradient is a second one of full size, so a tie goes to the factors.
        """
        if self.geometry.kind == "weight":
            return False
        shape, ranks = self.geometry.shape, self.core.shape
        area = math.prod(self.geometry.kernel)
        groups = self.geometry.groups
        factored = groups * (shape[1] * ranks[1] + ranks[0] * ranks[1] * area) + shape[0] * ranks[0]
        return factored <= shape[0] * shape[1] * area

    def forward(self, x: Tensor, y0: Tensor, out: Tensor) -> Tensor:
        """`out + dW x` as U_out (s G') (U_in^T x), where G' is the core with the kernel's factors multiplied in.

        Cost per position: see `_factored_is_cheaper`; keeps x and `[n, r_in]` for backward.
        The official code builds dW in every call, a second base layer (`BaseFLoRA.forward`); tests use it as the oracle.
        """
        geometry = self.geometry
        if self.dense:
            return geometry.dense(x, self.delta_weight().to(out.dtype), out)
        if geometry.kind == "linear":
            return add_low_rank(out, x, self.factor_1, self.core, self.factor_0, self.scale)
        if geometry.kind == "conv":
            return add_low_rank_convolution(geometry, out, x, self.core, self.factors(), self.scale)
        rows = geometry.down(x, self.factor_1.to(out.dtype))
        return geometry.up(rows, (self.factor_0 @ self.core).mul(self.scale).to(out.dtype), out)

    def delta_weight(self, weight: Weight | None = None) -> Tensor:
        return tucker.reconstruct(self.core * self.scale, self.factors())

    @torch.no_grad()
    def lora_factors(self, weight: Weight | None = None) -> tuple[Tensor, Tensor] | None:
        """B = U_out, A = s G x_in U_in x_kernel U_kernel: exact, of rank r_out. Grouped convs and bare weights have no LoRA."""
        if self.geometry.kind == "weight" or self.geometry.groups > 1 or self.geometry.transposed:
            return None
        factors = [None if factor is None else factor.double() for factor in self.factors()]
        down = tucker.reconstruct(self.core.double() * self.scale, [None, *factors[1:]])
        return down.to(self.core.dtype), self.factor_0.detach().clone()

    @classmethod
    @torch.no_grad()
    def combine(cls, deltas: list[FloraDelta], weights: list[float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Cores on the diagonal of a larger core, factors side by side; ranks above a mode fold back by QR. Exact."""
        scale = deltas[0].scale
        cores = [d.core.double() * (w * d.scale / scale) for d, w in zip(deltas, weights, strict=True)]
        columns = zip(*(d._all_factors() for d in deltas), strict=True)
        core, factors = tucker.block_diagonal(cores), [torch.cat(list(parts), dim=1) for parts in columns]
        if any(factor.shape[1] > factor.shape[0] for factor in factors):
            core, factors = deltas[0]._rescaled(tucker.orthogonalize(core, factors))
        return {"r": list(core.shape), "scale": scale}, deltas[0]._named(core, factors)

    @torch.no_grad()
    def compressed(self, tolerance: float) -> tuple[list[int], dict[str, Tensor], float]:
        """The smallest ranks within a relative error, the tensors of that Delta, and the error made."""
        small, error = tucker.compress(self.core, self._all_factors(), tolerance)
        core, factors = self._rescaled(small)
        return list(core.shape), self._named(core, factors), error

    def _all_factors(self) -> list[Tensor]:
        return [torch.ones_like(self.core[:1].flatten()[:1])[None] if f is None else f for f in self.factors()]

    @staticmethod
    def _rescaled(small: tucker.Tucker) -> tucker.Tucker:
        """Orthonormal columns -> columns of the reference norm, so that training goes on at the same pace."""
        norms = [reference_norm(factor) for factor in small.factors]
        return tucker.Tucker(small.core / math.prod(norms), [f * norm for f, norm in zip(small.factors, norms, strict=True)])

    def _named(self, core: Tensor, factors: list[Tensor]) -> dict[str, Tensor]:
        named = {}
        for mode, (mine, factor) in enumerate(zip(self.factors(), factors, strict=True)):
            if mine is None:
                core = tucker.mode_product(core, factor.to(core.dtype), mode)
            else:
                named[f"factor_{mode}"] = factor
        if self.geometry.padding_idx is not None:
            named["factor_1"][self.geometry.padding_idx] = 0  # exactly: neither rounding nor a completed basis moves the row
        return {"core": core, **named}


def reference_norm(factor: Tensor) -> float:
    """Expected norm of a column of the reference initialisation, sqrt(d_n / (2 r_n))."""
    return math.sqrt(factor.shape[0] / (2 * factor.shape[1]))


class FloraModel(SubspaceModel):
    """Puts FLoRA adapters on a model."""

    prefix = "flora_"
    delta_cls = FloraDelta

    def _prepare_targets(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        if config.energy is None or config.init_weights == "gradient" or config.inference_mode:
            return
        chosen = dict(config.rank_pattern)
        for name, geometries in targets.items():
            for weight, geometry in geometries.items():
                key = name if weight == "weight" or name.endswith(f".{weight}") else f"{name}.{weight}"
                if all(find_pattern(chosen, name_of) is None for name_of in (key, name)):
                    tensor = self.base_weight(model, name, weight)
                    config.rank_pattern[key] = energy_ranks(geometry.canonical(tensor), geometry, config)

    def initialize_from_gradients(
        self,
        batches: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        adapter_name: str | None = None,
        layers_at_once: int | None = None,
    ) -> None:
        """Fill the factors with the leading directions of the mean gradient dL/dW (HOSVD); the core stays zero.

        The output does not change, and the first step moves along the gradient's projection onto those directions.

        Args:
            batches: a few batches; gone through once for every `layers_at_once` layers.
            loss_fn: `(model, batch) -> loss`; None calls `model(**batch).loss`.
            adapter_name: the adapter, None for the active one; trained values of it are lost.
            layers_at_once: how many weights may hold a gradient at a time; None for all (memory of the adapted weights).

        Raises:
            ValueError: a quantised layer (it has no gradient), or no gradient reached a layer.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = copy.deepcopy(self.config_of(adapter_name))  # the ranks that are found must not match other layers
        for key, layer, container, gradient in mean_gradients(self, batches, loss_fn, adapter_name, layers_at_once):
            weight, geometry = layer.geometries[container]
            gradient = geometry.canonical(gradient)
            ranks = mode_ranks(geometry, config.for_layer(key, weight))
            if config.energy is not None:
                ranks = energy_ranks(gradient, geometry, config.for_layer(key, weight))
            factors = [tucker.leading_directions(gradient, mode, rank) for mode, rank in enumerate(ranks)]
            self._replace(layer, container, key, adapter_name, ranks, factors)
        self._note_lowered_ranks(adapter_name)

    def _replace(
        self, layer: SubspaceLayer, container: str, key: str, adapter_name: str, ranks: list[int], factors: Any
    ) -> None:
        config, (weight, _) = self.peft_config[adapter_name], layer.geometries[container]
        config.rank_pattern[key if len(layer.geometries) == 1 else f"{key}.{weight}"] = ranks
        tensors = {c: dict(d.state_dict()) for c, d in layer.deltas(adapter_name).items()}
        zero = tucker.Tucker(torch.zeros(ranks), factors)
        tensors[container] = layer.deltas(adapter_name)[container]._named(*FloraDelta._rescaled(zero))
        self._rebuild(layer, key, adapter_name, tensors)

    def _rebuild(self, layer: SubspaceLayer, key: str, adapter_name: str, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Make an adapter of a layer anew in the ranks that its config has by now, from tensors made for its old scale."""
        before = layer.deltas(adapter_name)
        flags = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        layer.update_layer(adapter_name, self.peft_config[adapter_name], key)
        for container, delta in layer.deltas(adapter_name).items():
            old = before[container]
            tensors[container]["core"] = tensors[container]["core"] * (old.scale / delta.scale)  # it depends on the ranks
            delta.multiplier = old.multiplier
            delta.to(old.core.dtype).requires_grad_(old.core.requires_grad)
        layer.load_tensors(adapter_name, tensors)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    def prune(self, adapter_name: str | None = None, tolerance: float = 0.01) -> OfAdapter:
        """Lower the ranks of a trained adapter as far as the relative error of each dW allows.

        Args:
            adapter_name: the adapter, None for the active one; the optimizer must be made anew afterwards.
            tolerance: allowed ||dW - dW'|| / ||dW|| per weight, in (0, 1).

        Returns:
            weight name -> `{"before": ranks, "after": ranks, "error": relative error made}`; its `adapter_name` says of which.
        """
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance} is a relative error: it must be between 0 and 1.")
        adapter_name = self.chosen_adapter(adapter_name)
        config, report = self.config_of(adapter_name), OfAdapter(adapter_name)
        for key, layer in self.named_subspace_layers():
            tensors = {}
            for container, delta in layer.deltas(adapter_name).items():
                weight = layer.geometries[container][0]
                name = key if len(layer.geometries) == 1 else f"{key}.{weight}"
                before = list(delta.core.shape)
                ranks, tensors[container], error = delta.compressed(float(tolerance))
                config.rank_pattern[name] = ranks
                report[name] = {"before": before, "after": ranks, "error": error}
            if tensors:
                self._rebuild(layer, key, adapter_name, tensors)
        self._note_lowered_ranks(adapter_name)
        return report


def energy_ranks(tensor: Tensor, geometry: Geometry, config: Any) -> list[int]:
    """Ranks that keep `config.energy` of a tensor, at most what `r` and `r_spatial` allow."""
    roof = mode_ranks(geometry, config)
    return tucker.useful_ranks([min(a, b) for a, b in zip(tucker.ranks_for_energy(tensor, config.energy), roof, strict=True)])


register(FloraConfig, FloraModel)
