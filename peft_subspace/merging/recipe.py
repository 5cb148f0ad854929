"""A recipe: mergekit's YAML for the supported methods, with our additions under the one key `subspace`. Needs no torch."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..task_vectors.errors import RecipeError
from ..task_vectors.headers import FLOAT_DTYPES
from ..task_vectors.references import Reference
from .learn_options import LearnOptions, TaskOptions, check_learning
from .methods import registry
from .strict import Strict

HELPER = "x-"  # begins a key at the top that holds anchors for the rest, as in Docker's compose files
MAX_RECIPE = 2**20  # bytes; a recipe is a page of text
_UNSUPPORTED = {
    "slices": "layers cannot be stacked anew: list whole models under `models`",
    "modules": "a model is merged as a whole, by the names of its tensors: list whole models under `models`",
    "tokenizer": "tokens cannot be given embeddings one by one: use `tokenizer_source: base` or the name of a model",
}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _scalar(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


Scalar = Annotated[bool | int | float | str, BeforeValidator(_scalar)]
ModelName = Annotated[Reference, BeforeValidator(Reference.parse)]


def as_bytes(value: Any) -> Any:
    """`5GB`, `500 MB`, `2GiB` or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", value, re.IGNORECASE)
        if match is None:
            raise ValueError(f"{value!r} is not a size such as 5GB or 500MiB")
        return int(float(match[1]) * _BYTES[(match[2] or "").upper()])
    return value


class Condition(Strict):
    """A value for the tensors whose name contains `filter`; for all of them if there is none."""

    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Scalar | list[Scalar] | Condition | list[Condition]


class ModelEntry(Strict):
    """One model, and its parameters."""

    model: ModelName
    parameters: dict[str, Setting] = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class AdapterOutput(Strict):
    """How a merged adapter is made.

    Attributes:
        method: "cat" stacks the factors, "exact" truncates their sum by QR and SVD, "dense" merges each weight with
            `merge_method` and truncates the result by SVD, "knots" merges in the space of the stacked factors.
        rank: of the result; None keeps all of "cat", "exact" and "knots", and the largest rank of the inputs otherwise.
        energy: keep this share of the squared norm instead, in (0, 1]; `rank` is then an upper bound.
    """

    method: Literal["cat", "exact", "dense", "knots"] | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None


class SubspaceOptions(Strict):
    """What mergekit's recipes do not have.

    Attributes:
        semantics: whose definition to follow where tools differ.
        seed: of the random methods; every tensor draws for itself.
        output: a whole model, an adapter that plain PEFT loads, or a task-vector file.
        adapter: how the adapter is made.
        on_missing: a tensor that not all models have: "error"; "base" takes the base's where a model lacks it and leaves
            out what the base lacks; "skip" leaves both out.
        embeddings: vocabularies of other sizes: "error", "truncate" longer ones to the base's, "pad_from_base".
        non_finite: NaN or Inf in a model: "error" or "allow".
        base_check: a model that is no fine-tuned version of the base: "warn", "error" or "off".
        compute_dtype: of the sums; the result is rounded once, at the end.
        shard_size: most bytes of one file of the result.
        align: permute the neurons of each model to fit the first before merging.
        learned: the saved adapter that a learned method merges by, a folder or a Hub id. It names the base and the models,
            which may be left out; where they are listed, they are checked by their hashes.
        mask: a saved Concrete adapter whose mask is applied to every difference before it is merged, a folder or a Hub id.
        learn: learn what the method merges by first, from data.
    """

    semantics: Literal["mergekit", "peft", "paper"] = "mergekit"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: Literal["model", "adapter", "task_vector"] = "model"
    adapter: AdapterOutput = Field(default_factory=AdapterOutput)
    on_missing: Literal["error", "base", "skip"] = "error"
    embeddings: Literal["error", "truncate", "pad_from_base"] = "error"
    non_finite: Literal["error", "allow"] = "error"
    base_check: Literal["warn", "error", "off"] = "warn"
    compute_dtype: Literal["float32", "float64"] = "float32"
    shard_size: Annotated[int, BeforeValidator(as_bytes), Field(ge=1)] = 5 * 10**9
    align: Literal["weight_matching"] | None = None
    learned: ModelName | None = None
    mask: ModelName | None = None
    learn: LearnOptions | None = None


