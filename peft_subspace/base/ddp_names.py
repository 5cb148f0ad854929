"""The names of frozen buffers of adapters, which DDP is to leave alone."""

from __future__ import annotations

from torch import nn

from .delta import Delta

ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"  # where DDP looks them up, on the module that it wraps
PREFIXES = ("", "model.", "base_model.model.")  # of the base itself, of a tuner, of a PeftModel, which pass the question on


class FrozenName(str):
    """A name that stands there for an adapter, and goes with it. Others have put theirs there too."""

    __slots__ = ()


def keep_from_ddp(model: nn.Module) -> None:
    """Write down the frozen buffers that the model has now, and forget those that it no longer has.

    DDP sends every buffer of rank 0 to all others in each forward, frozen bases too, if their names are not there.
    """
    known: list[str] = list(model.__dict__.get(ATTRIBUTE, ()))
    others = [name for name in known if not isinstance(name, FrozenName)]
    frozen = sorted(
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, Delta)
        for buffer, _ in module.named_buffers(recurse=False)
    )
    names = [*others, *(FrozenName(prefix + name) for prefix in PREFIXES for name in frozen)]
    if names:
        model.__dict__[ATTRIBUTE] = names
    elif ATTRIBUTE in model.__dict__:
        del model.__dict__[ATTRIBUTE]
