"""The fields that every method's config shares, and the checks that do not need a model."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version
from peft import PeftConfig
from peft.utils.peft_types import PeftType

from .. import _version
from ..whole_files import write_whole
from .files import check_adapter_file, find_adapter_file

TARGET_SHORTHANDS = ("all-linear", "all-conv")
# What else happens when an adapter was written to a folder. `hub` adds the model card; this layer need not know of it.
AFTER_SAVE: list[Callable[[str, SubspaceConfig], None]] = []


@dataclass
class SubspaceConfig(PeftConfig):
    """Fields shared by all methods of peft_subspace. Names and meaning follow PEFT's.

    Args:
        target_modules: names of the layers to adapt, as a list of names or name endings, one regular expression, or
            "all-linear" / "all-conv" (alone or in a list). None takes PEFT's default for the architecture, else all linear
            layers (all convolutions in a conv net), without the output head. Every name must match a layer.
        exclude_modules: names, or a regular expression, that are left out.
        target_parameters: names of bare parameters to adapt, such as the fused expert stacks of MoE models
            ("experts.down_proj"). Every name must match.
        modules_to_save: modules that are trained whole and saved with the adapter, such as a new head.
        layers_to_transform: adapt only these layer indices.
        layers_pattern: name of the list that holds the layers, if `layers_to_transform` cannot find it.
        dropout: probability of dropping an element of the update's input during training, in [0, 1).
        init_weights: True starts at the base model's output; False starts with a random update (for tests).
        rank_pattern: layer name or regular expression -> the rank that replaces `r` there.
        adapt_batch_norm: keep the running statistics that BatchNorm layers gather in training with the adapter. The base's
            own statistics come back when the adapter is disabled or unloaded. PEFT loses the first and spoils the second.
        metrics: measured figures to show on the model card, such as {"accuracy": 0.93}.
        lowered_ranks: filled in when the adapter is made: layers that are smaller than `r` -> the rank that they have.
        peft_subspace_version: filled in on saving.
    """

    method: ClassVar[str]
    paper: ClassVar[str]
    title: ClassVar[str]
    # Rate of Adam to start with, for what the adapter trains (a trained head may want another). Trainer's own, 5e-5, is made
    # for whole models and leaves most adapters where they began. The method's page in docs/ says where the figure comes from.
    recommended_learning_rate: ClassVar[float]
    # {pattern field: the field that it overrides for one layer}
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}
    # Set on a config that was read from a file until the weights beside it are loaded: if they do not fit, the adapter
    # is taken off again. Holds the shapes in the weights' file by key, none if there is no such file.
    awaits_weights: ClassVar[dict[str, tuple[int, ...]] | None] = None

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Bare parameters to adapt."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole and to save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update, in [0, 1)."})
    init_weights: bool = field(default=True, metadata={"help": "True starts at the base model's output."})
    rank_pattern: dict[str, Any] = field(default_factory=dict, metadata={"help": "Layer name or regex -> r."})
    adapt_batch_norm: bool = field(default=True, metadata={"help": "Keep BatchNorm statistics with the adapter."})
    metrics: dict[str, float] | None = field(default=None, metadata={"help": "Measured figures for the model card."})
    lowered_ranks: dict[str, Any] = field(default_factory=dict, metadata={"help": "Filled in: smaller layer -> its rank."})
    peft_subspace_version: str | None = field(default=None, metadata={"help": "Filled in on saving."})

    def __new__(cls, *args: Any, **kwargs: Any) -> SubspaceConfig:
        """Refuse unknown fields with the nearest names, before the dataclass's own terse message."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            saved_by = kwargs.get("peft_subspace_version")
            if saved_by is not None and _is_newer(saved_by):
                raise ValueError(
                    f"This {cls.__name__} was saved by peft_subspace {saved_by} and has fields that {_version.__version__} "
                    f"does not know: {unknown}. Install peft_subspace>={saved_by} to load it."
                )
            hints = "".join(
                f" Did you mean {near[0]!r} instead of {name!r}?"
                for name in unknown
                if (near := difflib.get_close_matches(name, known, n=1))
            )
            # "got an unexpected keyword argument" is what PEFT looks for when it skips the keys of a later PEFT in a file
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {', '.join(map(repr, unknown))}.{hints} "
                f"Accepted: {', '.join(known)}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs `layers_to_transform` (which layers?) to be specified as well."
            )
        is_expression = isinstance(self.target_modules, str) and self.target_modules not in TARGET_SHORTHANDS
        if is_expression and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` cannot be used when `target_modules` is a str ({self.target_modules!r} is a regular "
                f"expression): put the layer numbers into the expression."
            )
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not a probability: it must be at least 0 and less than 1.")
        self.is_from_file = self.peft_subspace_version is not None  # not a field: the adapter's tensors come from the file too
        if self.peft_subspace_version is None:
            self.peft_subspace_version = _version.__version__
        elif _is_newer(self.peft_subspace_version):
            raise ValueError(
                f"This {type(self).__name__} was saved by peft_subspace {self.peft_subspace_version}, which may mean something "
                f"else by its fields than {_version.__version__} does. Install peft_subspace>={self.peft_subspace_version}."
            )

    @property
    def was_loaded(self) -> bool:
        """Whether it was read from a file whose weights are loaded by now: a further adapter with it has none to wait for."""
        return self.awaits_weights is None and "awaits_weights" in vars(self)

    def is_like(self, other: SubspaceConfig) -> bool:
        """Whether two configs say the same of an adapter, by whatever name its base goes and whether or not it is trained."""
        names = {f.name for f in fields(self)} - {"base_model_name_or_path", "revision", "inference_mode"}
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def summary(self) -> tuple[str, str]:
        """What the model card says about the size of an adapter: a title and a text."""
        r, energy = getattr(self, "r", None), getattr(self, "energy", "-")
        ranks = f"r = {r}" if r is not None else f"energy = {energy}"
        own = f", {len(self.rank_pattern)} layers with their own" if self.rank_pattern else ""
        lower = f", lowered to fit {lowered_text(self.lowered_ranks)}" if self.lowered_ranks else ""
        return "Ranks", ranks + own + lower

    def for_layer(self, key: str, weight: str = "weight") -> Any:
        """This config with the overrides of one weight (`rank_pattern` and its like) filled in.

        `<layer>.<weight>` wins over `<layer>` (MultiheadAttention has several weights), an exact name over an expression
        that matches the end of the name.
        """
        resolved = copy.copy(self)
        for pattern_field, name in self.patterns.items():
            table = getattr(self, pattern_field)
            pattern = next((p for k in (f"{key}.{weight}", key) for p in [find_pattern(table, k)] if p is not None), None)
            if pattern is not None:
                setattr(resolved, name, table[pattern])
        return resolved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read `adapter_config.json`, and check that the weights beside it are whole.

        PEFT wraps the model before it opens the weights. Looking here means that a truncated file is refused, by name,
        while the model is still as it was. From the Hub, the file goes into the cache, where PEFT finds it a moment later.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download = cls._split_kwargs(kwargs)[0]
        path = find_adapter_file(os.fspath(pretrained_model_name_or_path), subfolder, download)
        config.awaits_weights = check_adapter_file(path) if path is not None else {}  # its own, not a field
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, then call `AFTER_SAVE` (PEFT saves the config last: the weights are there)."""
        if self.metrics is not None:  # values of numpy and torch cannot be written
            self.metrics = {name: float(value) for name, value in self.metrics.items()}
        super().save_pretrained(save_directory, **kwargs)
        path = os.path.join(save_directory, "adapter_config.json")
        with open(path) as reader:
            saved = json.load(reader)
        for name, value in saved.items():  # sets have no order: the same adapter must give the same bytes
            if isinstance(getattr(self, name, None), set):
                saved[name] = sorted(value)
        write_whole(path, json.dumps(saved, indent=2, sort_keys=True))
        for callback in AFTER_SAVE:
            callback(save_directory, self)


def lowered_text(ranks: dict[str, Any], most: int = 3) -> str:
    """How many weights have less than the rank that was asked for, and the first of them."""
    some = ", ".join(f"{name}: {rank}" for name, rank in list(ranks.items())[:most])
    return f"{len(ranks)} smaller weight{'' if len(ranks) == 1 else 's'} ({some}{', ...' if len(ranks) > most else ''})"


def find_pattern(table: dict[str, Any], key: str) -> str | None:
    """The entry of a pattern table for a name: the name itself, else the first expression that matches its end."""
    return key if key in table else next((p for p in table if re.match(rf"(.*\.)?({p})$", key)), None)


def _is_newer(saved_by: str) -> bool:
    """Whether a file's version may break this one: a later major version, or a later minor one before 1.0 (semver)."""
    try:
        theirs, ours = Version(saved_by).release, Version(_version.__version__).release
    except InvalidVersion:
        raise ValueError(f"peft_subspace_version={saved_by!r} in the adapter's config is not a version.") from None
    length = 2 if ours[0] == 0 else 1
    return tuple(theirs[:length]) > tuple(ours[:length])
