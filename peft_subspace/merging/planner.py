"""From a recipe to a plan: the models are opened, matched by name and planned tensor by tensor, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..task_vectors.errors import InputError, RecipeError, sentence
from ..task_vectors.headers import FLOAT_DTYPES, TensorHeader
from ..task_vectors.models import APART_KEY, Given, Source, extra_saved, given_by, open_source, without_base
from ..task_vectors.sources import FORMAT_KEY, TASK_VECTOR, counted, is_float, shortened
from ..task_vectors.ties import with_ties
from ..task_vectors.validate import made_for_another, other_architecture, tied_head
from .layout import make_layout
from .learned import Learned, LearnedTensor, LearnedTensors, completed, learned_tensors, no_heads, open_mask
from .methods.checks import turns_signs
from .methods.registry import Method
from .parameters import check_filters, check_parameters, depths, resolve
from .plan import Equal, Plan, TensorPlan
from .recipe import Recipe
from .statistics import open_statistics


def make_plan(recipe: Recipe, scratch: Path | None = None) -> Plan:
    """Open the models of a recipe and plan every tensor of the result.

    Args:
        recipe: what is wanted.
        scratch: a folder for aligned copies of the models, which lives until the plan is executed; without one the plan is
            the same, but that the models are not aligned.

    Raises:
        RecipeError: parameters that the method does not have, adapters without a base.
        InputError: models that do not fit together, with what differs.
    """
    method = recipe.method
    if recipe.subspace.learn is not None:
        raise RecipeError("a recipe with a `learn` block has a plan when it has learned: `merge` does both.")
    check_parameters(recipe, method)
    recipe, learned = completed(recipe)
    base = None if recipe.base_model is None else open_source(recipe.base_model)
    sources = tuple(without_base(open_source(entry.model), base) for entry in recipe.merged_models)
    reference = base or sources[0]
    if reference.full is None:
        raise RecipeError(
            f"{reference.reference} is an adapter or a task vector, which changes a model and is none. Name the model that it "
            f"belongs to as `base_model`."
        )
    for source in sources:
        if base is None and source.full is None:
            raise RecipeError(f"{source.reference} is an adapter or a task vector, and there is no `base_model` to put it on.")
    if recipe.subspace.align is not None and scratch is not None:
        from .aligned import align_sources

        sources = align_sources(sources, reference, scratch, recipe.subspace.seed, recipe.subspace.embeddings)
    return _Planner(recipe, method, base, sources, reference, learned).plan()


def open_base_tensors(base: Source) -> dict[str, Given]:
    """Name -> what the base has."""
    assert base.full is not None
    return given_by(base, base.full.tensors)[0]


class _Planner:
    """Gathers what the models give, then plans tensor by tensor."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        base: Source | None,
        sources: tuple[Source, ...],
        reference: Source,
        learned: Learned | None = None,
    ) -> None:
        self.recipe, self.method, self.base, self.sources, self.reference = recipe, method, base, sources, reference
        self.learned = learned
        assert reference.full is not None
        self.stored = reference.full.tensors
        self.config = reference.full.config
        self.known, self.aliases = dict(self.stored), dict[str, str]()
        if learned is not None or recipe.subspace.mask is not None or any(_may_part_ties(one, self.stored) for one in sources):
            self.known, self.aliases = with_ties(self.stored, self.config)
        self.tied = self.config.get("tie_word_embeddings", True)
        self.notes: list[str] = []
        self.equal: list[Equal] = []
        self.left_out: set[str] = set()
        self.turned: dict[int, list[str]] = {}  # model -> tensors whose negative weight is divided by a negative sum
        self.untied = False
        self.heads: dict[str, None] = {}  # tensors that models of a learned merge have beside the base
        self.statistics = open_statistics(recipe, method, sources, self.known)
        self.found = None if learned is None else learned_tensors(learned, method.learned_tensor, self.known, self.config)
        opened = open_mask(recipe, self.known, self.config)
        self.mask = None if opened is None else opened[0]
        self.masks_found = None if opened is None else opened[1]
        self.masks: Mapping[str, LearnedTensor] = {} if opened is None else opened[1].tensors
        if opened is not None and opened[1].whole:
            whole = shortened(sorted(opened[1].whole))
            self.notes.append(f"{recipe.subspace.mask}: its mask is applied; {whole}, which it trained whole, is not taken.")

    def plan(self) -> Plan:
        own = open_base_tensors(self.reference)
        given = [own if source is self.reference else self._given(source) for source in self.sources]
        order = sorted((n for n in self.known if n not in self.left_out), key=lambda n: _place(self.known[n]))
        check_filters(self.recipe, [name for name in order if is_float(self.known[name])])
        where = depths(self.stored)
        aliases = self._parted(given)
        tensors = []
        for name in order:
            if name in self.stored or name in aliases:
                like = self.aliases.get(name, name)
                tensors.append(self._tensor(name, own[like], [one.get(name, Given()) for one in given], where[like], like))
        tensors = tensors + self._new_heads() if self.found is None else self._with_whole(tensors, self.found)
        if self.recipe.subspace.output == "adapter":
            tensors = [tensor for tensor in tensors if tensor.name not in aliases or tensor.action == "merge"]
        metadata = {"format": "pt"}
        weights = "model.safetensors"
        if self.recipe.subspace.output == "task_vector":
            tensors = [tensor for tensor in tensors if tensor.action == "merge"]
            base = str(self.recipe.base_model)
            metadata |= {FORMAT_KEY: TASK_VECTOR, "base": base, "version": "1"}
            changed = {tensor.name for tensor in tensors}
            pairs = [{alias, stored} & changed for alias, stored in self.aliases.items() if aliases]
            if apart := sorted({name for pair in pairs if len(pair) == 1 for name in pair}):
                metadata[APART_KEY] = json.dumps(apart)
            weights = "task_vector.safetensors"
        size = self.recipe.subspace.shard_size if weights == "model.safetensors" else 2**62
        layout = make_layout(((t.name, t.dtype, t.shape) for t in tensors), size, metadata, weights)
        self._compare_bases()
        self._note_turned_signs()
        self._note_what_cannot_be_used_alone()
        names = tuple(str(entry.model) for entry in self.recipe.merged_models)
        checks = tuple(self.equal)
        return Plan(
            self.recipe, self.base, self.sources, names, tuple(tensors), layout, checks, tuple(self.notes), self.untied,
            self.learned, self.mask,
        )  # fmt: skip

    def _given(self, source: Source) -> dict[str, Given]:
        name, policy = str(source.reference), self.recipe.subspace.on_missing
        embeddings = self.recipe.subspace.embeddings
        if embeddings == "pad_from_base" and self.base is None:
            raise RecipeError("embeddings: pad_from_base needs a base_model to take the rows from.")
        given, missing, extra = given_by(source, self.known, embeddings=embeddings, config=self.config, aliases=self.aliases)
        if self.learned is not None:  # what a vector lacks, and what it has beside the base, was left out in learning too
            self.heads |= {key: None for key in (*extra, *extra_saved(source, self.known)) if not tied_head(key, self.known)}
            return given
        shared, of, base = len(self.stored) - len(missing), len(self.stored), self.reference.full
        if source.full is not None and base is not None and 2 * shared < of and (policy == "error" or not shared):
            raise other_architecture(name, source.full.config, base.name, self.config, shared, of)
        if (missing or extra) and policy == "error":
            lacks = f"lacks {len(missing)} tensors of the base ({shortened(missing)})" if missing else ""
            more = f"has {len(extra)} that the base lacks ({shortened(extra)})" if extra else ""
            raise InputError(
                f"{name}: {' and '.join(text for text in (lacks, more) if text)}. Write `subspace: {{on_missing: base}}` to "
                f"take the base's where a model lacks one and to leave out what the base lacks, or `on_missing: skip` to leave "
                f"out both."
            )
        if policy == "skip":
            self.left_out.update(missing)
        if missing or extra:
            taken = "left out of the result" if policy == "skip" else "taken from the base"
            lacks, more = counted(len(missing), "tensor is", "tensors are"), counted(len(extra), "is", "are")
            self.notes.append(f"{name}: {lacks} missing ({taken}), {more} left out.")
        if missing and policy == "base" and self.method.acts_on == "model" and self.base is None:
            raise RecipeError(f"{name} lacks {shortened(missing)}, and there is no base_model to take them from.")
        return given

    def _tensor(self, name: str, base: Given, models: list[Given], depth: float, like: str) -> TensorPlan:
        """Plan one tensor; `like` is the stored one that it shares its values with in the base, else itself."""
        header = self.known[name]
        recipe = self.recipe
        has_base = self.base is not None
        dtype = recipe.out_dtype or recipe.dtype
        learned = None if self.found is None else self.found.tensors.get(name)
        if not is_float(header):
            others = () if self.found is not None else tuple(m for m in models if m.values)
            return TensorPlan(name, header.shape, header.dtype, Given(header), others, "copy")
        code = header.dtype if dtype is None else FLOAT_DTYPES[dtype]
        if recipe.subspace.output == "task_vector" and dtype is None:
            code = "F32"
        tables = [entry.parameters for entry in recipe.merged_models]
        try:
            options, per_model = resolve(self.method, recipe.parameters, tables, like, depth)
        except ValueError as error:
            raise RecipeError(f"parameters for {name!r}: {sentence(error)}") from error
        self._check_together(name, options, per_model)
        unchanged = has_base and self.method.acts_on == "delta" and all(not m.headers for m in models)
        if unchanged or (self.found is not None and learned is None):
            action = "copy" if code == header.dtype and not base.deltas else "cast"
            return TensorPlan(name, header.shape, code, base, (), action)
        needs_base = (
            self.method.base != "ignored"
            or any(m.values is None or m.values.count < header.count for m in models)
            or recipe.subspace.output == "task_vector"
        )
        partner = (tied_head(like, self.known) if self.tied else None) or like
        kept = base if has_base and needs_base else None
        found = [tensors[name] for tensors in self.statistics if name in tensors]
        statistics = tuple(found) if found and len(found) == len(models) else None
        return TensorPlan(
            name, header.shape, code, kept, tuple(models), "merge", options, tuple(per_model), partner, statistics, learned,
            self.masks.get(name),
        )  # fmt: skip

    def _with_whole(self, tensors: list[TensorPlan], found: LearnedTensors) -> list[TensorPlan]:
        """Modules that the adapter of a learned method trained whole, such as a head, in place of the base's or beside them."""
        both = sorted(set(found.whole) & set(found.tensors))
        if both:
            raise InputError(f"{shortened(both)}: trained whole and composed as well. Use one of them.")
        if found.whole and self.recipe.subspace.output == "task_vector":
            self.notes.append(f"{shortened(sorted(found.whole))}: trained whole, not part of the task vector.")
        dtype = self.recipe.out_dtype or self.recipe.dtype
        new = []
        for name, header in found.whole.items():
            if name in self.known and self.known[name].shape != header.shape:
                raise InputError(
                    f"{name!r} is {list(header.shape)} in the adapter, {list(self.known[name].shape)} in the base."
                )
            like = self.known.get(name, header)
            code = like.dtype if dtype is None or not is_float(header) else FLOAT_DTYPES[dtype]
            action = "copy" if code == header.dtype else "cast"
            new.append(TensorPlan(name, header.shape, code, Given(header), (), action))
        return [tensor for tensor in tensors if tensor.name not in found.whole] + new

    def _check_together(self, name: str, options: Mapping[str, Any], per_model: list[dict[str, Any]]) -> None:
        weights = [float(given.get("weight", 1.0)) for given in per_model]
        if turns_signs(self.method, options, weights, self.recipe.subspace.semantics):
            for number, weight in enumerate(weights):
                if weight < 0:
                    self.turned.setdefault(number, []).append(name)
        if self.method.check is None:
            return
        try:
            self.method.check(options, per_model, weights, self.recipe.subspace.semantics)
        except ValueError as error:
            raise RecipeError(f"parameters for {name!r}: {sentence(error)}") from error

    def _note_what_cannot_be_used_alone(self) -> None:
        """A folder that transformers does not load, or an encoder without a head, as a result that is no task vector."""
        full = self.reference.full
        assert full is not None
        if self.recipe.subspace.output == "model" and not (full.folder / "config.json").is_file():
            self.notes.append(
                f"{full.name} has no config.json, so the result has none, and transformers cannot load it by itself. Put the "
                f"config.json of its architecture beside the weights."
            )
        if self.heads and self.recipe.subspace.output != "task_vector":
            self.notes.append(no_heads(self.heads, full.name))

    def _note_turned_signs(self) -> None:
        """A negative weight takes a model away, unless it is divided by a sum of weights that is negative too."""
        flag = next((p.name for p in self.method.parameters if p.name in ("normalize", "normalize_weights")), None)
        way_out = f"`{flag}: false` leaves it negative." if flag else f"{self.method.name} always divides by the weights."
        for number, names in self.turned.items():
            self.notes.append(
                f"{self.recipe.merged_models[number].model}: has a negative weight for {len(names)} tensors "
                f"({shortened(names, 2)}), and the weights are divided by the sum of those that take part. Where that is "
                f"negative too, the model is added and not taken away. {way_out}"
            )

    def _new_heads(self) -> list[TensorPlan]:
        """Whole tensors of adapters that the base lacks: kept if only one adapter brings them."""
        found: dict[str, list[TensorHeader]] = {}
        for source in self.sources:
            for name, header in extra_saved(source, self.known).items():
                found.setdefault(name, []).append(header)
        kept = {name: headers[0] for name, headers in found.items() if len(headers) == 1}
        if len(kept) < len(found):
            both = sorted(set(found) - set(kept))
            if self.recipe.subspace.on_missing == "error":
                raise InputError(
                    f"several adapters bring whole tensors that the base lacks ({shortened(both)}): each task has its own "
                    f"head. Write `subspace: {{on_missing: base}}` to leave them out of the result."
                )
            self.notes.append(f"{shortened(both)}: brought by several adapters and not by the base, left out.")
        if kept and self.recipe.subspace.output == "model":
            self.notes.append(
                f"{shortened(sorted(kept))}: brought by an adapter; the base's config.json describes a model without. Load the "
                f"result with the class of the head and its number of classes, such as "
                f"AutoModelForSequenceClassification.from_pretrained(OUT, num_labels={_rows(kept)})."
            )
        return [TensorPlan(name, h.shape, h.dtype, Given(h), (), "copy") for name, h in kept.items()]

    def _parted(self, given: list[dict[str, Given]]) -> set[str]:
        """Names that the base's file leaves out as they are tied, and that the result must have: all, if any two part ways.

        An adapter on an embedding changes what goes in, not the output head that is tied to it, as in the model that it was
        trained in; so does one on the head, and a module that was trained whole.
        """
        parted = sorted({stored for alias, stored in self.aliases.items() if not self._stay_tied(alias, stored, given)})
        if not parted:
            return set()
        self.untied = True
        self.notes.append(
            f"{shortened(parted)}: tied in the base, and an adapter changes one side alone. The result has all of them "
            f"(tie_word_embeddings: false)."
        )
        return set(self.aliases)

    def _stay_tied(self, alias: str, stored: str, given: list[dict[str, Given]]) -> bool:
        for found in (self.found, self.masks_found):
            if found is not None and not found.is_shared(alias, stored):
                return False
        return self.found is not None or all(
            self._are_alike(source, alias, stored, one.get(alias, Given()), one.get(stored, Given()))
            for source, one in zip(self.sources, given, strict=True)
        )

    def _are_alike(self, source: Source, alias: str, stored: str, first: Given, second: Given) -> bool:
        if first == second:
            return True
        whole = source.full
        if whole is None or first.deltas != second.deltas or first.values is None or second.values is None:
            return False
        self.equal.append(  # a model that stores both must have the same values in them
            Equal(
                first.values,
                second.values,
                f"{whole.name}: its {alias!r} is not its {stored!r}, while the base has one matrix for both. Untie the base: "
                f"save it with tie_word_embeddings=False.",
            )
        )
        return True

    def _compare_bases(self) -> None:
        """A note where a model says that it was made from another base; names of folders differ for good reasons."""
        if self.base is None:
            return
        for source in self.sources:
            for part in source.checkpoints:
                ours = self.base.reference.model
                if declared := made_for_another(part, ours):
                    self.notes.append(f"{part.name}: says that it was made for {declared!r}; it is merged onto {ours!r}.")


def _may_part_ties(source: Source, stored: Mapping[str, TensorHeader]) -> bool:
    """Whether a class has to be asked for its ties: for adapters, and models with other names than the base."""
    full = source.full
    return full is None or len(source.checkpoints) > 1 or full.tensors.keys() != stored.keys()


def _rows(head: Mapping[str, TensorHeader]) -> int:
    """The number of classes of a head: the rows of its last tensor."""
    return next((header.shape[0] for header in reversed(list(head.values())) if header.shape), 0)


def _place(header: TensorHeader) -> tuple[str, int]:
    return str(header.path), header.offset
