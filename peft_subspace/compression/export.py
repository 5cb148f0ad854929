"""From a model with a PELA adapter to a plain one that has left its original weights behind; and from official checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base import SubspaceLayer
from ..base.active import chosen_adapter
from .modules import LowRank, fill, low_rank_module, ranks_in, replace_layers
from .transformers_format import LowRankFormat, LowRankLoader, mark, untie

logger = logging.getLogger(__name__)


def export_compressed(model: Any, adapter_name: str | None = None) -> nn.Module:
    """Turn a PeftModel with a low-rank adapter into a plain model of standard layers. The original weights are gone afterwards.

    Every compressed layer becomes an `nn.Sequential` (keys `<name>.0.weight`, `<name>.1.weight`, `<name>.1.bias`, those of the
    official checkpoints), rounded once to the dtype of the layer that it replaces. Layers that read their weights by themselves
    (MultiheadAttention, experts) get the dense product. Trained copies of modules take the place of the originals.

    A transformers model can then be saved with `save_pretrained` and loaded with `from_pretrained`, as any other, where
    `peft_subspace` is imported; or adapted with LoRA, FLoRA or SVFit.

    Args:
        model: the PeftModel; it must not be used afterwards.
        adapter_name: the adapter; None for the active one.

    Returns:
        The base model, changed in place; its `exported_adapter` is the adapter's name, which the log says too.

    Raises:
        ValueError: no such adapter, several active ones and none named, an adapter that does not replace its base, merged
            adapters, a quantised base.

    Cost: the memory of the factors; a layer's original weight is released before the next one is replaced.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is no PeftModel. Put the adapter on with `get_peft_model`, or load it so.")
    tuner: Any = model.base_model
    name = chosen_adapter(tuner, adapter_name)
    if not tuner.delta_cls.replaces_base:
        raise ValueError(f"The adapter {name!r} adds to its base and needs it. Use `merge_and_unload` instead.")
    config = getattr(tuner.model, "config", None)
    tied = getattr(tuner.model, "all_tied_weights_keys", None) or {}
    layers = {key: layer for key, layer in tuner.model.named_modules() if isinstance(layer, SubspaceLayer)}
    merged = [key for key, layer in layers.items() if layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapters are merged into {merged[:3]}. Call `unmerge_adapter` first.")
    sharing = [key for key in layers if any(f"{key}.weight" in pair for pair in tied.items())]
    if sharing and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{sharing[0]} is tied to other embeddings of this encoder-decoder, which would have to be compressed together. "
            f"Leave the embeddings out (exclude_modules)."
        )
    quantised = [key for key, layer in layers.items() if layer.quantization_backend is not None]
    if quantised:
        raise ValueError(
            f"The base is quantised ({quantised[0]}), and a compressed model of both kinds cannot be saved. Save the adapter, "
            f"load the base unquantised, and load the adapter there: its file has all factors."
        )
    model.set_adapter(name)
    ranks = {key: found for key, layer in layers.items() if (found := _replace(tuner.model, key, layer, name)) is not None}
    plain: Any = model.merge_and_unload()
    plain.requires_grad_(True)  # as after `from_pretrained`
    if isinstance(plain, PreTrainedModel):
        untie(plain, ranks)
        mark(plain, LowRankLoader(LowRankFormat(ranks)))
    plain.exported_adapter = name
    logger.info(f"The model has the weights of the adapter {name!r}.")
    return plain


def _replace(model: nn.Module, key: str, layer: Any, adapter: str) -> list[int] | None:
    deltas = list(layer.deltas(adapter).values())
    if len(deltas) != 1 or deltas[0].geometry.reads_own_weight:
        return None  # merged into a dense weight
    base, delta = layer.get_base_layer(), deltas[0]
    module = low_rank_module(base, delta.ranks)
    fill(module, base, delta)
    module.train(layer.training).requires_grad_(True)
    parent, _, child = key.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return list(delta.ranks)


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Load a compressed checkpoint in the official layout into a dense model of the same architecture.

    The layers and their ranks are read off the keys (`<name>.0.weight` where the model has a layer `<name>`).

    Args:
        model: the dense model; changed in place.
        state_dict: all its weights, in low-rank form where they are compressed.

    Returns:
        The model.

    Raises:
        ValueError: no key is in low-rank form, or keys and shapes do not fit; says which.
    """
    ranks = ranks_in(state_dict, model)
    if not ranks:
        raise ValueError("No layer of the state dict is in low-rank form (`<layer>.0.weight` and `<layer>.1.weight`).")
    replace_layers(model, ranks)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}: {error}") from error
    if isinstance(model, PreTrainedModel):
        untie(model, ranks)
        mark(model, LowRankLoader(LowRankFormat(ranks)))
    return model


def is_compressed(model: nn.Module) -> bool:
    """Whether a plain model has low-rank layers of this package."""
    return any(isinstance(module, LowRank) for module in model.modules())
