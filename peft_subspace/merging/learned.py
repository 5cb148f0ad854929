"""Merging by what was learned, without the data: a saved adapter stands for the numbers of a recipe. Needs no torch.

    subspace: {learned: my-adapter}          a folder or a Hub id; base_model and models may be left out

The adapter's config names the base and the task vectors, and has hashes of both, so a recipe that lists other places for them
is checked, not trusted.

A further learned method is one file in `methods/` and one row in the catalogue:

- `Method(..., learned="module:function")`. The adapter's `peft_type` is the method's name in capitals.
- `function(learned, block, base) -> LearnedTensor` is called for every tensor that the adapter changes: `learned` is the
  opened adapter, `block` what its config's `provenance["blocks"]` says about that tensor, and under `parameter` the name that
  the vectors have it by; `base` is where the base's tensor lies. It reads headers only.
- `LearnedTensor.open()` gives the kernel what it needs, as `Inputs.learned`: values in memory, or something that reads a range
  at a time (a mask of the weight's size: `Reader.stored(header, inputs.start, stop, slot)`). Passes see it too.
- The kernel gets tau_k in the order of the adapter's vectors, and returns the merged delta (`acts_on="delta"`).

Everything else (places, hashes, names, tensors that stay as they are, whole modules that the adapter brings, manifest, dry run)
is here and is not the method's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..task_vectors.bundles import check_bundle, file_of, lost_files
from ..task_vectors.errors import InputError, RecipeError, sentence
from ..task_vectors.headers import TensorHeader
from ..task_vectors.models import Source, open_source
from ..task_vectors.provenance import digest, identity, record_of, same_value, value_of
from ..task_vectors.references import Reference, locate
from ..task_vectors.remote import has_values
from ..task_vectors.renaming import names_in_memory, pieces_in_memory
from ..task_vectors.sources import Checkpoint, open_checkpoint, shortened
from ..task_vectors.validate import match_names

if TYPE_CHECKING:
    from .recipe import Recipe

PEFT_PREFIX = "base_model.model."


class LearnedTensor(Protocol):
    """What was learned for one tensor of the base.

    Attributes:
        headers: the tensors of the adapter's file that are read for it.
        is_sum: whether the merged delta is a sum of w_k tau_k with one number w_k for each vector. An adapter of the sum can
            then be written exactly, by its factors; `open()` has the numbers as `weights`.
    """

    @property
    def headers(self) -> tuple[TensorHeader, ...]: ...

    @property
    def is_sum(self) -> bool: ...

    def open(self) -> Any:
        """What the kernel gets as `Inputs.learned`; may import torch and read."""


@dataclass(frozen=True)
class Learned:
    """An adapter whose coefficients, masks or whatever was learned are merged by.

    Attributes:
        checkpoint: its files, opened by their headers.
        method: name of the merge method.
    """

    checkpoint: Checkpoint
    method: str

    @property
    def config(self) -> Mapping[str, Any]:
        """adapter_config.json."""
        return self.checkpoint.config

    @property
    def records(self) -> list[dict[str, Any]]:
        """What each task vector is known by, in the order of whatever was learned."""
        return list((self.config.get("provenance") or {})["vectors"])

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """Name of each parameter that was composed, in the model -> how."""
        return dict((self.config.get("provenance") or {})["blocks"])

    def tensor(self, key: str) -> TensorHeader:
        """A tensor of the adapter's file, by its key there without PEFT's prefix."""
        for name in (PEFT_PREFIX + key, key):
            if name in self.checkpoint.tensors:
                return self.checkpoint.tensors[name]
        raise InputError(f"{self.checkpoint.name}: its file has no tensor {key!r}. Save the adapter again.")


def open_learned(reference: Reference, method: str, key: str = "learned") -> Learned:
    """Open the adapter of a learned method.

    Args:
        reference: folder or Hub id.
        method: that it was learned by.
        key: of the recipe, under `subspace`, for messages.

    Raises:
        InputError: it is no adapter, one of another method, or one that does not say what it was learned with.
    """
    if reference.lora is not None:
        raise RecipeError(f"subspace.{key}: {reference} names two things; name the adapter alone.")
    path, commit = locate(reference.model, reference.revision)
    checkpoint = open_checkpoint(path, str(reference), commit)
    kind = checkpoint.config.get("peft_type") if checkpoint.kind == "adapter" else f"a {checkpoint.kind.replace('_', ' ')}"
    if kind != method.upper():
        raise InputError(
            f"subspace.{key}: {reference} is {kind}, and a saved {method.upper()} adapter is expected, the folder that "
            f"`save_pretrained` wrote."
        )
    provenance = checkpoint.config.get("provenance") or {}
    if not provenance.get("vectors") or not provenance.get("blocks"):
        raise InputError(
            f"{reference}: its config does not say which task vectors and blocks its numbers belong to. Load the adapter onto "
            f"its model with PeftModel.from_pretrained, and save it again."
        )
    return Learned(checkpoint, method)


# The recipe --------------------------------------------------------------------------------------------------------------


def completed(recipe: Recipe) -> tuple[Recipe, Learned | None]:
    """The recipe with base and models in the order of what was learned, checked by their hashes; and what was learned.

    Raises:
        InputError: a model that is not the task vector that it stands for, by name.
    """
    if not recipe.method.learned or recipe.subspace.learned is None:
        return recipe, None
    from .recipe import ModelEntry

    learned = open_learned(recipe.subspace.learned, recipe.method.name)
    place = recipe.base_model or learned.config.get("base_model_name_or_path") or learned.config.get("base")
    if not place:
        raise RecipeError(f"{recipe.subspace.learned} does not name its base. Write base_model into the recipe.")
    base = Reference.parse(place)
    if recipe.models:
        chosen = _by_hash(learned, [entry.model for entry in recipe.merged_models], base)
    else:
        chosen = _of_pool(learned, base)
    models = [ModelEntry(model=reference) for reference in chosen]
    return recipe.model_copy(update={"base_model": base, "models": models}), learned


def _of_pool(learned: Learned, base: Reference) -> list[Reference]:
    pool, own = learned.config.get("pool") or {}, open_source(base)
    found = []
    for record in learned.records:
        file = file_of(record)
        if file is not None and (learned.checkpoint.folder / file).is_file():
            check_bundle(learned.checkpoint.folder / file, record)
            found.append(Reference(str(learned.checkpoint.folder / file)))
            continue
        given = pool.get(record["name"], record["reference"])
        given = {key: value for key, value in given.items() if key != "base"} if isinstance(given, dict) else given
        reference = Reference.parse(given)
        try:
            source = open_source(reference)
        except InputError as error:
            raise InputError(f"the task vector {record['name']!r}: {sentence(error)}{lost_files([record], ())}") from error
        if not _is(record, source, own):
            raise _other(record, str(reference), base)
        found.append(reference)
    return found


def _by_hash(learned: Learned, given: Sequence[Reference], base: Reference) -> list[Reference]:
    """The models of a recipe in the order of the vectors that they are."""
    own, left = open_source(base), [(reference, open_source(reference)) for reference in given]
    found: dict[str, Reference] = {}
    for record in learned.records:
        match = next((pair for pair in left if _is(record, pair[1], own)), None)
        if match is not None:
            left.remove(match)
            found[record["name"]] = match[0]
    missing = [record for record in learned.records if record["name"] not in found]
    if missing:
        raise _other(missing[0], ", ".join(str(reference) for reference, _ in left) or "none of the models", base)
    if left:
        raise InputError(
            f"models: {left[0][0]} is none of the task vectors that {learned.checkpoint.name} was learned with "
            f"({', '.join(found)}). Take it out of the recipe."
        )
    return [found[record["name"]] for record in learned.records]


def _is(record: Mapping[str, Any], source: Source, base: Source) -> bool:
    """Whether a model has the hashes of a record; whole models are known by their base's too. A dry run may not know yet.

    The vector that is bundled with the adapter stands for the one that it was made of: a recipe that a merge wrote lists it.
    """
    if not all(has_values(file.path) for part in source.checkpoints for file in part.files):
        return True
    if record.get("bundle"):
        own = record_of(str(record["name"]), source, None)
        if digest(identity(own)) == digest(identity({"parts": [record["bundle"]]})):
            return True
    if "base_parts" in record and not all(has_values(file.path) for part in base.checkpoints for file in part.files):
        record = {key: value for key, value in record.items() if key != "base_parts"}
    theirs = record_of(str(record["name"]), source, base if "base_parts" in record else None)
    return digest(identity(theirs)) == digest(identity(record))


def _other(record: Mapping[str, Any], given: str, base: Reference) -> InputError:
    with_base = f", or {base} is not its base ({record['base']})" if "base_parts" in record else ""
    return InputError(
        f"the task vector {record['name']!r}: {given} is not the one that the numbers were learned with "
        f"({record['reference']}): its files have other sizes or hashes{with_base}. List the right one under `models`."
    )


def open_mask(
    recipe: Recipe, known: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> tuple[Learned, LearnedTensors] | None:
    """The adapter of `subspace.mask`, and its mask of each tensor of the base; None for a recipe without one."""
    if recipe.subspace.mask is None:
        return None
    from .methods.registry import get

    learned = open_learned(recipe.subspace.mask, "concrete", "mask")
    return learned, learned_tensors(learned, get("concrete").learned_tensor, known, config)


def no_heads(names: Iterable[str], base: str) -> str:
    """What to say of a learned merge whose models have tensors beside the base, such as heads."""
    return (
        f"the models have {shortened(sorted(names), 3)}, which {base} does not have, and the result has the tensors of the "
        f"base alone: to classify, it needs a head of one of them."
    )


# The tensors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedTensors:
    """What an adapter says about the tensors of a base.

    Attributes:
        tensors: name of a tensor of the base -> what was learned for it; all others stay as they are.
        whole: name of a tensor -> its values in the adapter's file: modules that were trained whole, statistics of BatchNorm.
        blocks: name of a tensor of the base -> the block whose numbers it has; tied tensors have those of one.
    """

    tensors: Mapping[str, LearnedTensor]
    whole: Mapping[str, TensorHeader]
    blocks: Mapping[str, str]

    def is_shared(self, first: str, second: str) -> bool:
        """Whether two names of a tied tensor of the base go on having one value."""
        return self.whole.get(first) == self.whole.get(second) and self.blocks.get(first) == self.blocks.get(second)


def learned_tensors(
    learned: Learned, make: Any, known: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> LearnedTensors:
    """Match an adapter with the tensors of a base, by name.

    Args:
        learned: the adapter.
        make: `Method.learned`, resolved.
        known: tensors of the base.
        config: of the base, config.json.

    Raises:
        InputError: the base lacks a tensor that the adapter changes, or has other values than it was learned on.
    """
    blocks = learned.blocks
    stored, mark = learned.checkpoint.tensors, f".{learned.method}_delta"
    whole = {_plain(key, learned.method): header for key, header in stored.items() if mark not in key}
    names = _matched([*blocks, *whole], known, config, learned.checkpoint.name)
    there = {entry.get("tied", name) for name, entry in blocks.items() if name in names}
    lost = [name for name, entry in blocks.items() if entry.get("tied", name) not in there]
    pieces = _pieces(learned, lost, make, known, config) if lost else {}
    lost = [name for name in lost if name not in pieces]
    if lost:
        raise InputError(
            f"{learned.checkpoint.name}: composes {shortened(lost)}, which the base's file does not have. It was learned on "
            f"{learned.config.get('base_model_name_or_path') or 'another model'}."
        )
    _check_values(learned, names, known)
    found = {
        names[name]: make(learned, {"parameter": entry.get("tied", name), **entry}, known[names[name]])
        for name, entry in blocks.items()
        if name in names
    }
    found |= {piece: tensor for tensors in pieces.values() for piece, tensor in tensors.items()}
    leaders = {names[name]: str(entry.get("tied", name)) for name, entry in blocks.items() if name in names}
    return LearnedTensors(found, {names.get(name, name): header for name, header in whole.items()}, leaders)


def _pieces(
    learned: Learned, names: Sequence[str], make: Any, known: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> dict[str, dict[str, LearnedTensor]]:
    """Parameter that the base's file has in pieces (a stack of experts) -> piece -> what was learned for all of it.

    Raises:
        InputError: something else than one number for each vector was learned, which is no number for each piece.
    """
    layouts = pieces_in_memory({name: header.shape for name, header in known.items()}, config)
    found = {}
    for name in names:
        if name not in layouts:
            continue
        pieces, entry = layouts[name], {"parameter": name, **learned.blocks[name]}
        columns = known[pieces[0]].shape[-1]
        whole = replace(known[pieces[0]], shape=(sum(known[piece].count for piece in pieces) // columns, columns))
        if not make(learned, entry, whole).is_sum:
            raise InputError(
                f"{learned.checkpoint.name}: composes {name!r}, which the base's file has in {len(pieces)} pieces "
                f"({shortened(pieces, 2)}), and has more than one number for each vector there. Load the adapter with PEFT and "
                f"call merge_and_unload."
            )
        found[name] = {piece: make(learned, entry, known[piece]) for piece in pieces}
    return found


def _plain(key: str, method: str) -> str:
    """The model's own name of a tensor that the file has whole; statistics of BatchNorm are under their method's name."""
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in (f"{method}_batch_norm", "base_layer"))


def _matched(names: Sequence[str], known: Mapping[str, TensorHeader], config: Mapping[str, Any], owner: str) -> dict[str, str]:
    """Name in the model -> name in the base's file."""
    found = match_names(names, known, owner)
    if len(found) < len(names):
        renamed = names_in_memory(known, config)
        found |= {name: renamed[name] for name in names if name not in found and name in renamed}
    return found


def _check_values(learned: Learned, names: Mapping[str, str], known: Mapping[str, TensorHeader]) -> None:
    """Compare the values of the base that the adapter has kept with those of this one."""
    kept = (learned.config.get("provenance") or {}).get("base")
    if not kept:
        return
    wrong = []
    for name, value in kept["values"].items():
        header = known.get(names.get(name, ""))
        if header is not None and has_values(header.path) and not same_value(*value_of(header), value, kept["dtypes"]):
            wrong.append(name)
    if wrong:
        raise InputError(
            f"the base is not the one that {learned.checkpoint.name} was learned on: the values of {shortened(wrong)} are "
            f"others. Write its own base as `base_model`."
        )
