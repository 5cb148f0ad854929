"""The models of a `learn` block: the base that is composed, and what each task answers with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..task_vectors.errors import InputError
from ..task_vectors.models import open_source
from ..task_vectors.readers import read_adapter
from ..task_vectors.reading import read_tensor
from ..task_vectors.references import Reference
from ..task_vectors.sources import shortened
from .tasks import Logits, pooled_logits

HEADED = {"text": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}
MARK = 7919  # a number of classes by which the shapes of a head are found out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, and without transformers' report of weights that are not in a file: what it means is checked here."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _config(path: Path, name: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{name}: transformers cannot make this model by itself ({str(error).splitlines()[0]}). Code that comes with a "
            f"model is never run: learn with MergeTrainer in a program of your own."
        ) from error


def load_base(path: Path, kind: str, name: str) -> tuple[Any, bool]:
    """The base as transformers makes it, in the dtype of its file; whether it answers by itself.

    Args:
        path: its folder.
        kind: of the tasks: "text", "image", or "answers".
        name: for messages.

    Returns:
        A model that writes, a classifier whose head is in the file, or the encoder alone.

    Raises:
        InputError: no class of transformers, or weights are missing.
    """
    config = _config(path, name)
    if kind == "answers":
        wanted = ["AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"]
    else:
        wanted = [HEADED[kind], "AutoModel"]
    for cls in wanted:
        settings: dict[str, Any] = {}
        model, missing = _load(cls, path, name, settings)
        if cls == "AutoModel" and missing and all(key.startswith("pooler.") for key in missing):
            model, missing = _load(cls, path, name, {"add_pooling_layer": False})
        if not missing:
            return model, cls != "AutoModel"
    raise InputError(f"{name}: its file lacks {shortened(sorted(missing))}, which {type(model).__name__} needs.")


def _load(cls: str, path: Path, name: str, settings: Mapping[str, Any]) -> tuple[Any, list[str]]:
    with _quiet():
        try:
            model, info = getattr(transformers, cls).from_pretrained(
                path, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=False, **settings
            )
        except (ValueError, OSError) as error:
            raise InputError(f"{name}: {cls} cannot load it: {str(error).splitlines()[0]}") from error
    return model.eval(), list(info["missing_keys"])


# Heads -------------------------------------------------------------------------------------------------------------------


def own_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What a classifier answers by itself."""
    found: Tensor = model(**batch).logits
    return found


def set_pad(config: Any, pad: int | None) -> None:
    """Tell a classifier which token pads; one that answers at the last token of a text takes no batch without."""
    if pad is not None:
        for one in {id(part): part for part in (config, config.get_text_config())}.values():
            one.pad_token_id = pad


def positions_of(model: nn.Module) -> int | None:
    """Most tokens that a model has positions for; RoBERTa and its kin leave out those up to the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def head_logits(
    encoder: Any, kind: str, reference: Reference, base_config: Any, task: str, pad: int | None = None
) -> tuple[Logits, int, Any]:
    """The answers of a task's own head on the shared encoder.

    A head has the names that it has in its architecture, and is applied as that architecture does; a `weight` and a `bias`
    alone are a linear layer on the pooled output.

    Args:
        encoder: the composed encoder.
        kind: "text" or "image".
        reference: a model, an adapter that has the head, or a file of tensors.
        base_config: of the base, for heads without a config.
        task: name, for messages.
        pad: the token that short texts are padded with.

    Returns:
        The answers, the number of classes, and the config that names them.

    Raises:
        InputError: no head in there, or one that does not fit.
    """
    tensors, folder = _tensors(reference)
    parameter = next(encoder.parameters())
    place = {"device": parameter.device, "dtype": parameter.dtype}
    config = base_config if folder is None else _config(folder, str(reference))
    if "weight" in tensors and set(tensors) <= {"weight", "bias"}:
        classes, width = tensors["weight"].shape
        head = nn.Linear(width, classes, bias="bias" in tensors)
        head.load_state_dict(tensors)
        pooled = pooled_logits(head.to(**place))
        return (lambda model, batch: pooled(encoder, batch)), classes, config
    names, marked = _head_names(kind, config)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"task {task!r}: {reference} has no head of {type(encoder).__name__} ({shortened(missing)}). Write "
            f"`head: MODEL`: a model or a .safetensors file with these tensors, or with `weight` and `bias` of a linear layer."
        )
    classes = tensors[marked].shape[names[marked].index(MARK)]
    model = _on_meta(kind, config, classes)
    if not hasattr(model, model.base_model_prefix):
        raise InputError(
            f"task {task!r}: {type(model).__name__} has no {model.base_model_prefix!r} to put the merged encoder at."
        )
    setattr(model, model.base_model_prefix, encoder)
    wrong = [f"{n!r} is {list(tensors[n].shape)}" for n in names if tensors[n].shape != model.get_parameter(n).shape]
    if wrong:
        raise InputError(f"task {task!r}: the head of {reference} does not fit {type(model).__name__}: {shortened(wrong)}.")
    model.load_state_dict({name: tensors[name].to(**place) for name in names}, strict=False, assign=True)
    heads = [model.get_parameter(name).requires_grad_(False) for name in names]
    assert not any(head.is_meta for head in heads)
    model.train(False)
    set_pad(model.config, pad)
    return (lambda _, batch: own_logits(model, batch)), classes, config


def _tensors(reference: Reference) -> tuple[dict[str, Tensor], Path | None]:
    """All that may be a head, by name, and the folder of the model whose config names its classes."""
    found: dict[str, Any] = {}
    folder = None
    for part in open_source(reference).checkpoints:
        if part.kind == "adapter":
            found |= read_adapter(part).saved
        elif part.kind == "model":
            found |= part.tensors
            folder = part.folder if part.config.get("model_type") else folder
    return {name: read_tensor(found[name]) for name in found if found[name].count < 2**24}, folder


def _on_meta(kind: str, config: Any, classes: int) -> Any:
    table = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id")}
    config = type(config).from_dict({**table, "num_labels": classes})
    with torch.device("meta"), _quiet():
        return getattr(transformers, HEADED[kind]).from_config(config, trust_remote_code=False)


def _head_names(kind: str, config: Any) -> tuple[dict[str, list[int]], str]:
    """Name of each parameter of the architecture's head -> its shape; the one that has a row for each class."""
    model = _on_meta(kind, config, MARK)
    prefix = f"{model.base_model_prefix}."
    names = {name: list(value.shape) for name, value in model.named_parameters() if not name.startswith(prefix)}
    marked = [name for name, shape in names.items() if MARK in shape]
    return names, marked[0]
