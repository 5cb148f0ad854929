"""Blocks: parameters of a model that task vectors change, for methods that compose weights of a pool of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.geometry import Geometry, describe, describe_all
from ..base.holders import has_children
from ..base.targets import base_parameters, exact_targets
from ..functional.choices import BLOCK_TYPES
from ..task_vectors.bundles import check_bundle, lost_files
from ..task_vectors.errors import InputError, sentence
from ..task_vectors.pool import DTYPES, Entry, Pool, open_pool
from ..task_vectors.provenance import check_records
from ..task_vectors.sources import shortened
from .same_base import check_base, check_pools_base

CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class OpenedPool:
    """What a config knows once it was put on a model.

    Attributes:
        pool: the vectors.
        sources: name of a parameter -> the name of that parameter, among its tied names, that the pool knows.
        kinds: name of a parameter -> its kind, one of `BLOCK_TYPES`.
        blocks: names of the parameters that are adapted.
        leaders: what blocks have in common -> the first Delta with it.
    """

    pool: Pool
    sources: dict[str, str] = field(repr=False)
    kinds: dict[str, str] = field(repr=False)
    blocks: set[str] = field(default_factory=set, repr=False)
    leaders: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: Any) -> OpenedPool:
        return OpenedPool(self.pool, self.sources, self.kinds, set(self.blocks))  # for another adapter, with leaders of its own

    def __reduce__(self) -> Any:
        return OpenedPool, (self.pool, self.sources, self.kinds, self.blocks)

    def source_of(self, name: str) -> str:
        """The name under which the pool knows a parameter."""
        return self.sources.get(name, name)

    def is_low_rank(self, name: str) -> bool:
        """Whether all vectors of a parameter have factors."""
        name = self.source_of(name)
        entries = [entry for entry in self.pool.entries if name in entry.names]
        return all(entry.vector.rank(entry.names[name]) is not None for entry in entries)


def block_name(key: str, weight: str) -> str:
    """Full name of a parameter: `target_parameters` have it for a key, layers their own name."""
    return key if key.endswith(f".{weight}") or key == weight else f"{key}.{weight}"


def open_blocks(config: Any, model: nn.Module) -> OpenedPool:
    """Open the pool of a config on a model, and fill in or check what its vectors are known by.

    Raises:
        ValueError: an empty pool; a vector that is not there, does not fit, or is not the one that a file's coefficients
            belong to.
    """
    names = config.vector_names
    if not names:
        raise ValueError("the pool has no task vectors. Give pool={name: folder, file or Hub id}.")
    if config.is_from_file and set(config.exclude_pool) & set(names):
        raise ValueError(
            f"exclude_pool={config.exclude_pool!r}: the file has coefficients of {names}, which go together. Set those of a "
            f"vector to zero instead, or train a new adapter without it."
        )
    bundled = config.bundled if config.is_from_file else {}
    missing = [name for name in names if name not in config.pool and name not in bundled]
    if missing:
        raise ValueError(f"the pool has no task vectors {missing}, for which there are coefficients.")
    shapes, kinds, first = {}, {}, dict[int, list[str]]()
    for name, module, own, parameter in base_parameters(model):
        geometry = describe_all(module).get(own) or describe(module, own)[own]
        shapes[name] = tuple(geometry.native(torch.empty(geometry.shape, device="meta")).shape)
        kinds[name] = _kind(module, own, geometry)
        first.setdefault(id(parameter), []).append(name)
    declared: Any = getattr(model, "config", None)
    with _names_lost_files(config, bundled):
        entries = open_pool(
            {name: bundled.get(name) or config.pool[name] for name in names},
            shapes,
            others={
                name.replace(".base_layer", "").replace(".original_module", "")
                for name in model.state_dict()
                if name not in model._parameters  # the model's own, which no layer holds: not composed, so not passed over
            },
            base=config.base or config.base_model_name_or_path,
            config=declared.to_dict() | _architecture(model) if hasattr(declared, "to_dict") else None,
            strict=config.strict,
        )
    if config.provenance is None or not config.is_from_file:  # a config may be put on one model after another
        config.provenance = {"vectors": [entry.record for entry in entries]}
    else:
        entries = _as_recorded(config.provenance["vectors"], entries, bundled)
    if config.strict:
        check_pools_base(entries, model, looks=not config.is_from_file)
        if not config.is_from_file:
            _note_statistics(entries)
            _note_heads(entries, config)
    for tied in first.values():
        for entry in entries:
            _add_tied(entry, tied)
    pool = Pool(entries, DTYPES[config.vector_dtype], config.placement)
    sources = {name: source for tied in first.values() for name, source in _sources(pool, tied).items()}
    return OpenedPool(pool, sources, kinds)


def _add_tied(entry: Entry, tied: list[str]) -> None:
    """Files know a tied tensor by one of its names, and not all by the same. What changes all of them is found under each."""
    theirs = [entry.names[name] for name in tied if name in entry.names]
    shared = next((name for name in theirs if entry.vector.changes_tied(name)), None)
    if shared is not None:
        entry.names.update({name: entry.names.get(name, shared) for name in tied})


def _sources(pool: Pool, tied: list[str]) -> dict[str, str]:
    """Name of a tied parameter -> the name that stands for it: the first for which all vectors have the same.

    An adapter on an embedding changes the input alone: then the head is a block of its own, or none.
    """
    same: dict[tuple[str | None, ...], str] = {}
    found = {}
    for name in sorted(tied, key=pool.covers, reverse=True):
        found[name] = same.setdefault(tuple(entry.names.get(name) for entry in pool.entries), name)
    return found


def _architecture(model: nn.Module) -> dict[str, Any]:
    """The class of a transformers model as a config has it, which notes it on saving alone."""
    cls: Any = next((one for one in type(model).__mro__ if one.__module__.startswith("transformers.")), type(model))
    return {"architectures": [cls.__name__]}


def _note_heads(entries: list[Entry], config: Any) -> None:
    """Warn of heads that vectors have and their base has not: there is no difference to compose, so the model's own answers."""
    names = {name for entry in entries for name in entry.beside if not _is_named(name, config.exclude_modules)}
    names = {name for name in names if not _is_named(name, config.modules_to_save)}
    if names:
        owners = sorted(entry.name for entry in entries if names & set(entry.beside))
        warnings.warn(
            f"The task vectors {shortened(owners)} have {shortened(sorted(names))}, which their base's file does not have. "
            f"There is no difference to compose, and this model's own values answer. Give a base that has this head, set it "
            f"yourself and save it with modules_to_save, or leave it out knowingly (exclude_modules).",
            stacklevel=2,
        )


