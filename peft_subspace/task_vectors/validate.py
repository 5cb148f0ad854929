"""Do the models of a merge fit together? Answered from names, shapes and dtypes, before a value is read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .errors import InputError
from .headers import TensorHeader
from .sources import Checkpoint, counted, shortened

# What wrappers and heads put before the names of a model; a base and a model with a head differ by one of them.
PREFIXES = (
    "", "model.", "module.", "_orig_mod.", "base_model.model.", "base_model.", "transformer.", "bert.", "roberta.",
    "distilbert.", "electra.", "albert.", "deberta.", "vit.", "resnet.", "gpt_neox.", "language_model.",
    "model.language_model.", "encoder.", "backbone.",
)  # fmt: skip
# Buffers that some versions of transformers save and others do not; every model makes them anew.
_BUFFERS = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)"
)
EMBEDDINGS = re.compile(r"embed|wte|lm_head|shared|output_layer", re.IGNORECASE)
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def match_names(theirs: Collection[str], ours: Collection[str], owner: str) -> dict[str, str]:
    """Which name of one model is which of another: equal, or equal once a known prefix is taken off or put on.

    One change of prefix holds for a whole model, and it is the one that brings most names together; nothing is ever
    matched by its position.

    Args:
        theirs: names of a model.
        ours: names of the base.
        owner: the model, for the message.

    Returns:
        Their name -> ours, without those that have no match.

    Raises:
        InputError: two ways to match are equally good and differ, or two names would become one.
    """
    known = set(ours)
    best: list[dict[str, str]] = [{name: name for name in theirs if name in known}]
    if len(best[0]) < len(theirs):
        for strip in PREFIXES:
            for add in PREFIXES:
                found = {n: changed for n in theirs if (changed := _changed(n, strip, add, known)) is not None}
                if len(found) > len(best[0]):
                    best = [found]
                elif len(found) == len(best[0]) and found not in best and len(found) > 0:
                    best.append(found)
    if len(best) > 1:
        name = next(n for n in best[0] if best[0][n] != best[1].get(n))
        raise InputError(
            f"{owner}: its tensor {name!r} could be {best[0][name]!r} or {best[1].get(name)!r} of the base. Save the model "
            f"again with the base's names."
        )
    taken: dict[str, str] = {}
    for name, ours_name in best[0].items():
        if taken.setdefault(ours_name, name) != name:
            raise InputError(f"{owner}: its tensors {taken[ours_name]!r} and {name!r} would both be {ours_name!r} of the base.")
    return best[0]


def _changed(name: str, strip: str, add: str, known: set[str]) -> str | None:
    if name in known:
        return name
    changed = add + name[len(strip) :] if name.startswith(strip) else name
    return changed if changed in known else None


def other_architecture(
    name: str, theirs: Mapping[str, Any], base: str, ours: Mapping[str, Any], shared: int, of: int
) -> InputError:
    """What to say of a model that has less than half of the base's tensors.

    Args:
        name: of the model.
        theirs: its config.json.
        base: name of the base.
        ours: the base's config.json.
        shared: tensors of the base that the model has.
        of: tensors of the base.
    """
    kinds = [next(iter(config.get("architectures") or []), None) or config.get("model_type") for config in (theirs, ours)]
    each = [f" (a {kind})" if kind else "" for kind in kinds]
    return InputError(
        f"{name}{each[0]} has {shared} of the {of} tensors of {base}{each[1]}: it is a model of another architecture, and only "
        f"models of one architecture can be merged, or a file with other names."
    )


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that models make by themselves, so that it does not matter if it is there."""
    return _BUFFERS.fullmatch(name) is not None


def tied_head(name: str, tensors: Mapping[str, TensorHeader]) -> str | None:
    """The embedding that an output head is tied to when it is not in the file, found by name and shape."""
    if not name.endswith(OUTPUT_HEADS):
        return None
    ends = (
        "embed_tokens.weight",
        "wte.weight",
        "word_embeddings.weight",
        "embed_in.weight",
        "shared.weight",
        "tok_embeddings.weight",
    )
    found = [key for key in tensors if key.endswith(ends)]
    return found[0] if len(found) == 1 else None


def check_shapes(owner: str, pairs: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]], embeddings: str) -> list[str]:
    """Compare the shapes of a model with those of the base.

    Args:
        owner: the model.
        pairs: name, shape of the base, shape of the model.
        embeddings: what the recipe says about vocabularies of different sizes: "error", "truncate", "pad_from_base".

    Returns:
        The tensors whose rows are to be cut or filled up.

    Raises:
        InputError: shapes differ; for vocabularies the message has the rows and what to write into the recipe.
    """
    other: list[str] = []
    rows: list[tuple[str, int, int]] = []
    changed: list[tuple[str, int, int]] = []
    for name, base, shape in pairs:
        if base == shape:
            continue
        if EMBEDDINGS.search(name) and len(base) == len(shape) and base[1:] == shape[1:]:
            fits = embeddings == ("truncate" if shape[0] > base[0] else "pad_from_base")
            (changed if fits else rows).append((name, base[0], shape[0]))
        else:
            other.append(f"{name!r} is {list(shape)}, in the base {list(base)}")
    if other:
        raise InputError(
            f"{owner}: {counted(len(other), 'tensor has another shape', 'tensors have other shapes')} than in the base: "
            f"{shortened(other)}. Give a "
            f"model that was made from this base, or its own base; for heads of other classes the base's encoder alone."
        )
    if rows:
        name, base_rows, own_rows = rows[0]
        way = (
            "truncate (leave out the rows that the base lacks)"
            if own_rows > base_rows
            else "pad_from_base (take the base's rows)"
        )
        raise InputError(
            f"{owner}: {name!r} has {own_rows:,} rows and the base's has {base_rows:,}: other vocabularies. If the first "
            f"{min(own_rows, base_rows):,} tokens are the same, write `subspace: {{embeddings: {way.split()[0]}}}`: {way}"
            + (f"; or give the base as many: `model.resize_token_embeddings({own_rows})`." if own_rows > base_rows else ".")
        )
    return [name for name, *_ in changed]


def made_for_another(checkpoint: Checkpoint, base: str) -> str | None:
    """The base that an adapter or a task-vector file names, if its name ends in another way: paths differ for good reasons."""
    declared = None if checkpoint.kind == "model" else declared_base(checkpoint)
    if not declared or not base or os.path.basename(declared.rstrip("/")) == os.path.basename(base.rstrip("/")):
        return None
    return declared


def declared_base(checkpoint: Checkpoint) -> str | None:
    """The base that an adapter, a task-vector file or a model's config names, if it names one."""
    if checkpoint.kind == "task_vector":
        return checkpoint.metadata.get("base") or None
    key = "base_model_name_or_path" if checkpoint.kind == "adapter" else "_name_or_path"
    value = checkpoint.config.get(key)
    return value if isinstance(value, str) and value else None


def is_adaptable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether PEFT's LoRA has a layer for a weight: of a linear layer, an embedding or a convolution."""
    return name.endswith(".weight") and 2 <= len(shape) <= 5
