"""What a merge method is, and where methods are found by name.

Nothing here imports torch: a recipe is read, checked and planned from this table alone, and a kernel's module is imported
when the kernel is first called. The built-in methods are declared in `catalogue.py`; other packages add theirs by an entry
point of the group `peft_subspace.merge_methods`, named like the method, whose value is a `Method`.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["elementwise", "rows", "matrix"]
Semantics = Literal["mergekit", "peft", "paper"]
SEMANTICS: tuple[Semantics, ...] = ("mergekit", "peft", "paper")
GROUP = "peft_subspace.merge_methods"
BLOCK = 4096  # chunks begin at multiples of it: sums and random numbers are taken by blocks, so they do not depend on chunks


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class Parameter:
    """One knob of a method, called as mergekit calls it.

    Args:
        name: Key in a recipe.
        default: Its value where a recipe gives none; its type is the type that is accepted.
        scope: "model" if each model may have its own value (`models[].parameters`), else "global".
        minimum: Least accepted value.
        maximum: Greatest accepted value.
        choices: The accepted values, for a string.
        help: One line.
        demanded: mergekit demands it. A recipe here may leave it out, but a list of filters must have a value for every tensor.
    """

    name: str
    default: Any
    scope: Literal["global", "model"] = "global"
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""
    demanded: bool = False

    def check(self, value: Any) -> Any:
        """Return `value` in the parameter's type, or raise a ValueError that names it and what is accepted."""
        kind = type(self.default)
        number = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if not (kind is float or float(value).is_integer() if number else type(value) is kind):
            raise ValueError(f"{self.name}={value!r}: expected {_WORDS[kind]}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}={value!r}: expected one of {', '.join(self.choices)}")
        low, high = self.minimum, self.maximum
        # written so that NaN fails
        if number and not (float("-inf") if low is None else low) <= value <= (float("inf") if high is None else high):
            bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None)
            raise ValueError(f"{self.name}={value!r}: expected a number{' ' + bounds if bounds else ''}")
        return kind(value) if number else value


@dataclass(frozen=True)
class Inputs:
    """What a kernel sees: one tensor or a part of it, in the dtype of the computation.

    Args:
        base: theta_0, or None for a merge without a base.
        tensors: K tensors: tau_k = theta_k - theta_0 if the method acts on deltas (theta_k if there is no base), else
            theta_k. Flat `[n]` for "elementwise", whole rows `[rows, columns]` for "rows", the whole tensor for "matrix".
        weights: K numbers.
        options: All global parameters, resolved for this tensor.
        per_model: K mappings: all parameters of scope "model".
        name: Of the tensor.
        shape: Of the whole tensor.
        start: Offset of the part in the flat whole tensor, in elements; a multiple of `BLOCK` for "elementwise".
        seed: What random numbers depend on, beside the tensor's name, k and the position in the tensor.
        reduced: What the method's passes over the whole tensor found, by their names.
        semantics: Whose definition to follow where tools differ.
        statistics: K tensors that belong to this one (`Method.statistics`), or None.
        learned: What was learned for this tensor (`Method.learned`), or None.
        own: Whether `tensors` and `base` are copies for this one call, which may be overwritten.
    """

    base: Tensor | None
    tensors: Sequence[Tensor]
    weights: Sequence[float]
    options: Mapping[str, Any]
    per_model: Sequence[Mapping[str, Any]]
    name: str = "weight"
    shape: tuple[int, ...] = ()
    start: int = 0
    seed: int = 0
    reduced: Mapping[str, Any] = field(default_factory=dict)
    semantics: Semantics = "mergekit"
    statistics: Sequence[Tensor] | None = None
    learned: Any = None
    own: bool = False


class Pass(Protocol):
    """One reduction over a whole tensor before the map: a threshold, a norm, dot products.

    Its result must not depend on how the tensor is cut. `begin` may return None: the pass is then not needed, no data is
    read for it, and its result is None.
    """

    name: str

    def begin(self, count: int, inputs: Inputs) -> Any:
        """Return the state before any data.

        `inputs` is the first part, with `reduced` of the earlier passes: take shapes and dtypes from it, not values.
        """

    def update(self, state: Any, inputs: Inputs) -> bool | None:
        """Take in one part; parts come in order, each once. True: the rest of the tensor is not needed."""

    def finish(self, state: Any) -> Any:
        """Return what stands under `name` in `Inputs.reduced`."""


Kernel = Callable[[Inputs], "Tensor"]
Check = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]], Sequence[float], Semantics], None]
Passes = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]], Semantics], Sequence[Pass]]


