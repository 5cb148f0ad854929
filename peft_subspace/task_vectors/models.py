"""One model of a merge: what it brings to every tensor of the base, as places in files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .adapters import Adapter, unmatched_text
from .deltas import Delta, LoraDelta, OnWeight, StoredDelta, TuckerDelta
from .dense_deltas import ParameterDelta
from .errors import InputError
from .headers import TensorHeader
from .readers import read_adapter
from .references import Reference, locate
from .renaming import names_in_memory
from .sources import Checkpoint, open_checkpoint
from .ties import with_ties
from .validate import EMBEDDINGS, check_shapes, is_buffer, match_names

A_SUFFIX, B_SUFFIX = "::A", "::B"  # names of the factors in a task-vector file
APART_KEY, ALL = "apart", "*"  # in its metadata: names, or all, whose change is not that of the tensors that are tied to them


@dataclass(frozen=True)
class Given:
    """What a model brings to one tensor: theta_k = (values, or the base's where they are None) + the sum of `deltas`."""

    values: TensorHeader | None = None
    deltas: tuple[Delta, ...] = ()

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """All tensors that have to be read for it."""
        own = () if self.values is None else (self.values,)
        return own + tuple(header for delta in self.deltas for header in delta.headers)


@dataclass(frozen=True)
class Source:
    """A model as a recipe names it: checkpoints, adapters or task-vector files, opened but not read."""

    reference: Reference
    checkpoints: tuple[Checkpoint, ...]

    @property
    def full(self) -> Checkpoint | None:
        """The part that is a whole model, if there is one."""
        return next((part for part in self.checkpoints if part.kind == "model"), None)

    @property
    def is_low_rank(self) -> bool:
        """Whether it is an adapter or low-rank task vector on nothing but the base."""
        return self.full is None


def open_source(reference: Reference | str) -> Source:
    """Find a model, download it if it is on the Hub, and read its headers."""
    reference = Reference.parse(reference)
    parts = [open_checkpoint(*_located(reference.model, reference.revision))]
    if reference.lora is not None:
        parts.append(open_checkpoint(*_located(reference.lora, reference.lora_revision)))
        if parts[0].kind != "model" or parts[1].kind == "model":
            raise InputError(f"{reference}: before the + stands a model, after it an adapter or a task-vector file.")
    return Source(reference, tuple(parts))


def _located(name: str, revision: str | None) -> tuple[Any, str, str | None]:
    path, commit = locate(name, revision)
    return path, f"{name}@{revision}" if revision else name, commit


def without_base(source: Source, base: Source | None) -> Source:
    """`base+lora` is the LoRA alone: the base's values need not be read twice, and its delta stays of low rank."""
    full = source.full
    if base is None or full is None or len(source.checkpoints) == 1 or base.full is None or full.path != base.full.path:
        return source
    return replace(source, checkpoints=source.checkpoints[1:])


def given_by(
    source: Source,
    base: Mapping[str, TensorHeader],
    *,
    embeddings: str = "error",
    config: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> tuple[dict[str, Given], list[str], list[str]]:
    """What a source brings to each tensor of the base.

    Args:
        source: the model.
        base: tensors of the base.
        embeddings: what to do about vocabularies of different sizes.
        config: of the base, config.json.
        aliases: names in `base` that its file leaves out -> the stored one that shares its values (`ties.with_ties`).

    Returns:
        name in the base -> what is given; tensors of the base that a whole model lacks; its tensors that the base lacks.

    Raises:
        InputError: shapes that do not fit, names that match twice, an adapter for layers that the base lacks.
    """
    config = config or {}
    found: dict[str, Given] = {}
    missing: list[str] = []
    extra: list[str] = []
    for part in source.checkpoints:
        if part.kind == "model":
            values, missing, extra = _values(part, base, embeddings)
            missing = [name for name in missing if name not in (aliases or {})]
            found = {name: Given(header) for name, header in values.items()}
        else:
            _add(found, part, base, config, embeddings, aliases or {})
    return found, missing, extra


def _values(
    part: Checkpoint, base: Mapping[str, TensorHeader], embeddings: str
) -> tuple[dict[str, TensorHeader], list[str], list[str]]:
    tensors = part.tensors
    names = match_names(tensors, base, part.name)
    if len(names) < len(base):  # what this model leaves out may be tied
        tensors, _ = with_ties(tensors, part.config)
        names = match_names(tensors, base, part.name)
    values = {ours: tensors[theirs] for theirs, ours in names.items()}
    check_shapes(part.name, ((name, base[name].shape, tensor.shape) for name, tensor in values.items()), embeddings)
    missing = sorted(name for name in base if name not in values and not is_buffer(name))
    extra = sorted(name for name in part.tensors if name not in names and not is_buffer(name))
    return values, missing, extra


def _add(
    found: dict[str, Given],
    part: Checkpoint,
    base: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    embeddings: str,
    aliases: Mapping[str, str],
) -> None:
    if part.kind == "adapter":
        adapter = read_adapter(part, config.get("model_type"))
        names = _module_names(part, adapter, base, config)
        deltas: dict[str, Delta] = {name: delta for name, delta in adapter.deltas.items()}
        whole = {names[theirs]: header for theirs, header in adapter.saved.items() if theirs in names}
        check_shapes(part.name, ((name, base[name].shape, header.shape) for name, header in whole.items()), embeddings)
        found.update({name: Given(header) for name, header in whole.items()})
    else:
        deltas = task_vector_deltas(part)
        names = match_names(deltas, base, part.name)
        if len(names) < len(deltas):  # it may have been saved from a model in memory
            renamed = names_in_memory(base, config)
            names |= {theirs: renamed[ours] for theirs, ours in match_names(deltas, renamed, part.name).items()}
        if len(names) < len(deltas):
            raise InputError(f"{part.name}: {unmatched_text([n for n in deltas if n not in names])} are not in the base.")
    given = [(names[theirs], theirs, delta) for theirs, delta in deltas.items()]
    if part.kind == "task_vector":  # a change of what the base has once is that of all its names
        ours = {name: (theirs, delta) for name, theirs, delta in given}
        follow = {alias: ours[stored] for alias, stored in aliases.items() if alias not in ours and stored in ours}
        given += [(alias, *pair) for alias, pair in follow.items() if pair[0] not in changed_alone(part)]
    for name, theirs, delta in given:
        before = found.get(name, Given())
        if isinstance(delta, OnWeight):
            delta = delta.on(before.values or base[name])
        found[name] = Given(before.values, (*before.deltas, _fitted(part, theirs, delta, base[name].shape)))


def changed_alone(part: Checkpoint) -> frozenset[str]:
    """Names in a task-vector file whose change is not that of the tensors that are tied to them."""
    named = part.metadata.get(APART_KEY, "[]")
    try:
        return frozenset(task_vector_deltas(part)) if named == ALL else frozenset(json.loads(named))
    except (ValueError, TypeError) as error:
        raise InputError(f"{part.name}: its metadata {APART_KEY!r} is no list of names: {error}.") from error


def alone(source: Source, names: Collection[str]) -> frozenset[str]:
    """Of names that a source changes, those whose change is not that of the tensors that are tied to them.

    A whole model changes both. An adapter changes the module that it is on, and a task-vector file says it.
    """
    kinds = {part.kind: part for part in source.checkpoints}
    if "model" in kinds:
        return frozenset()
    return frozenset(names) if "adapter" in kinds else changed_alone(kinds["task_vector"]) & frozenset(names)


def task_vector_deltas(part: Checkpoint) -> dict[str, Delta]:
    """The deltas of a task-vector file: `name` is dense, `name::A` and `name::B` are the factors of one of low rank."""
    deltas: dict[str, Delta] = {}
    for name, header in part.tensors.items():
        if name.endswith(A_SUFFIX) and name.removesuffix(A_SUFFIX) + B_SUFFIX in part.tensors:
            stem = name.removesuffix(A_SUFFIX)
            deltas[stem] = LoraDelta(header, part.tensors[stem + B_SUFFIX], 1.0)
        elif not name.endswith(B_SUFFIX):
            deltas[name] = StoredDelta(header)
    return deltas


def _module_names(
    part: Checkpoint, adapter: Adapter, base: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> dict[str, str]:
    """Names in the base of all that an adapter changes.

    An adapter has the names of modules in memory. transformers saves some architectures under older names, so where names
    are missing it is asked for the new ones, which takes seconds and therefore comes last.
    """
    theirs = [*adapter.deltas, *adapter.saved]
    names = _matched(part, adapter, {name: name for name in base}, base)
    if any(name not in names for name in theirs):
        renamed = names_in_memory(base, config)
        if renamed:
            names = _matched(part, adapter, renamed, base)
    lost = [name for name in adapter.deltas if name not in names]
    if lost:
        raise InputError(
            f"{part.name}: adapts {unmatched_text(lost)}, which the base does not have. It was trained on "
            f"{adapter.base or 'another model'}."
        )
    return names


def _matched(part: Checkpoint, adapter: Adapter, ours: dict[str, str], base: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Adapter's name -> name in the base's file, given the base's names in memory -> in its file."""
    known = dict(ours)
    for name, stored in ours.items():
        stem, _, last = name.rpartition(".")
        if last == "in_proj_weight":  # MultiheadAttention, whose LoRA is called after the module
            known.setdefault(f"{stem}.weight", stored)
        if stem.endswith("out_proj") and last == "weight":  # FLoRA's container is called after the parameter
            known.setdefault(f"{stem.removesuffix('out_proj')}out_proj_weight", stored)
    for name, delta in adapter.deltas.items():
        owner = name.removesuffix(".weight").replace(".base_layer", "")
        found = [
            stored
            for ours_name, stored in ours.items()
            if ours_name.rpartition(".")[0].endswith(owner)
            and ours_name.endswith(adapter.bare)
            and (delta.fits(base[stored].shape) if isinstance(delta, ParameterDelta) else base[stored].shape == delta.shape)
        ]
        if isinstance(delta, ParameterDelta) and len(found) > 1:
            raise InputError(
                f"{delta.owner}: its update fits {unmatched_text(found)}, and the file does not say which is meant. Merge the "
                f"adapter into its model first (`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
            )
        if (name not in known or isinstance(delta, ParameterDelta)) and adapter.bare and len(found) == 1:
            known[name] = found[0]
    names = match_names([*adapter.deltas, *adapter.saved], known, part.name)
    return {theirs: known[name] for theirs, name in names.items()}


def extra_saved(source: Source, base: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Whole tensors that an adapter brings and the base lacks, such as a new head: name -> tensor."""
    found = {}
    for part in source.checkpoints:
        if part.kind == "adapter":
            saved = read_adapter(part).saved
            names = match_names(saved, base, part.name)
            found.update({name: header for name, header in saved.items() if name not in names})
    return found


def _fitted(part: Checkpoint, name: str, delta: Delta, shape: tuple[int, ...]) -> Delta:
    """The delta in the base's orientation; for a square weight the adapter's config has decided."""
    if delta.shape == shape:
        return delta
    if isinstance(delta, LoraDelta) and (flipped := replace(delta, transposed=not delta.transposed)).shape == shape:
        return flipped
    if isinstance(delta, TuckerDelta) and len(shape) > 1 and len(delta.core.shape) > 1:
        swapped = replace(delta, swapped=not delta.swapped)
        if swapped.shape == shape:
            return swapped
    if (rows := _other_rows(name, delta.shape or (), shape)) is not None:
        raise InputError(
            f"{part.name}: its delta for {name!r} has {rows:,} rows and the base's has {shape[0]:,}: it was trained with "
            f"another vocabulary. Give the base as many, by `model.resize_token_embeddings({rows})`, save it, and name that "
            f"model as the base."
        )
    raise InputError(f"{part.name}: its delta for {name!r} is {list(delta.shape or ())}, the base's weight is {list(shape)}.")


def _other_rows(name: str, delta: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """Rows that a delta of an embedding or a head has, if it is its rows alone that do not fit."""
    if not EMBEDDINGS.search(name) or len(delta) != 2 or len(shape) != 2:
        return None
    return next((rows for rows, columns in (delta, delta[::-1]) if columns == shape[1] and rows != shape[0]), None)
