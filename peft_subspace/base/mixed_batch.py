"""`adapter_names=[...]`: another adapter for each sample of a batch.

PEFT passes the argument on only if the tuner has `_enable_peft_forward_hooks`; a transformers model would swallow it with
its other keywords, and every sample would get the active adapter in silence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"  # PEFT's word for "no adapter"
_HOOKS = threading.Lock()  # torch numbers hooks by a count that two threads may read at once, and one hook is then lost


@contextmanager
def adapter_names_passed_on(tuner: nn.Module, adapter_names: list[str] | None, num_beams: Any = None) -> Iterator[None]:
    """Hand `adapter_names` to every wrapped layer for the length of one call.

    Args:
        tuner: the model with wrapped layers.
        adapter_names: one name per sample; "__base__" for none. None does nothing.
        num_beams: of `generate`: the decoder sees every sample that many times, an encoder once.

    Raises:
        ValueError: in training mode, or a name that no layer has.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call `model.eval()` first.")
    layers = [m for m in tuner.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    known = {name for layer in layers if isinstance(layer, BaseTunerLayer) for name in layer._get_available_adapters()}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Loaded: {', '.join(sorted(known))}."
        )
    _refuse_held(layers)
    encoder = None
    if isinstance(num_beams, int) and num_beams > 1:
        encoder = getattr(tuner.model, "get_encoder", lambda: None)()
    in_encoder = set(map(id, encoder.modules())) if isinstance(encoder, nn.Module) and encoder is not tuner.model else set()
    hooks = []
    for layer in layers:
        beams = num_beams if isinstance(num_beams, int) and id(layer) not in in_encoder else 1
        names = [name for name in adapter_names for _ in range(beams)]
        if isinstance(layer, AuxiliaryTrainingWrapper):  # unlike our layers, it takes no name that it does not have
            names = [name if name in layer._adapters else BASE for name in names]
        hooks.append((layer, partial(_add_argument, adapter_names=names, thread=threading.get_ident())))
    with _HOOKS:
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in hooks]
    try:
        yield
    finally:
        with _HOOKS:
            for handle in handles:
                handle.remove()


def _refuse_held(layers: list[Any]) -> None:
    held = [layer.parameter_name for layer in layers if getattr(layer, "is_holder", False)]
    if held:
        raise ValueError(
            f"`adapter_names` does not work with target_parameters ({', '.join(held)}): one value serves the whole batch. Run "
            f"each adapter's samples by themselves with `set_adapter`."
        )


def _add_argument(
    module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None, *, adapter_names: list[str], thread: int
) -> Any:
    """Of the thread whose batch it is. Others see the hooks, too, and for a moment as ones that get no keywords."""
    if kwargs is None or threading.get_ident() != thread:
        return None
    return args, {"adapter_names": adapter_names, **kwargs}  # a layer inside of another one was told by that
