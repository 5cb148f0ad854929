"""How transformers saves and reloads a compressed model: its ranks stand in config.json, under `quantization_config`.

That is transformers' one seam for models whose layers are exchanged before their weights are loaded; nothing here is quantised.
Where `peft_subspace` is imported, `AutoModel....from_pretrained(folder)` rebuilds the layers and loads them, and
`save_pretrained` and `push_to_hub` of such a model write a folder of the same kind. Without the package transformers warns of
an unknown quantization type, "low_rank", and leaves these layers with random values: it offers no way to refuse.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .modules import replace_layers

METHOD = "low_rank"


class LowRankFormat(QuantizationConfigMixin):
    """The entry in config.json.

    Args:
        ranks: layer name -> k, or [k_out, k_in] of a convolution with a kernel.
    """

    def __init__(self, ranks: dict[str, Any], **kwargs: Any) -> None:
        self.quant_method: Any = METHOD  # a plain name: the enum lists transformers' own methods
        self.ranks = {name: found if isinstance(found, int) else _short(found) for name, found in ranks.items()}
        self.library = "peft_subspace"


class LowRankLoader(HfQuantizer):
    """Exchanges the layers before the weights are loaded."""

    requires_calibration = False
    quantization_config: LowRankFormat

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        modules, found, unknown = dict(model.named_modules()), {}, []
        for name, ranks in self.quantization_config.ranks.items():
            here = _name_in(model, name, modules)
            if here is None:
                unknown.append(name)
            else:
                found[here] = [ranks] if isinstance(ranks, int) else ranks
        if unknown:
            warnings.warn(f"{type(model).__name__} does not have these compressed layers: {unknown}.", stacklevel=2)
        replace_layers(model, found)
        untie(model, found)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        mark(model, self)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """It is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """All of it."""
        return True


def _short(ranks: Sequence[int]) -> int | list[int]:
    return ranks[0] if len(ranks) == 1 else list(ranks)


def _name_in(model: Any, name: str, modules: Mapping[str, Any]) -> str | None:
    """A layer's name in another class of the architecture: with a head it stands below `base_model_prefix`, without it not."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)


def untie(model: Any, names: Iterable[str]) -> None:
    """Take a model's weight ties off, all of them, if one ends at a compressed layer: what is left of it is no partner."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if any(key in (f"{name}.weight", f"{name}.bias") for name in names for pair in tied.items() for key in pair):
        for one in tied:
            owner, _, parameter = one.rpartition(".")
            module = model.get_submodule(owner)
            shared = module._parameters.get(parameter)
            if shared is not None:
                module._parameters[parameter] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = False


def mark(model: Any, loader: LowRankLoader) -> None:
    """Have a model saved as a compressed one, and be otherwise like any other (casts, Trainer, adapters on top)."""
    model.config.quantization_config = loader.quantization_config
    model.hf_quantizer = loader
    model.is_quantized = False


def register_format() -> None:
    """Make the format known to transformers."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowRankFormat
    AUTO_QUANTIZER_MAPPING[METHOD] = LowRankLoader


register_format()
