"""The contract of a method: one adapter on one weight is one small module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import Geometry

if TYPE_CHECKING:
    from .config import SubspaceConfig

# Gives the base's own weight, canonical layout, its own dtype. A call, because a quantised weight is dequantised for it.
Weight = Callable[[], Tensor]


class Delta(nn.Module):
    """One adapter's update of one weight, W' = W + dW.

    A subclass makes its parameters (trained) and buffers (frozen) in `__init__`, reads no weight there, and works on the
    meta device. It is flat: every tensor hangs on the Delta itself, because PEFT expects the adapter's name to stand
    second to last in a key (`<layer>.<prefix>delta.<adapter>.<tensor>`).

    Args:
        geometry: the weight's canonical shape and operators.
        config: the adapter's config with this layer's overrides filled in.
    """

    # Whether the adapter calls the base layer itself, so that it can change the input too. Then `call` makes the output.
    takes_over: ClassVar[bool] = False
    # Whether it does so without the base's weight: then no second adapter of its kind can be active beside it.
    replaces_base: ClassVar[bool] = False
    # Whether the effective weight is composed of whole weights, once per change, and put in place of the base's. Then every
    # parameter of a module can carry an adapter (norms and biases too), and `accumulate` and `pull_back` are needed.
    composes_weight: ClassVar[bool] = False
    # Names of the tensors that are not trained, for whoever counts what a file holds.
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, geometry: Geometry, config: SubspaceConfig) -> None:
        super().__init__()
        self.geometry = geometry
        self.dropout = config.dropout
        # m of W + m dW, which users set (`set_scale`). The layer takes care of it, but for `call`, which does so by itself.
        self.multiplier = 1.0
        self.awaits_weight = False  # made new on a base whose weights are on the meta device

    @classmethod
    def check(cls, geometry: Geometry, config: SubspaceConfig) -> None:
        """Raise ValueError if the config does not fit the weight. Called for every layer before the model is touched."""

    @classmethod
    def frozen_in(cls, config: SubspaceConfig) -> tuple[str, ...]:
        """`frozen`, where it depends on the config."""
        return cls.frozen

    @classmethod
    def applies(cls, config: SubspaceConfig) -> bool:
        """Whether an adapter acts on a weight of a wrapped module; `config` has the overrides of that weight filled in."""
        return True

    # What depends on the weight ----------------------------------------------------------------------------------------

    def prepare(self, weight: Weight, siblings: Sequence[Any], saved: dict[str, Tensor] | None = None) -> None:
        """Fill what depends on the weight: when an adapter is new, or came from a file that leaves it out.

        Args:
            weight: the base's weight; not asked for when `siblings` have all that is needed.
            siblings: other adapters of the same weight.
            saved: None for a new adapter; else the tensors of the file (names as in `state_dict`), which stay as they are.

        Raises:
            ValueError: it is not the weight that the adapter was made for; says what differs and the way out.
        """

    def is_incomplete(self, saved: dict[str, Tensor] | None = None) -> bool:
        """Whether something that depends on the weight is not there, or not known to fit; then `prepare` is called.

        Asked before every use, and with the tensors of a file (`saved`) before they are loaded.
        """
        return self.awaits_weight and saved is None

    def tensors(self) -> dict[str, Tensor]:
        """What `state_dict` has, by name, without a call of it: under FSDP2 that would shard the layer in its own forward."""
        buffers = {name: buffer for name, buffer in self._buffers.items() if name not in self._non_persistent_buffers_set}
        return {name: tensor.detach() for name, tensor in {**self._parameters, **buffers}.items() if tensor is not None}

    def decided(self) -> dict[str, Any]:
        """Config fields that the weight decided, such as `{"r": 93}`; they are recorded so that loading decides nothing."""
        return {}

    def lowered(self) -> list[int] | int | None:
        """The rank, or ranks, of this weight where it is smaller than the number that the config has; else None."""
        return None

    def _load_from_state_dict(self, *args: Any) -> None:
        self.awaits_weight = False
        super()._load_from_state_dict(*args)

    # The update --------------------------------------------------------------------------------------------------------

    def dropped(self, x: Tensor, out: Tensor) -> Tensor:
        """The input that `forward` gets: in the dtype of the output, with dropout in training."""
        return F.dropout(x.to(out.dtype), self.dropout, self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`forward(x, y0, out)`: add the update to `out`, in the dtype of `out`. What `takes_over` leaves this to `call`.

        A Delta is always called as a module is: ZeRO-3 gathers and releases a module's parameters around its call.

        Args:
            *args: x, the layer's input, dropout applied (ids for an embedding); y0, the base layer's output; out, `y0` plus
                the updates of the adapters before this one.
            **kwargs: of `call`.
        """
        return self.call(*args, **kwargs)

    def call(self, base_layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's whole output, of W + `multiplier` dW; only for `takes_over`, and without it for `replaces_base`."""
        raise NotImplementedError

    # Only for `composes_weight` -----------------------------------------------------------------------------------------

    @property
    def adds(self) -> bool:
        """Whether `forward` adds the update to the output after all, because no weight needs to be made for it."""
        return False

    @property
    def only_adds(self) -> bool:
        """Whether the update is added to the layer's output, whatever that was made of."""
        by_itself = not (self.takes_over or self.replaces_base or self.geometry.reads_own_weight)
        return by_itself and (not self.composes_weight or self.adds)

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The tensors that the composed weight depends on."""
        return tuple(self.parameters())

    def accumulate(self, total: Tensor) -> None:
        """Add dW to `total` in place: contiguous, in the module's own layout, float32 or wider; no graph."""
        raise NotImplementedError

    def pull_back(self) -> Callable[[Tensor], Sequence[Tensor | None]]:
        """A function from dL/dW (the module's own layout, the base's dtype) to one gradient for each of `trained`.

        Called when the weight is composed: what the function needs of the present values, it keeps.
        """
        raise NotImplementedError

    def as_plain_sum(self) -> list[float] | None:
        """lambda `[T]` where dW is sum_t lambda_t tau_t with nothing else to it (task arithmetic); else None."""
        return None

    def delta_weight(self, weight: Weight) -> Tensor:
        """The dense update dW, canonical layout, at least in the dtype of the parameters: what the output is tested against."""
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """The update of the layer's bias `[out]`, which `call` adds too; None for a method that leaves biases alone."""
        return None

    def lora_factors(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """Exact LoRA factors (A `[r, in, *kernel]`, B `[out, r]`) with dW = B A, or None if dW has no such form."""
        return None

    @classmethod
    def combine(cls, deltas: list[Any], weights: list[float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The exact weighted sum of several updates of one weight, in this method's own form.

        Returns:
            Config fields of this layer (such as `{"r": [4, 4]}`) and the tensors of the new Delta by name.
        """
        raise NotImplementedError(f"{cls.__name__} has no exact weighted sum.")

    def extra_repr(self) -> str:
        """Shapes of the tensors, as in `core=[4, 4]`."""
        tensors = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in tensors)