def _resolve(reference: Any) -> Any:
    """The object behind "module:name"; anything else is itself."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Method:
    """A merge method.

    Args:
        name: As in a recipe's `merge_method`.
        kind: What the kernel needs to see at once; or a function of the global options that says so.
        acts_on: "delta": kernels get tau_k and return the merged delta, which the engine adds to the base (where there is
            a base). "model": they get theta_k and return the merged tensor.
        kernel: The kernel, or "module:name" of it.
        parameters: Its knobs. A method that has weights declares `weight`, of scope "model".
        reductions: Function `(options, per_model, semantics) -> passes`, or "module:name" of it, or None.
        base: Whether `base_model` is required, optional, or not used.
        minimum: Least number of models beside the base.
        maximum: Greatest number of models beside the base.
        statistics: What each model must bring besides itself, in words; empty for nothing. The file is named by the
            model's parameter `statistics` and has tensors of the same names.
        statistics_shape: Shape of a tensor -> that of its statistic, None for a tensor that can have none.
        check: Raises a ValueError if `(options, per_model, weights, semantics)` do not go together; must not import torch.
        reference: Paper or tool, one line.
        aliases: Other names of it.
        fallback: What is done with tensors that the method is not defined on, in words.
        whole_model: Semantics in which the passes go over all tensors of the model together, before any is merged.
        second_axis: Semantics in which a kernel of kind "rows" works along the second of three axes or more. Its rows are
            then whole slices of the first axis, `[slices, rest]`, which `Inputs.shape` tells how to view.
        divides: How a method without the option `normalize` or `normalize_weights` divides by its weights: by their sum, by
            the sum of those that take part in an entry, or not.
        learned: For a method that merges by a saved adapter, "module:function" that reads what it learned for one tensor
            (`merging.learned` has the rules); empty for a method that merges by numbers of the recipe.
    """

    name: str
    kind: Kind | Callable[[Mapping[str, Any]], Kind]
    acts_on: Literal["delta", "model"]
    kernel: Kernel | str
    parameters: tuple[Parameter, ...] = ()
    reductions: Passes | str | None = None
    base: Literal["required", "optional", "ignored"] = "required"
    minimum: int = 1
    maximum: int | None = None
    statistics: str = ""
    statistics_shape: Callable[[tuple[int, ...]], tuple[int, ...] | None] = lambda shape: shape
    check: Check | None = None
    reference: str = ""
    aliases: tuple[str, ...] = ()
    fallback: str = ""
    whole_model: tuple[Semantics, ...] = ()
    second_axis: tuple[Semantics, ...] = ()
    divides: Literal["", "sum", "entry"] = ""
    learned: str = ""

    @property
    def learned_tensor(self) -> Callable[..., Any]:
        """The function behind `learned`; imports its module, which needs no torch for it."""
        return _resolve(self.learned)

    @property
    def merge(self) -> Kernel:
        """The kernel; imports its module."""
        return _resolve(self.kernel)

    @property
    def needs_base(self) -> bool:
        """Whether a merge without a base is an error."""
        return self.base == "required"

    def kind_for(self, options: Mapping[str, Any]) -> Kind:
        """What the kernel needs to see at once, under these global options."""
        return self.kind(options) if callable(self.kind) else self.kind

    def row_length(self, shape: Sequence[int], semantics: Semantics) -> int:
        """Entries of what a kernel of kind "rows" sees as one row."""
        if semantics in self.second_axis and len(shape) > 2:
            return math.prod(shape[1:])
        return shape[-1] if shape else 1

    def passes(
        self, options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics
    ) -> Sequence[Pass]:
        """The reductions over a whole tensor that come before the map, in order; imports the kernel's module."""
        return _resolve(self.reductions)(options, per_model, semantics) if self.reductions else ()

    def parameter(self, name: str) -> Parameter:
        """One knob by name; a ValueError names the nearest ones."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise ValueError(f"merge method {self.name!r} has no parameter {name!r}{_nearest(name, known)}")

    def resolve(self, scope: Literal["global", "model"], given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of one scope: the given values, checked, over the defaults; a ValueError for unknown ones."""
        for name in given:
            if self.parameter(name).scope != scope:
                where = "for all models" if scope == "model" else "for each model"
                raise ValueError(f"parameter {name!r} of merge method {self.name!r} is set {where}")
        parameters = [parameter for parameter in self.parameters if parameter.scope == scope]
        return {p.name: p.check(given[p.name]) if p.name in given else p.default for p in parameters}


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method under its name and aliases; a name that is taken is a ValueError."""
    for name in (method.name, *method.aliases):
        if name in _METHODS and _METHODS[name] is not method:
            raise ValueError(f"merge method {name!r} is already registered (as {_METHODS[name].name!r}); choose another name")
    _METHODS.update(dict.fromkeys((method.name, *method.aliases), method))
    return method


def _points() -> dict[str, EntryPoint]:
    """Entry points of other packages by method name; two of one name, or of a built-in's name, are a ValueError."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        taken = found.get(point.name)
        if taken is not None and taken.value != point.value:
            raise ValueError(f"two packages bring a merge method {point.name!r}: {taken.value} and {point.value}; remove one")
        if point.name in _METHODS and point.name not in _LOADED:
            raise ValueError(f"{point.value} brings a merge method {point.name!r}, which is built in; remove that package")
        found[point.name] = point
    return found


_LOADED: set[str] = set()


def _load(point: EntryPoint) -> Method:
    method = point.load()
    if not isinstance(method, Method):
        raise ValueError(f"entry point {point.value} must be a Method, got {type(method).__name__}")
    if method.name != point.name:
        raise ValueError(f"entry point {point.name!r} ({point.value}) brings a merge method that is called {method.name!r}")
    _LOADED.update((method.name, *method.aliases))
    return register(method)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; there are {', '.join(sorted(known)) or 'none'}"


def get(name: str) -> Method:
    """Return a method by name or alias; a ValueError names the nearest ones."""
    importlib.import_module("peft_subspace.merging.methods.catalogue")
    if name not in _METHODS and name in (points := _points()):
        return _load(points[name])
    if name not in _METHODS:
        raise ValueError(f"unknown merge method {name!r}{_nearest(name, sorted({*_METHODS, *_points()}))}")
    return _METHODS[name]


def names() -> list[str]:
    """Names of all methods, without aliases, sorted; third-party ones are not imported for it."""
    importlib.import_module("peft_subspace.merging.methods.catalogue")
    return sorted({method.name for method in _METHODS.values()} | set(_points()))