def _is_named(parameter: str, modules: Any) -> bool:
    """Whether a parameter lies in one of some modules, named as PEFT's configs name them."""
    module = parameter.rpartition(".")[0]
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(f".{name}." in f".{module}." for name in modules or ())


def _note_statistics(entries: list[Entry]) -> None:
    """Warn of vectors that change running statistics: those of a composed model follow from its weights, not from theirs."""
    endings = tuple(f".{name}" for name in ("running_mean", "running_var"))
    changed = {
        (name.rpartition(".")[0], entry.name): None
        for entry in entries
        for name in entry.vector
        if name.endswith(endings) and any(bool(part.any()) for _, part in entry.vector.parts(name))
    }
    if changed:
        norms, names = (sorted({pair[place] for pair in changed}) for place in (0, 1))
        warnings.warn(
            f"The task vectors {shortened(names)} change the running statistics of {len(norms)} BatchNorms "
            f"({shortened(norms, 2)}). Those of a composed model are no sum of its parts: the adapter starts with the base's. "
            f"Estimate its own from batches: peft_subspace.training.estimate_statistics(model, batches).",
            stacklevel=2,
        )


@contextmanager
def _names_lost_files(config: Any, bundled: dict[str, str]) -> Iterator[None]:
    """Say of a vector that cannot be opened, too, that it was bundled and its file is not there."""
    try:
        yield
    except InputError as error:
        records = (config.provenance or {}).get("vectors") or []
        lost = lost_files(records, bundled) if config.is_from_file else ""
        if not lost:
            raise
        raise InputError(f"{sentence(error)}{lost}") from error


def _as_recorded(records: list[dict[str, Any]], entries: list[Entry], bundled: dict[str, str]) -> list[Entry]:
    """The entries, checked; one from the bundle stands for the vector that it was made of."""
    given = {str(record["name"]): record for record in records}
    found = []
    for entry in entries:
        if entry.name in bundled:
            check_bundle(Path(bundled[entry.name]), given[entry.name])
            entry = replace(entry, record=given[entry.name])
        found.append(entry)
    check_records(records, found)
    return found


def _kind(module: nn.Module, own: str, geometry: Geometry) -> str:
    if own.rpartition(".")[2] in ("bias", "in_proj_bias", "bias_k", "bias_v"):
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return geometry.kind if geometry.kind in BLOCK_TYPES else "other"


