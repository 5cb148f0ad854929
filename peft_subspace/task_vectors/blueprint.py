"""What the class of a model says of its tensors: built from config.json without a value, never with code from the Hub."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Blueprint:
    """A model of transformers on the meta device.

    Attributes:
        model: the module; nothing in it has values.
        tied: name of a parameter in memory -> the one whose values it shares (`_tied_weights_keys`, expanded).
        embeddings: names of weights that are looked up by row.
        layers: names of weights of layers that PEFT's LoRA has a class for.
        computes_by_tie: more depends on `tie_word_embeddings` than what is tied (T5 scales its outputs by it), so that a
            config must go on saying what it says.
    """

    model: Any
    tied: Mapping[str, str]
    embeddings: frozenset[str]
    layers: frozenset[str]
    computes_by_tie: bool


def blueprint(config: Mapping[str, Any]) -> Blueprint | None:
    """The model that a config.json describes; None if transformers has no class for it, or the config does not fit the class.

    Cost: imports transformers, and builds the model without values: one to four seconds the first time.
    """
    architecture = next(iter(config.get("architectures") or []), None)
    if not isinstance(architecture, str):
        return None
    return _built(architecture, json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _built(architecture: str, text: str) -> Blueprint | None:
    try:
        import torch
        import transformers

        model_class: Any = getattr(transformers, architecture)
        config, config_class = json.loads(text), model_class.config_class
        with torch.device("meta"):
            model = model_class(config_class.from_dict(json.loads(text)))
        as_is, untied = (config_class.from_dict({**json.loads(text), **more}).to_dict() for more in ({}, {_TIE: False}))
        computes = reads_tie(model) or any(value != untied.get(key) for key, value in as_is.items() if key != _TIE)
        modules = {f"{name}.weight": module for name, module in model.named_modules(remove_duplicate=False)}
        embeddings = frozenset(name for name, module in modules.items() if isinstance(module, torch.nn.Embedding))
        layers = frozenset(name for name, module in modules.items() if _has_lora(name, module, config.get("model_type")))
        layers -= _read_by_owner(model)
        return Blueprint(model, dict(model.all_tied_weights_keys), embeddings, layers, computes)
    except Exception:  # an architecture of its own, a config that does not fit, another transformers
        return None


def reads_tie(model: Any) -> bool:
    """Whether the forward of a model, or of a model in it, reads `tie_word_embeddings` from the config."""
    from transformers import PreTrainedModel

    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return any(_TIE in inspect.getsource(type(module).forward) for module in inner)


def _has_lora(name: str, module: Any, model_type: str | None) -> bool:
    """Whether plain PEFT loads a LoRA on a layer and computes what its factors say."""
    import torch
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    if isinstance(module, nn.Embedding) and not module.weight.requires_grad:  # a table that is read and never called
        return False
    if isinstance(module, nn.Embedding):  # one with a forward of its own takes no ids, as positions of OPT, or scales them
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if model_type in _MAMBA and name.endswith((".out_proj.weight", ".conv1d.weight")):
        return False
    return isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _read_by_owner(model: Any) -> set[str]:
    """Weights of layers of which the forward of the module around reads what PEFT's LoRA layers do not have, and crashes."""
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name == "" or any(True for _ in module.children()):
            text = _source_of_forward(type(module))
            found |= {f"{name}.{layer}.weight".removeprefix(".") for layer in _READ.findall(text)}
    return found


def _source_of_forward(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError, AttributeError):
        return ""


# As Whisper's encoder multiplies the strides of its convolutions
_READ = re.compile(r"self\.(\w+)\.(?:stride|kernel_size|padding|dilation|groups|num_embeddings|embedding_dim|padding_idx)\b")
_TIE = "tie_word_embeddings"
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # their kernels read weights past a layer's forward
