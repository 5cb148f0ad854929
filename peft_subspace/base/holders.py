"""Parameters of modules that have children, such as a class token beside the layers of an embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .delta import Delta
from .geometry import Geometry, describe
from .kinds import OwnWeightLayer


class Holder(OwnWeightLayer):
    """Adapters on one parameter of a module with children. It stands beside the parameter, as one more child of that module.

    Wrapping the module itself would move its children one level down, where a second adapter would not find them. Hooks on the
    module put the effective weight in place of the attribute before its forward and take it away afterwards.
    """

    is_holder = True

    def __init__(self, owner: nn.Module, prefix: str, delta_cls: type[Delta], parameter_name: str, **kwargs: Any) -> None:
        self.__dict__["owner"], self.parameter_name = owner, parameter_name  # not a child: it is the parent
        super().__init__(nn.Identity(), prefix, delta_cls, **kwargs)
        owner.register_forward_pre_hook(self._put)
        owner.register_forward_hook(self._take_away, always_call=True)

    def get_base_layer(self) -> nn.Module:
        """The module that has the parameter."""
        owner: nn.Module = self.__dict__["owner"]
        return owner

    def _describe(self) -> dict[str, Geometry]:
        return describe(self.get_base_layer(), self.parameter_name)

    def _put(self, module: nn.Module, args: Any) -> None:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return
        (container,) = self.geometries
        names = [name for name in self._here(self.active_adapters) if self._is_composed(container, name)]
        if names:
            module.__dict__[self.parameter_name] = self._effective_weight(container, names)

    def _take_away(self, module: nn.Module, args: Any, out: Any) -> None:
        module.__dict__.pop(self.parameter_name, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """It is not called."""
        raise RuntimeError(f"{self.parameter_name} is a parameter and cannot be called.")

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge if asked; then the holder goes without a trace (see `take_off`)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def take_off(self) -> None:
        """Remove the hooks and the child from the module."""
        owner = self.get_base_layer()
        for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                owner._forward_hooks_always_called.pop(key, None)
        for name in [name for name, child in owner._modules.items() if child is self]:
            del owner._modules[name]


def find_holder(module: nn.Module, parameter_name: str) -> Holder | None:
    """The holder that stands beside a parameter of a module, if there is one."""
    found = (child for child in module.children() if isinstance(child, Holder) and child.parameter_name == parameter_name)
    return next(found, None)


def has_children(module: nn.Module) -> bool:
    """Whether a module has layers of its own below it."""
    return any(not isinstance(child, Holder) for child in module.children())
