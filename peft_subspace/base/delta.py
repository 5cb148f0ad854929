"""The contract of a method: one adapter on one weight is one small module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .geometry import Geometry

if TYPE_CHECKING:
    from .config import SubspaceConfig


class Delta(nn.Module):
    """One adapter's update of one weight, W' = W + dW.

    A subclass makes its parameters (trained) and buffers (frozen) in `__init__`, reads no weight there, and works on the
    meta device. It is flat: every tensor hangs on the Delta itself, because PEFT expects the adapter's name to stand
    second to last in a key (`<layer>.<prefix>delta.<adapter>.<tensor>`).

    Args:
        geometry: the weight's canonical shape and operators.
        config: the adapter's config with this layer's overrides filled in.
    """

    # Whether this update stands in for the base layer instead of being added to its output. Then `replace` is called.
    replaces_base: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, config: SubspaceConfig) -> None:
        super().__init__()
        self.geometry = geometry
        self.dropout = config.dropout

    @classmethod
    def check(cls, geometry: Geometry, config: SubspaceConfig) -> None:
        """Raise ValueError if the config does not fit the weight. Called for every layer before the model is touched."""

    def prepare(self, weight: Tensor) -> None:
        """Fill what depends on the weight (canonical layout, float32), when an adapter is new. Not called on loading."""

    def forward(self, x: Tensor, y0: Tensor, out: Tensor) -> Tensor:
        """Add the update to `out`, in the dtype of `out`.

        Args:
            x: the layer's input, dropout applied; ids for an embedding.
            y0: the base layer's output.
            out: `y0` plus the updates of the adapters before this one.
        """
        raise NotImplementedError

    def replace(self, base_layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's whole output; only for `replaces_base`."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The dense update dW, canonical layout, in the dtype of the parameters: what `forward` is tested against."""
        raise NotImplementedError

    def lora_factors(self) -> tuple[Tensor, Tensor] | None:
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