def default_targets(opened: OpenedPool, model: nn.Module, config: Any) -> tuple[set[str], list[str] | None]:
    """Every module and bare parameter that the pool changes and the config allows: target_modules, target_parameters.

    Raises:
        ValueError: with `strict`, the pool changes what cannot be composed: parameters of containers that are indexed or
            iterated, where a holder would be one more item.
    """
    modules, parameters, left_out = set[str](), [], []
    for name, module, own, _ in base_parameters(model):
        if not opened.pool.covers(opened.source_of(name)) or opened.kinds[name] not in config.block_types:
            continue
        if isinstance(module, CONTAINERS):
            left_out.append(name)
        elif describe_all(module):
            modules.add(name.removesuffix(f".{own}"))
        elif has_children(module):
            parameters.append(name)
        else:
            left_out.append(name)
    if left_out and config.strict:
        raise ValueError(
            f"The task vectors change {len(left_out)} parameters that cannot be composed: {shortened(left_out)} (of "
            f"containers such as ParameterList and Sequential). Set strict=False to leave them as the base has them."
        )
    return modules, sorted(parameters) or None


def chosen_blocks(config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
    """Drop what the pool does not change from the targets, and note the blocks; all that can go wrong is said here.

    Raises:
        ValueError: nothing is left, the config names parameters that are not there, the vectors take more memory than
            allowed, or the base is not the one that the coefficients were learned on.
    """
    opened: OpenedPool = config.opened
    before = len(targets)
    for name in list(targets):
        for weight in list(targets[name]):
            block = block_name(name, weight)
            if not opened.pool.covers(opened.source_of(block)) or opened.kinds[block] not in config.block_types:
                del targets[name][weight]
        if not targets[name]:
            del targets[name]
    opened.blocks = {block_name(name, weight) for name, weights in targets.items() for weight in weights}
    if not opened.blocks:
        raise ValueError(
            f"The task vectors {', '.join(opened.pool.names)} change none of the targeted parameters of kinds "
            f"{config.block_types}."
        )
    _check_names(config, opened)
    _check_ties(config, opened)
    if len(targets) < before:
        _narrow(config, model, set(targets))
    _check_size(config, opened)
    check_base(config, model, opened)


def _check_names(config: Any, opened: OpenedPool) -> None:
    """Names and endings of parameters that a config has, and that fit none, are slips."""
    known = opened.blocks | {opened.source_of(block) for block in opened.blocks}
    unknown = sorted(set(getattr(config, "selected", None) or {}) - known)
    endings = [*(e for group in getattr(config, "tie_blocks", None) or [] for e in group), *getattr(config, "fused_splits", {})]
    unknown += [ending for ending in endings if not any(f".{name}".endswith(f".{ending}") for name in known)]
    if unknown:
        raise ValueError(
            f"{shortened(unknown)}: selected, tie_blocks or fused_splits has it, and no parameter that is composed has that "
            f"name or ending. They are {shortened(sorted(known))}."
        )


def _check_ties(config: Any, opened: OpenedPool) -> None:
    """A tied tensor has one coefficient for each vector: parts of it would be named, and lie, differently in its layers."""
    sharing: dict[str, list[str]] = {}
    for name in sorted(opened.blocks):
        sharing.setdefault(opened.source_of(name), []).append(name)
    splits = tuple(getattr(config, "fused_splits", {}))
    for tied in sharing.values():
        in_parts = config.granularity in ("row", "column", "partition") or any(n.endswith(splits) for n in tied if splits)
        if len(tied) > 1 and in_parts:
            by = f"granularity={config.granularity!r}" + (f", fused_splits={config.fused_splits!r}" if splits else "")
            raise ValueError(
                f"{' and '.join(tied)} are one tensor, which cannot be composed in parts ({by}). Use "
                f"granularity={type(config).granularity!r}{' without fused_splits' if splits else ''}, or leave these layers "
                f"out (exclude_modules)."
            )


def _narrow(config: Any, model: nn.Module, names: set[str]) -> None:
    """Name the targets that are left, so that PEFT wraps no others."""
    parameters = {name for name, *_ in base_parameters(model)}
    config.target_parameters = sorted(names & parameters) or None
    modules = exact_targets(names - parameters, model)
    config.target_modules = set(modules) if isinstance(modules, list) else modules
    config.layers_to_transform = config.layers_pattern = None


def _check_size(config: Any, opened: OpenedPool) -> None:
    if config.max_vector_bytes is None:
        return
    needed = opened.pool.nbytes(sorted({opened.source_of(name) for name in opened.blocks}), getattr(config, "selected", None))
    if needed > config.max_vector_bytes:
        raise ValueError(
            f"The {len(opened.pool.entries)} task vectors take {needed:,} bytes in {config.vector_dtype}, and "
            f"max_vector_bytes={config.max_vector_bytes:,}. Use placement='disk' (for dense vectors), a narrower vector_dtype, "
            f"fewer vectors (exclude_pool; selected, for each block) or fewer block_types."
        )
