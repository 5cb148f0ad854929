"""PELA: a low-rank model that stands in for the pretrained one, healed by distillation and then fine-tuned.

    W ~ R L,      y = R (L x) + b          R: [out, k],  L: [k, in],  k < out in / (out + in)

Source: Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation" (CVPR 2024, arXiv:2310.10700), of
which only the abstract could be read, and its official code. This file compresses; the losses of the intermediate stage are
in `training`, and `compression` writes models that have left their original weights behind.

It is compression, not an addition: while the adapter is active the base's weight is not used. The base stays beside it until
the model is exported, so the teacher of the distillation is the same model with its adapter off.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Delta, Geometry, SubspaceConfig, SubspaceModel
from ..base.activations import Moments, input_moments
from ..base.config import find_pattern
from ..base.delta import Weight
from ..base.geometry import bias_of
from ..base.targets import exact_targets
from ..functional import factorize, ranks, svd
from ..functional.low_rank import autocasts, without_autocast
from ..functional.ranks import Block
from ..registration import register


@dataclass
class PelaConfig(SubspaceConfig):
    """PELA: `W ~ R L` in place of W. Layers that no rank makes smaller stay dense.

    The rank comes from one of `compression` (the default, at 2), `r` and `energy`. `rank_pattern` sets it for single layers.

    Args:
        target_modules: as everywhere, but None is "all-linear": everything except the output head.
        compression: c, how many times fewer parameters a layer has: k = floor(out in / (c (out + in))).
        allocation: "uniform" compresses every layer by c (the paper); "global" compresses all of them together by c and shares
            the ranks out by squared singular value per parameter. Convolutions with a kernel keep the uniform rule.
        r: k; a convolution with a kernel takes it for both channel modes, or `[k_out, k_in]`.
        energy: the smallest k that holds this share of the weight's squared norm.
        multiple_of: rounds k to multiples of this (8 to 64 for tensor cores): down, but for `energy` up.
        min_features: linear layers with fewer outputs stay dense.
        svd: "gram", "full" or "lowrank", see `SvfitConfig`; for matrices.
        svd_niter: power iterations of "lowrank".
        seed: of "lowrank".
        svd_device: where to decompose; "auto" is where the weight lies.
        activation_weighted: the initial factors are those that do best on the inputs that the layers get. That takes data:
            call `model.calibrate(batches)` once, which sets this field; until then they are the truncated SVD.
        train_bias: train the biases of compressed layers too (a shift, so that the base keeps its own).
        train_norms: train a copy of every normalisation layer, as the paper does; they are added to `modules_to_save`.
        dropout: probability of dropping an element of a layer's input, in training.
        init_weights: True takes the factors from W; False makes them random (to be loaded, or for tests).
    """

    method: ClassVar[str] = "PELA"
    title: ClassVar[str] = "PELA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.10700"
    recommended_learning_rate: ClassVar[float] = 3e-4

    compression: float | None = field(default=None, metadata={"help": "How many times fewer parameters."})
    allocation: Literal["uniform", "global"] = field(default="uniform", metadata={"help": "Ratio per layer, or shared."})
    r: int | list[int] | None = field(default=None, metadata={"help": "Rank; [k_out, k_in] for convolutions."})
    energy: float | None = field(default=None, metadata={"help": "Share of the squared norm that the rank holds."})
    multiple_of: int = field(default=1, metadata={"help": "Ranks are multiples of this."})
    min_features: int = field(default=10, metadata={"help": "Linear layers with fewer outputs stay dense."})
    svd: Literal["gram", "full", "lowrank"] = field(default="gram", metadata={"help": "How to decompose."})
    svd_niter: int = field(default=8, metadata={"help": "Power iterations of 'lowrank'."})
    seed: int = field(default=0, metadata={"help": "Seed of 'lowrank'."})
    svd_device: str = field(default="auto", metadata={"help": "Where to decompose."})
    activation_weighted: bool = field(default=False, metadata={"help": "Weigh the factors by the layers' inputs."})
    train_bias: bool = field(default=True, metadata={"help": "Train biases of compressed layers."})
    train_norms: bool = field(default=False, metadata={"help": "Train copies of the normalisation layers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is None and not self.target_parameters:
            self.target_modules = "all-linear"
        given = {name: getattr(self, name) for name in ("compression", "r", "energy") if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'{k}={v!r}' for k, v in given.items())}: each of them sets the ranks; give one.")
        if not given:
            self.compression = 2.0
        if self.compression is not None and not (_is_number(self.compression) and self.compression > 1):
            raise ValueError(f"compression={self.compression!r}: how many times fewer parameters, a number above 1.")
        for name, value in (("r", self.r), *self.rank_pattern.items()):
            values = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and not (len(values) in (1, 2) and all(_is_positive(k) for k in values)):
                raise ValueError(f"{name}={value!r}: `r` should be a positive integer value, or [k_out, k_in].")
        if self.energy is not None and not (_is_number(self.energy) and 0 < self.energy <= 1):
            raise ValueError(f"energy={self.energy!r} is a share of the squared norm: it must be in (0, 1].")
        for name in ("multiple_of", "min_features", "svd_niter"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} should be a positive integer value.")
        for name, accepted in {"svd": ("gram", "full", "lowrank"), "allocation": ("uniform", "global")}.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known. Accepted: {', '.join(map(repr, accepted))}.")
        if self.allocation == "global" and self.compression is None:
            raise ValueError("allocation='global' shares out what `compression` leaves: set that, not `r` or `energy`.")

    @property
    def svd_options(self) -> dict[str, Any]:
        """Arguments of `leading_singular`."""
        return {"method": self.svd, "niter": self.svd_niter, "seed": self.seed, "device": self.svd_device}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Ranks -------------------------------------------------------------------------------------------------------------------


def block_of(geometry: Geometry) -> tuple[tuple[int, ...], Block]:
    """How a weight is compressed: (stack, the block of which there is one for each of the stack).

    A grouped convolution has one block for each group, a stack of experts one for each expert. A vector has one column, and so
    stays dense: no rank saves anything.
    """
    shape = geometry.shape
    if geometry.kind == "conv":
        stack = (geometry.groups,) if geometry.groups > 1 else ()
        return stack, Block(shape[0] // geometry.groups, shape[1], math.prod(geometry.kernel))
    return (shape[:-2], Block(*shape[-2:])) if len(shape) > 1 else ((), Block(shape[0], 1))


def layer_ranks(geometry: Geometry, config: Any) -> tuple[int, ...] | None:
    """The ranks that the config sets for a weight; None where it stays dense.

    With `energy`, or allocation="global", they must stand in `rank_pattern` already.
    """
    _, block = block_of(geometry)
    if config.r is not None:
        wanted = tuple(config.r) if isinstance(config.r, (list, tuple)) else (config.r,) * 2
        wanted = wanted if not block.is_matrix else wanted[:1]
        if len(wanted) == 1 and not block.is_matrix:
            wanted *= 2
        roofs = (min(block.rows, block.columns),) if block.is_matrix else (block.rows, block.columns)
        found = tuple(min(k, roof) for k, roof in zip(wanted, roofs, strict=True))
        return ranks.rounded(block, found, config.multiple_of)
    if geometry.kind == "linear" and geometry.out_features < config.min_features:
        return None
    return ranks.rounded(block, ranks.ratio_ranks(block, config.compression or 1.0), config.multiple_of)


# The module --------------------------------------------------------------------------------------------------------------


class PelaDelta(Delta):
    """The factors of one weight.

    `up` R `[*, out, k]` and `down` L `[*, k, in]`, for an embedding `[rows, k]`; a convolution with a kernel also has `core`
    `[*, k_out, k_in, *kernel]`. A stack (groups of a convolution, experts) has its own factors for each. `bias` `[out]` is the
    shift of the layer's bias.
    """

    replaces_base: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, config: Any) -> None:
        super().__init__(geometry, config)
        self.config = config
        stack, self.block = block_of(geometry)
        found = self.ranks = layer_ranks(geometry, config) or ranks.most_saving(self.block)
        rows, columns = self.block.rows, self.block.columns
        down = (columns, found[-1]) if geometry.kind == "embedding" else (*stack, found[-1], columns)
        self.up = nn.Parameter(torch.empty(*stack, rows, found[0]))
        self.down = nn.Parameter(torch.empty(down))
        if not self.block.is_matrix:
            self.core = nn.Parameter(torch.empty(*stack, *found, *geometry.kernel))
        else:
            self.register_parameter("core", None)
        with_bias = geometry.bias and config.train_bias and not geometry.reads_own_weight
        self.register_parameter("bias", nn.Parameter(torch.zeros(geometry.out_features)) if with_bias else None)
        self._make_random()

    if TYPE_CHECKING:  # a type checker cannot follow parameters that may be None
        core: nn.Parameter | None
        bias: nn.Parameter | None

    def lowered(self) -> list[int] | int | None:
        given, ranks = self.config.r, self.ranks
        roofs = (min(self.block.rows, self.block.columns),) if self.block.is_matrix else (self.block.rows, self.block.columns)
        if not isinstance(given, int) or min(roofs) >= given:
            return None
        return ranks[0] if self.block.is_matrix else list(ranks)

    @torch.no_grad()
    def _make_random(self) -> None:
        """Like the products of a fresh linear layer: y has the variance of x."""
        nn.init.normal_(self.up, std=self.ranks[0] ** -0.5)
        nn.init.normal_(self.down, std=self.block.columns**-0.5)
        if self.core is not None:
            nn.init.normal_(self.core, std=(self.ranks[1] * self.block.volume) ** -0.5)
        if self.bias is not None and self.config.init_weights is False:
            nn.init.normal_(self.bias, std=0.1)
        if self.geometry.padding_idx is not None:
            self.down[self.geometry.padding_idx] = 0

    def prepare(self, weight: Weight, siblings: Sequence[Any], saved: dict[str, Tensor] | None = None) -> None:
        """Factor the weight. Called for new adapters only: a file has all factors."""
        if self.config.init_weights is not False:
            self.factor(weight())

    @torch.no_grad()
    def factor(self, weight: Tensor, moments: Moments | None = None) -> None:
        """Set the factors to the best ones for a weight (canonical layout), for inputs with the given moments.

        With a bias, b is shifted by (W - R L) E[x], which is the best shift for any R L, and leaves the covariance of x as what
        the factors have to serve. (A kernel's positions all count as inside the image.)
        """
        stack = self.up.shape[:-2]
        second = None if moments is None else moments.second
        if moments is not None and moments.mean is not None and self.bias is not None:
            mean = moments.mean.reshape(*stack, self.block.columns)
            second = moments.second - mean[..., :, None] * mean[..., None, :]
        blocks = weight.reshape(*stack, self.block.rows, self.block.columns, *self.geometry.kernel)
        if self.block.is_matrix:
            up, down = factorize.two_factors(blocks.flatten(len(stack) + 1), self.ranks[0], second, **self.config.svd_options)
        else:
            each = [blocks] if not stack else list(blocks)
            ms = [second] * len(each) if second is None or not stack else list(second)
            parts = [factorize.tucker2(block, self.ranks, moment) for block, moment in zip(each, ms, strict=True)]
            up, core, down = (torch.stack(t) if stack else t[0] for t in zip(*parts, strict=True))
            assert self.core is not None
            self.core.copy_(core)
        self.up.copy_(up)
        self.down.copy_(down.mT if self.geometry.kind == "embedding" else down)
        if self.bias is not None:
            self.bias.zero_()
            if moments is not None and moments.mean is not None:
                lost = (weight.to(up.dtype) - self.product()).reshape(*weight.shape[:2], -1).sum(-1)  # [out, in / groups]
                lost = lost.reshape(*stack, self.block.rows, self.block.columns)
                self.bias.copy_((lost @ mean.to(up.dtype)[..., None]).flatten())

    # The layer -----------------------------------------------------------------------------------------------------------

    def call(self, base_layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = R (L x) + b, a kernel as 1x1, kernel, 1x1. Keeps x and `[n, k]` for backward."""
        if self.geometry.kind == "embedding":
            return self._look_up(x, base_layer.weight.dtype)
        x = F.dropout(x, self.dropout, self.training)
        bias = bias_of(base_layer)
        if self.bias is not None and bias is not None:
            bias = bias + self.bias
        autocast = autocasts(x) and x.dtype != torch.float64
        if self.geometry.kind == "linear":
            if autocast:
                return F.linear(F.linear(x, self.down), self.up, bias)
            return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if autocast:  # which does not reach torch.convolution
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._convolve(base_layer, x, bias if bias is None else bias.to(x.dtype), *args, **kwargs)

    def _look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = F.embedding(ids, self.down, self.geometry.padding_idx)
        with without_autocast(rows):
            out = F.linear(rows.to(dtype), self.up.to(dtype))
        return out if self.geometry.multiplier == 1.0 else out * self.geometry.multiplier

    def _convolve(self, layer: Any, x: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        geometry = self.geometry
        n = len(geometry.kernel)
        if x.ndim == n + 1:
            return self._convolve(layer, x[None], bias, output_size)[0]
        thin, wide = (factor.to(x.dtype).flatten(0, -2)[(...,) + (None,) * n] for factor in (self.down, self.up))
        if geometry.pointwise:  # then the stride can be taken first
            return _pointwise(geometry, _pointwise(geometry, x, thin, None, geometry.stride), wide, bias)
        z, extra = _pointwise(geometry, x, thin), (0,) * n
        if geometry.transposed:
            sizes = (geometry.stride, geometry.padding, geometry.kernel)
            extra = layer._output_padding(z, output_size, *map(list, sizes), n, list(geometry.dilation))
        if self.core is None:
            return _apply_kernel(geometry, z, wide, bias, extra)
        core = self.core.to(x.dtype).reshape(-1, *self.core.shape[-n - 1 :])
        return _pointwise(geometry, _apply_kernel(geometry, z, core, None, extra), wide, bias)

    def product(self) -> Tensor:
        """R L, or the kernel made of three factors, canonical layout, at least float32."""
        down = self.down.mT if self.geometry.kind == "embedding" else self.down
        up, down = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (self.up, down))
        core = None if self.core is None else self.core.to(up.dtype)
        return factorize.compose(up, core, down, len(self.geometry.kernel)).reshape(self.geometry.shape)

    def delta_weight(self, weight: Weight) -> Tensor:
        """R L - W: what the layer's weight changes by."""
        product = self.product()
        return product - weight().to(product.device, product.dtype)

    def delta_bias(self) -> Tensor | None:
        return self.bias


def _pointwise(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: tuple[int, ...] | None = None
) -> Tensor:
    """A 1x1 convolution with the groups of the layer."""
    n = weight.ndim - 2
    return torch.convolution(x, weight, bias, stride or (1,) * n, (0,) * n, (1,) * n, False, (0,) * n, geometry.groups)


def _apply_kernel(geometry: Geometry, z: Tensor, kernel: Tensor, bias: Tensor | None, extra: Sequence[int]) -> Tensor:
    """The convolution's own stride, padding and dilation with a narrower kernel, canonical layout."""
    padding = geometry.padding
    if geometry.border:  # commutes with the first factor, which has no bias
        z, padding = F.pad(z, geometry.border, mode=geometry.border_mode), (0,) * len(geometry.kernel)
    native = geometry.native(kernel)
    return torch.convolution(
        z, native, bias, geometry.stride, padding, geometry.dilation, geometry.transposed, list(extra), geometry.groups
    )


# The tuner ---------------------------------------------------------------------------------------------------------------


class PelaModel(SubspaceModel):
    """Puts low-rank layers in the place of a model's own."""

    prefix = "pela_"
    delta_cls = PelaDelta
    peft_config: dict[str, PelaConfig]

    def _prepare_targets(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        """Decide the ranks that need the weights, and take what stays dense out of the targets."""
        if not config.is_from_file:
            for key in vars(config).pop("decided_ranks", ()):  # by another model's weights
                config.rank_pattern.pop(key, None)
            known = set(config.rank_pattern)
            self._choose_ranks(config, model, targets)
            config.decided_ranks = set(config.rank_pattern) - known  # not a field
            if config.activation_weighted:
                warnings.warn("activation_weighted=True is in force after `model.calibrate(batches)` only.", stacklevel=2)
        dense = [
            name
            for name, weights in targets.items()
            if all(layer_ranks(g, config.for_layer(name, w)) is None for w, g in weights.items())
        ]
        if dense:
            self._leave_dense(config, model, targets, dense)
        if config.train_norms:
            norms = {name for name, module in model.named_modules() if _is_norm(module)}
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *norms})

    @staticmethod
    def _leave_dense(config: Any, model: nn.Module, targets: dict[str, Any], dense: list[str]) -> None:
        if len(dense) == len(targets):
            raise ValueError(
                f"No layer would get smaller: {dense[:5]}{' ...' if len(dense) > 5 else ''}. Lower `r` or `energy`, or raise "
                f"`compression`: a rank saves parameters below out * in / (out + in), and min_features={config.min_features}."
            )
        warnings.warn(
            f"PELA leaves {len(dense)} of {len(targets)} layers dense, because no rank that the config allows makes them "
            f"smaller: {', '.join(dense[:8])}{' ...' if len(dense) > 8 else ''}.",
            stacklevel=2,
        )
        for name in dense:
            for key in (name, *(f"{name}.{weight}" for weight in targets.pop(name))):
                config.rank_pattern.pop(key, None)
        parameters = {name for name, weights in targets.items() for w in weights if name.endswith(f".{w}") and w != "weight"}
        config.target_parameters = sorted(parameters) or None
        config.target_modules = exact_targets(set(targets) - parameters, model)

    def _choose_ranks(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        if config.energy is None and config.allocation == "uniform":
            return
        open_weights: dict[str, Geometry] = {}
        spectra: dict[str, Tensor] = {}
        for name, geometries in targets.items():
            for weight, geometry in geometries.items():
                key = name if weight == "weight" or name.endswith(f".{weight}") else f"{name}.{weight}"
                free = all(find_pattern(config.rank_pattern, of) is None for of in (key, name))
                small = geometry.kind == "linear" and geometry.out_features < config.min_features
                if free and not small:
                    tensor = geometry.canonical(self.base_weight(model, name, weight))
                    if config.energy is not None:
                        config.rank_pattern[key] = _energy_ranks(tensor, geometry, config)
                    elif block_of(geometry)[1].is_matrix:
                        stack, block = block_of(geometry)
                        spectra[key] = svd.spectrum(tensor.reshape(*stack, block.rows, block.columns)).cpu()
                        open_weights[key] = geometry
        if spectra:
            config.rank_pattern.update(_share_out(spectra, open_weights, config))

    def calibrate(
        self,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] | None = None,
        adapter_name: str | None = None,
        layers_at_once: int | None = None,
    ) -> None:
        """Make the factors anew, best for the inputs that the layers of the base model get; biases take up the mean error.

            min E ||W x + b - (R L x + b')||^2  over R L of rank k and, where the layer has a bias, b'

        Layers that read their weights by themselves (MultiheadAttention, experts) keep their factors. Ranks stay. The inputs
        are those of the original model, not of one whose earlier layers are compressed already.

        Args:
            batches: a few hundred samples; gone through once for every `layers_at_once` layers.
            forward: `(model, batch) -> anything`; None calls `model(**batch)`.
            adapter_name: the adapter, None for the active one; trained values of it are lost.
            layers_at_once: how many layers gather their moments at a time (8 in^2 bytes each); None for all.

        Raises:
            ValueError: no batches, or a layer that none of them reached.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config = self.config_of(adapter_name)
        for key, layer, moments in input_moments(self, batches, forward, adapter_name, layers_at_once):
            for container, delta in layer.deltas(adapter_name).items():
                try:
                    delta.factor(layer._canonical_weight(container), moments)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from error
        config.activation_weighted = True


def _is_norm(module: nn.Module) -> bool:
    """Normalisation layers with parameters; BatchNorm has statistics, which the foundation keeps with the adapter."""
    name = type(module).__name__
    own = bool(next(module.parameters(recurse=False), None) is not None)
    return own and "Norm" in name and "BatchNorm" not in name and not list(module.children())


def _energy_ranks(tensor: Tensor, geometry: Geometry, config: Any) -> list[int] | int:
    """The smallest ranks that hold the energy, rounded up; the full size where they save nothing."""
    stack, block = block_of(geometry)
    blocks = tensor.reshape(*stack, block.rows, block.columns, -1)
    if block.is_matrix:
        wanted: tuple[int, ...] = (svd.rank_for_energy(svd.spectrum(blocks[..., 0]), config.energy) or 1,)
    else:
        unfolded = (blocks.flatten(-2), blocks.transpose(-3, -2).flatten(-2))
        wanted = tuple(svd.rank_for_energy(svd.spectrum(matrix), config.energy) or 1 for matrix in unfolded)
    found = ranks.rounded(block, wanted, config.multiple_of, up=True)
    full = (min(block.rows, block.columns),) if block.is_matrix else (block.rows, block.columns)
    chosen = list(found or full)
    return chosen[0] if block.is_matrix else chosen


def _share_out(spectra: dict[str, Tensor], geometries: dict[str, Geometry], config: Any) -> dict[str, int]:
    """Ranks out of one budget, total / compression, in steps of `multiple_of`."""
    blocks = {name: block_of(geometry)[1] for name, geometry in geometries.items()}
    copies = {name: math.prod(block_of(geometry)[0]) for name, geometry in geometries.items()}
    total = sum(copies[name] * block.dense for name, block in blocks.items())
    shared = ranks.water_filling(spectra, blocks, copies, int(total / config.compression), config.multiple_of)
    used = sum(copies[n] * (blocks[n].dense if k is None else blocks[n].size(k)) for n, k in shared.items())
    if used * config.compression > total * 1.001:
        warnings.warn(
            f"The smallest ranks (multiple_of={config.multiple_of}) compress these layers {total / used:.2f} times, not "
            f"{config.compression} times.",
            stacklevel=2,
        )
    full = {name: min(block.rows, block.columns) for name, block in blocks.items()}  # which stays dense
    return {name: full[name] if chosen is None else chosen[0] for name, chosen in shared.items()}


register(PelaConfig, PelaModel)
