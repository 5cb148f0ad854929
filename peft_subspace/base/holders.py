"""Parameters of modules that have children, such as a class token beside the layers of an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ddp import refuse_reentrant
from .delta import Delta
from .geometry import Geometry, describe
from .kinds import OwnWeightLayer
from .stand_in import Turn, exchanged, shadowed


class HeldForward:
    """The forward of a module beside whose parameters holders stand: with effective weights in place of them.

    It is an attribute of the instance, so that the module's hooks, FSDP's and ZeRO's among them, run around it as they do
    around the forward of the class.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.before = owner.__dict__.get("forward")  # accelerate's, say, which calls the module itself
        self.turn = Turn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        owner, forward = self.owner, type(self.owner).forward
        if torch.compiler.is_compiling():
            with shadowed(owner, self._weights()):
                return forward(owner, *args, **kwargs)
        if self.before is not None:
            with self.turn, shadowed(owner, self._weights()):
                return self.before(*args, **kwargs)
        with exchanged(owner, self._weights, self.turn, called=False) as module:
            return forward(module, *args, **kwargs)

    def _weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for child in self.owner.children():
            if isinstance(child, Holder):
                found.update(child.effective_weight())
        return found

    def take_off(self) -> None:
        """Leave the module as it was, unless somebody has wrapped this forward since; then it does nothing from now on."""
        if self.owner.__dict__.get("forward") is self:
            if self.before is None:
                del self.owner.__dict__["forward"]
            else:
                self.owner.__dict__["forward"] = self.before


class Holder(OwnWeightLayer):
    """Adapters on one parameter of a module with children. It stands beside the parameter, as one more child of that module.

    Wrapping the module itself would move its children one level down, where a second adapter would not find them. The module's
    forward is called with the effective weight in place of the attribute instead, see `HeldForward`.
    """

    is_holder = True

    def __init__(self, owner: nn.Module, prefix: str, delta_cls: type[Delta], parameter_name: str, **kwargs: Any) -> None:
        self.__dict__["owner"], self.parameter_name = owner, parameter_name  # not a child: it is the parent
        super().__init__(nn.Identity(), prefix, delta_cls, **kwargs)
        others = (child for child in owner.children() if isinstance(child, Holder))
        other = next(others, None)
        self.held_forward: HeldForward = HeldForward(owner) if other is None else other.held_forward
        if other is None:
            owner.__dict__["forward"] = self.held_forward

    def get_base_layer(self) -> nn.Module:
        """The module that has the parameter."""
        owner: nn.Module = self.__dict__["owner"]
        return owner

    def _describe(self) -> dict[str, Geometry]:
        return describe(self.get_base_layer(), self.parameter_name)

    def effective_weight(self) -> dict[str, Tensor]:
        """The parameter's name -> what stands in for it; empty without an adapter."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return {}
        (container,) = self.geometries
        if self.training:
            refuse_reentrant((d for name in self.active_adapters for d in self.deltas(name).values()), self.key)
        names = [name for name in self._here(self.active_adapters) if self._is_composed(container, name)]
        return {self.parameter_name: self._effective_weight(container, names)} if names else {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """It is not called."""
        raise RuntimeError(f"{self.parameter_name} is a parameter and cannot be called.")

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge if asked; then the holder goes without a trace (see `take_off`)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def take_off(self) -> None:
        """Remove the child from the module, and with the last one what was done to the module's forward."""
        owner = self.get_base_layer()
        for name in [name for name, child in owner._modules.items() if child is self]:
            del owner._modules[name]
        if not any(isinstance(child, Holder) for child in owner.children()):
            self.held_forward.take_off()


def find_holder(module: nn.Module, parameter_name: str) -> Holder | None:
    """The holder that stands beside a parameter of a module, if there is one."""
    found = (child for child in module.children() if isinstance(child, Holder) and child.parameter_name == parameter_name)
    return next(found, None)


def has_children(module: nn.Module) -> bool:
    """Whether a module has layers of its own below it."""
    return any(not isinstance(child, Holder) for child in module.children())
