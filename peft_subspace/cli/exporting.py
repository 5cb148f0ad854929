"""`peft-subspace export`: the one command that needs PEFT and the model's code."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from ..task_vectors.errors import InputError, OutputError
from ..task_vectors.places import check_place
from ..task_vectors.references import Reference, locate
from ..task_vectors.sources import ADAPTER_CONFIG, read_json

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def export_lora(adapter: str, out: Path, base: str | None, overwrite: bool = False) -> None:
    """Load an adapter on its base and write it as LoRA.

    Raises:
        InputError: no adapter, no base, a base of another shape, or an update that LoRA cannot express; names the layer.
        OutputError: as `places.check_place` says, or it cannot be written.
    """
    check_place(out, overwrite=overwrite)
    folder, _ = locate(adapter, None)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{adapter}: has no {ADAPTER_CONFIG}.")
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") == "LORA":
        raise InputError(f"{adapter}: is a LoRA adapter already.")
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{adapter}: its config does not name the base model; give it with --base.")
    needed = [Reference(os.fspath(folder)), Reference(str(name)), *_vectors(config)]
    place = check_place(out, overwrite=overwrite, references=needed)
    import peft
    import transformers

    # a name of the package, so that it is executed and registers its types: the command starts with a stand-in for it
    from peft_subspace import save_as_lora

    transformers.utils.logging.set_verbosity_error()
    own: Any = {"num_labels": _labels(folder)} if str(config.get("task_type", "")).endswith("_CLS") else {}
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads transformers' old name of the property whenever it wraps a model
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            loader: Any = getattr(transformers, _class_of(config, name))
            model = loader.from_pretrained(name, **{key: value for key, value in own.items() if value})
            wrapped = peft.PeftModel.from_pretrained(model, os.fspath(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{adapter} on {name}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    try:
        save_as_lora(wrapped, place, overwrite=overwrite)
    except OutputError:
        raise
    except ValueError as error:
        raise InputError(f"{adapter}: {error}") from error


def _vectors(config: dict[str, Any]) -> list[Reference]:
    """The task vectors that an adapter composes, and their base."""
    pool = config.get("pool")
    found = [config.get("base"), *(pool.values() if isinstance(pool, dict) else [])]
    named = [{key: part for key, part in one.items() if key != "base"} if isinstance(one, dict) else one for one in found]
    return [Reference.parse(one) for one in named if one]


def _class_of(config: dict[str, Any], base: str) -> str:
    """The class of the base: by the adapter's task, else as it was when the adapter was made, else by the base's config."""
    import transformers

    named = _CLASSES.get(str(config.get("task_type"))) or (config.get("auto_mapping") or {}).get("base_model_class")
    return named if named and hasattr(transformers, named) else class_of_model(base)


def class_of_model(name: str) -> str:
    """The class in transformers that a model was saved from; AutoModel where its config does not say."""
    import transformers

    architectures = transformers.AutoConfig.from_pretrained(name).architectures or []
    return next((found for found in architectures if hasattr(transformers, found)), "AutoModel")


def _labels(folder: Path) -> int | None:
    """Rows of the head that was trained with the adapter, which the base must be made with."""
    from ..task_vectors.headers import read_header

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    heads = [
        tensor.shape[0]
        for name, tensor in read_header(weights).tensors.items()
        if name.endswith(_HEADS) and len(tensor.shape) == 2
    ]
    return min(heads, default=None)


_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")
