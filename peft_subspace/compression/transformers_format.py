"""How transformers saves and reloads a compressed model: its ranks stand in config.json, under `quantization_config`.

That is transformers' one seam for models whose layers are exchanged before their weights are loaded; nothing here is quantised.
Where `peft_subspace` is imported, `AutoModel....from_pretrained(folder)` rebuilds the layers and loads them, and
`save_pretrained` and `push_to_hub` of such a model write a folder of the same kind. Without the package transformers refuses the
folder by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        self.quant_method = METHOD  # a plain name: the enum lists transformers' own methods
        self.ranks = {name: found if isinstance(found, int) else _short(found) for name, found in ranks.items()}
        self.library = "peft_subspace"


class LowRankLoader(HfQuantizer):  # type: ignore[misc]
    """Exchanges the layers before the weights are loaded."""

    requires_calibration = False
    quantization_config: LowRankFormat

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        ranks = self.quantization_config.ranks
        replace_layers(model, {_name_in(model, name): [r] if isinstance(r, int) else r for name, r in ranks.items()})
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


def _name_in(model: Any, name: str) -> str:
    """A layer's name in another class of the architecture: with a head it stands below `base_model_prefix`, without it not."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), name)


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
