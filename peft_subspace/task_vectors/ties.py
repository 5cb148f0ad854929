"""Tied weights: one tensor in a file that a model has under several names. Needs no torch until a class has to be asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .blueprint import blueprint
from .headers import TensorHeader
from .renaming import names_in_memory

# For architectures that transformers does not have
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight", "tok_embeddings.weight",
)  # fmt: skip


def tied_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name that a file leaves out -> name in the file of the tensor that it shares.

    Args:
        config: config.json of the model.
        names: in its file.
    """
    if not may_tie(config):
        return {}
    names = list(names)
    found = blueprint(config)
    if found is None:
        return _by_name(names)
    stored = names_in_memory(names, config) or {name: name for name in names}
    groups: dict[str, list[str]] = {}
    for target, source in found.tied.items():
        groups.setdefault(source, [source]).append(target)
    aliases: dict[str, str] = {}
    for group in groups.values():
        there = [name for name in group if name in stored]
        if there:  # of an encoder alone, neither half is in the file
            aliases |= {name: stored[there[0]] for name in group if name not in stored}
    return aliases


def may_tie(config: Mapping[str, Any]) -> bool:
    """Whether a model may have tied weights, as far as its config alone tells: not if it says False everywhere."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return config.get("tie_word_embeddings", True) is not False or any("tie_word_embeddings" in one for one in inner)


def with_ties(tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The tensors of a file with those that it leaves out because they are tied, and name -> the stored one for these."""
    aliases = tied_names(config, tensors)
    return {**tensors, **{name: tensors[stored] for name, stored in aliases.items()}}, aliases


def _by_name(names: list[str]) -> dict[str, str]:
    embeddings = [name for name in names if name.endswith(_EMBEDDINGS)]
    if len(embeddings) != 1 or any(name.endswith(_HEADS) for name in names):
        return {}
    return {_HEADS[0]: embeddings[0]}