class Recipe(Strict):
    """A whole recipe; field names are mergekit's."""

    merge_method: str
    models: list[ModelEntry] = Field(default_factory=list, validate_default=True)
    base_model: ModelName | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    subspace: SubspaceOptions = Field(default_factory=SubspaceOptions)

    _empty = field_validator("parameters", mode="before")(lambda value: {} if value is None else value)

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        registry.get(value)
        return value

    @field_validator("models")
    @classmethod
    def _models_are_there(cls, value: list[ModelEntry], info: ValidationInfo) -> list[ModelEntry]:
        name = info.data.get("merge_method")
        if not value and not (name is not None and registry.get(name).learned):
            raise ValueError("the models to merge are missing: a list of `- model: NAME`")
        return value

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in FLOAT_DTYPES:
            raise ValueError(f"{value!r} is not a dtype to merge in. Accepted: {', '.join(FLOAT_DTYPES)}")
        return value

    @model_validator(mode="after")
    def _base_is_there(self) -> Recipe:
        method = registry.get(self.merge_method)
        learned, learn = self.subspace.learned, self.subspace.learn
        if bool(method.learned) != (learned is not None or learn is not None):
            raise ValueError(
                f"merge_method {self.merge_method!r} merges by what was learned: write `subspace: {{learned: ADAPTER}}`, or "
                f"`learn` with the data to learn it from"
                if method.learned
                else f"subspace.{'learn' if learned is None else 'learned'} goes with methods that are learned, not with "
                f"merge_method {self.merge_method!r}"
            )
        self._check_mask(method)
        if learned is not None and learn is not None:
            raise ValueError(
                "subspace.learned merges by what was learned, and subspace.learn learns it anew: leave one of them"
            )
        if learn is not None:
            check_learning(learn, self.merge_method, self.base_model, [entry.model for entry in self.merged_models])
        if method.learned:
            if self.subspace.align is not None:
                raise ValueError("subspace.align changes the models, and what was learned belongs to them as they are")
            return self  # base and models are the adapter's, if they are not listed
        if method.statistics and self.subspace.align is not None:
            raise ValueError("subspace.align changes the order of neurons, and statistics belong to the models as they are")
        if method.needs_base and self.base_model is None:
            raise ValueError(f"merge_method {self.merge_method!r} needs a base_model")
        others = len(self.merged_models)
        most = math.inf if method.maximum is None else method.maximum
        if not max(1, method.minimum) <= others <= most:
            accepted = (
                f"{method.minimum} or more models" if method.minimum != most else f"{method.minimum} model{'s' * (most > 1)}"
            )
            alone = " (the base itself does not count)" if others < len(self.models) else ""
            raise ValueError(
                f"merge_method {self.merge_method!r} takes {accepted} beside the base, and there are {others}{alone}"
            )
        return self

    def _check_mask(self, method: registry.Method) -> None:
        if self.subspace.mask is None:
            return
        if method.name == "concrete":
            raise ValueError("subspace.mask goes with other methods: merge_method 'concrete' has the mask of subspace.learned")
        if method.acts_on != "delta" or (self.base_model is None and not method.learned):
            raise ValueError(
                f"subspace.mask is for differences from a base_model, and merge_method {method.name!r} averages "
                f"{'whole weights' if method.acts_on != 'delta' else 'models without a base'}. Use task_arithmetic, ties, or "
                f"another method with a base"
            )
        if self.subspace.align is not None:
            raise ValueError("subspace.align changes the models, and a mask belongs to them as they are")
        if self.subspace.learn is not None:
            raise ValueError(
                "subspace.learn learns with the models as they are: write masked ones with save_masked_vectors, and list those"
            )

    @property
    def method(self) -> registry.Method:
        """The merge method."""
        return registry.get(self.merge_method)

    @property
    def merged_models(self) -> list[ModelEntry]:
        """The models that are merged: all, or, for a method with a base, all but the base itself."""
        if self.method.base == "ignored":
            return self.models
        return [entry for entry in self.models if entry.model != self.base_model]

    def to_yaml(self) -> str:
        """The recipe as it would be written, without defaults."""
        table = self.model_dump(exclude_defaults=True)
        for entry, source in zip(table.get("models", []), self.models, strict=True):
            entry["model"] = str(source.model)
        if self.base_model is not None:
            table["base_model"] = str(self.base_model)
        if self.subspace.learned is not None:
            table["subspace"]["learned"] = str(self.subspace.learned)
        if self.subspace.mask is not None:
            table["subspace"]["mask"] = str(self.subspace.mask)
        if self.subspace.learn is not None:
            table["subspace"]["learn"] = self.subspace.learn.table()
        return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML where a key that stands twice is an error, and 1e-3 is a number (as in YAML 1.2)."""

    def get_single_data(self) -> Any:
        """The document; its keys are looked at before merge keys (`<<`) put those of other tables beside them."""
        node = self.get_single_node()
        if node is None:
            return None
        _check_keys(node, set())
        return self.construct_document(node)


_MERGE = "tag:yaml.org,2002:merge"
_KEY_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "merge", "value", "timestamp")}


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if (key.tag, key.value) in keys and key.tag != _MERGE:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            keys.add((key.tag, key.value))
            _check_keys(value, seen)


_NUMBER = r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^{_NUMBER}$"), list("-+0123456789"))


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it cannot be read, is not YAML, or says something that is not accepted. Names the key, the value, what
            is accepted and the nearest name.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error.strerror or error}.") from error
    if len(raw) > MAX_RECIPE:
        raise RecipeError(f"{path}: has {len(raw):,} bytes; a recipe has at most {MAX_RECIPE:,}.")
    return parse_recipe(raw, str(path))


def parse_recipe(text: str | bytes, name: str = "the recipe") -> Recipe:
    """Read a recipe from a text; see `load_recipe`."""
    try:
        table = yaml.load(text, Loader=_Loader)
    except yaml.composer.ComposerError as error:
        if "but found another document" not in str(error):
            raise RecipeError(f"{name}: is not YAML: {' '.join(str(error).split())}") from error
        raise RecipeError(f"{name}: has several recipes, with --- between them. Put each into a file of its own.") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        raise RecipeError(f"{name}: is not YAML: {' '.join(str(error).split())}") from error
    return make_recipe(table, name)


def make_recipe(table: Any, name: str = "the recipe") -> Recipe:
    """Check a recipe that is a dictionary already."""
    if isinstance(table, Recipe):
        return table
    if not isinstance(table, dict):
        raise RecipeError(f"{name}: a table with merge_method and models is expected, not {type(table).__name__}.")
    table = {key: value for key, value in table.items() if not (isinstance(key, str) and key.startswith(HELPER))}
    for key, why in _UNSUPPORTED.items():
        if table.get(key) is not None:
            raise RecipeError(f"{name}: `{key}` is not supported: {why}.")
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{name}:\n  " + "\n  ".join(_messages(error))) from error
    except RecursionError as error:
        raise RecipeError(f"{name}: is nested too deeply.") from error


def with_shard_size(recipe: Recipe, size: str) -> Recipe:
    """The recipe with another most size of a file, such as "5GB"."""
    try:
        count = as_bytes(size)
    except ValueError as error:
        raise RecipeError(f"--shard-size: {error}.") from error
    if count < 1:
        raise RecipeError(f"--shard-size: {size!r} is not a size above 0.")
    return recipe.model_copy(update={"subspace": recipe.subspace.model_copy(update={"shard_size": count})})


def _messages(error: ValidationError) -> Iterator[str]:
    """Pydantic's findings in our words; of a union (a setting) only the first alternative's."""
    seen = set()
    for item in error.errors():
        location = [str(part) for part in item["loc"] if not _is_alternative(part)]
        where = ".".join(location) or "the recipe"
        if where in seen:
            continue
        seen.add(where)
        if item["type"] in ("model_type", "dict_type"):
            yield f"{where}: expected a table{_AS_TABLE.get(location[0], '')}, not {item['input']!r}"
        elif item["type"] == "extra_forbidden":
            yield f"unknown key {where!r}{_nearest(location)}"
        elif item["type"] == "missing":
            yield f"{where!r} is missing"
        else:
            message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
            given = "" if "input" not in item or isinstance(item["input"], (dict, list)) else f" (given: {item['input']!r})"
            yield f"{where}: {message}{'' if repr(item.get('input')) in message else given}"


_AS_TABLE = {"models": ", as in `- model: NAME`", "parameters": ", as in `weight: 0.5`", "subspace": ", as in `seed: 1`"}


def _is_alternative(part: Any) -> bool:
    """Whether a part of a location is the name that pydantic gives to an alternative, not a key."""
    return isinstance(part, str) and (part in ("bool", "int", "float", "str", "Condition") or "[" in part)


def _nearest(location: list[str]) -> str:
    model: Any = Recipe
    parts = {"models": ModelEntry, "subspace": SubspaceOptions, "adapter": AdapterOutput, "learn": LearnOptions}
    for part in location[:-1]:
        model = {**parts, "tasks": TaskOptions}.get(part, model)
    known = list(model.model_fields)
    if location[-1] not in known and model is Recipe and location[-1] in SubspaceOptions.model_fields:
        return "; it belongs under `subspace`"
    near = difflib.get_close_matches(location[-1], known, n=1)
    helper = f"; a table for anchors may stand under a key that begins with {HELPER}" if model is Recipe else ""
    return f"; did you mean {near[0]!r}?" if near else f". Accepted: {', '.join(known)}{helper}"
