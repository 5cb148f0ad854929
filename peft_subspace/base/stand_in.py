"""Calls of a module with other tensors in place of its own, which other threads that call it do not see.

A stand-in is a new object of the module's class with the module's own attributes, parameters, buffers and children, but for the
tensors that were exchanged, so that the module itself never changes and threads need not wait for one another. Where something
outside knows the module itself (hooks, a forward that was replaced on the instance, a compiled call), the tensors shadow its
attributes during the call instead, and threads take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MISSING = object()


class Turn:
    """A lock that a thread may take again while it has it. Copies of a module, and pickles, come with one of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Turn:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: Any) -> Turn:
        return Turn()

    def __reduce__(self) -> Any:
        return Turn, ()


@contextmanager
def exchanged(
    module: nn.Module, tensors: Callable[[], Mapping[str, Tensor]], turn: Turn, called: bool = True
) -> Iterator[nn.Module]:
    """The module to call: it, or a stand-in for it, has these tensors in place of its own. Not for a compiled graph.

    Args:
        module: the module.
        tensors: makes them: dotted name below the module -> tensor. It may read the module's own ones.
        turn: of everything that exchanges the same tensors.
        called: whether `__call__` is what follows; a forward that is called by itself runs no hooks.
    """
    with turn:
        found = tensors()
        if _is_known_outside(module, called) or any(_is_known_outside(inner, True) for inner in _between(module, found)):
            with shadowed(module, found):
                yield module
            return
        copies = _copied(module, found) if found else []
    if not copies:
        yield module
        return
    try:
        yield copies[0][0]
    finally:
        for copy, original, before in copies:
            _write_back(copy, original, before)


@contextmanager
def shadowed(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with tensors in place of its attributes, for all who look at it.

    A shadow lives in the instance's `__dict__`, which Python looks at before `nn.Module.__getattr__`, so no Parameter is
    exchanged: optimizers, DDP and FSDP keep theirs. `functional_call` would be ignored under FSDP1.
    """
    before = []
    try:
        for path, tensor in tensors.items():
            below, _, name = path.rpartition(".")
            owner = module.get_submodule(below)
            before.append((owner, name, owner.__dict__.get(name, _MISSING)))
            owner.__dict__[name] = tensor
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _MISSING:
                owner.__dict__.pop(name, None)
            else:  # of a call of the same thread around this one, or a tensor that FSDP1 keeps there
                owner.__dict__[name] = value


def own_tensor(owner: nn.Module, name: str) -> Any:
    """A parameter of a module itself, whatever shadows it at the moment; None if there is none."""
    parameter = owner._parameters.get(name)
    return getattr(owner, name, None) if parameter is None else parameter


def _is_known_outside(module: nn.Module, called: bool) -> bool:
    """Whether something would get, or call, the module itself in a call of its stand-in."""
    attributes = module.__dict__
    if not called:
        return False
    if any(attributes[name] for name in _HOOKS) or attributes.get("_compiled_call_impl") is not None:
        return True
    if any(getattr(torch_module, f"_global{name}") for name in _HOOKS):
        return True
    return "forward" in attributes and not _is_own_forward(module)


def _is_own_forward(module: nn.Module) -> bool:
    """Whether the forward on an instance is that of its class: who wraps it for a while leaves it there."""
    forward = module.__dict__["forward"]
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def _between(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[nn.Module]:
    """The modules below `module` on the way to the tensors."""
    parts = [path.split(".")[:-1] for path in tensors]
    names = {".".join(way[: depth + 1]) for way in parts for depth in range(len(way))}
    return [module.get_submodule(name) for name in names]


def _copied(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, nn.Module, dict[str, Any]]]:
    """(stand-in, module, the stand-in's attributes) for the module, first, and those on the way to the tensors."""
    copy = object.__new__(type(module))
    attributes = copy.__dict__
    attributes.update(module.__dict__)
    attributes.pop("forward", None)  # bound to the module
    below: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        child, _, rest = path.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            attributes[child] = tensor
    inner = []
    if below:
        attributes["_modules"] = children = dict(module._modules)
        for child, of_child in below.items():
            found = children[child]
            assert found is not None  # its tensors were found there
            inner += (copies := _copied(found, of_child))
            children[child] = copies[0][0]
    return [(copy, module, dict(attributes)), *inner]


def _write_back(copy: nn.Module, module: nn.Module, before: dict[str, Any]) -> None:
    """Give the module what its forward has noted on itself."""
    for name, value in copy.__dict__.items():
        if before.get(name, _MISSING) is not value:
            module.__dict__[name] = value
