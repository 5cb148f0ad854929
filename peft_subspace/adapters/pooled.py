"""What methods that compose weights of a pool of task vectors have in common: config fields, and the tuner's preparation."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Geometry, SubspaceConfig, SubspaceModel
from ..base.files import find_file
from ..base.sharding import refuse_sharded_targets
from ..base.targets import base_parameters
from ..functional.choices import BLOCK_TYPES, POOLED
from ..task_vectors import bundles
from ..task_vectors.pool import reference_text
from ..task_vectors.references import HUB_ID, Reference
from ..task_vectors.sources import FORMAT_KEY, TASK_VECTOR, shortened
from ..task_vectors.writing import entries_of, write_file
from .blocks import OpenedPool, block_name, chosen_blocks, default_targets, open_blocks


def is_texts(value: Any) -> bool:
    """Whether a value of a config is a list of texts."""
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)


def is_integer(value: Any) -> bool:
    """Whether a value of a config is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value of a config is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class PooledConfig(SubspaceConfig):
    """Fields of a config with a pool of task vectors.

    Args:
        pool: name -> task vector: a fine-tuned model, an adapter, or a task-vector file, as a folder, a file or a Hub id
            (`model@revision`), or `{"path": ..., "revision": ..., "base": ...}`.
        base: the base of whole models in the pool, if it is not the model's own `name_or_path`.
        exclude_pool: names to leave out.
        target_modules: as everywhere; None takes every parameter that the pool changes.
        block_types: kinds of parameters that are composed: "linear", "conv", "embedding", "norm", "bias", "other".
        vector_dtype: in which dense vectors are kept: "float32" (exact), "bfloat16", or "float16" with a scale for each tensor.
        placement: "device" keeps dense vectors where the weights are, "cpu" in the host's memory, "disk" in their files.
        max_vector_bytes: refuse a pool that takes more memory.
        bundle_vectors: write the vectors beside the coefficients on saving, as `vectors/NAME.safetensors`: what is loaded from
            there needs no other place. May be set before the last saving alone.
        strict: refuse vectors with tensors that fit no parameter of the model or cannot be composed, and differences from
            another base than the model.
        provenance: filled in: hashes of the vectors and samples of the base; a file's are checked on loading.
    """

    patterns: ClassVar[dict[str, str]] = {}
    # PEFT saves an embedding whole where it is adapted, except by methods that train single tokens: of those, none.
    trainable_token_indices: ClassVar[dict[str, Any]] = {}
    opened: ClassVar[OpenedPool | None] = None  # of an instance, once it was put on a model
    block: ClassVar[str] = ""  # of the config of one weight: its name
    bundled: ClassVar[dict[str, str]] = {}  # of a config that was read from a file: name -> the vector beside it

    pool: dict[str, Any] = field(default_factory=dict, metadata={"help": "Name -> task vector."})
    base: str | None = field(default=None, metadata={"help": "The base of whole models in the pool."})
    exclude_pool: list[str] = field(default_factory=list, metadata={"help": "Vectors to leave out."})
    block_types: list[str] = field(default_factory=lambda: list(BLOCK_TYPES), metadata={"help": "Kinds of parameters."})
    vector_dtype: Literal["float32", "float16", "bfloat16"] = field(default="float32", metadata={"help": "Of dense vectors."})
    placement: Literal["device", "cpu", "disk"] = field(default="device", metadata={"help": "Where dense vectors are."})
    max_vector_bytes: int | None = field(default=None, metadata={"help": "Most memory that the pool may take."})
    bundle_vectors: bool = field(default=False, metadata={"help": "Save the vectors with the coefficients."})
    strict: bool = field(default=True, metadata={"help": "Refuse vectors that do not fit whole."})
    provenance: dict[str, Any] | None = field(default=None, metadata={"help": "Filled in: hashes of vectors and base."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout or self.rank_pattern:
            raise ValueError(
                f"dropout={self.dropout!r}, rank_pattern={self.rank_pattern!r}: composed weights have neither. Leave them out."
            )
        self.check_choices(POOLED)
        self.check_kind("pool", isinstance(self.pool, dict) and is_texts([*self.pool]), "a table {name: place}")
        self.check_kind("exclude_pool", is_texts(self.exclude_pool), "a list of names")
        self.check_kind("block_types", is_texts(self.block_types), "a list of kinds")
        self.check_kind(
            "max_vector_bytes", self.max_vector_bytes is None or is_integer(self.max_vector_bytes), "a number of bytes"
        )
        for name in ("bundle_vectors", "strict"):
            self.check_kind(name, isinstance(getattr(self, name), bool), "True or False")
        self.pool = {name: os.fspath(s) if isinstance(s, os.PathLike) else s for name, s in self.pool.items()}
        unknown = [kind for kind in self.block_types if kind not in BLOCK_TYPES]
        if unknown or not self.block_types:
            raise ValueError(f"block_types={self.block_types!r}: accepted are {', '.join(map(repr, BLOCK_TYPES))}.")
        self.check_in_pool("exclude_pool", self.exclude_pool)

    def check_kind(self, name: str, fits: bool, expected: str) -> None:
        """Raise ValueError unless the value of a field fits."""
        if not fits:
            raise ValueError(f"{name}={getattr(self, name)!r}: {expected} is expected.")

    def check_choices(self, choices: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise ValueError if a field has none of the values that a table says."""
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known. Accepted: {', '.join(map(repr, accepted))}.")

    def check_in_pool(self, field: str, names: Any) -> None:
        """Raise ValueError for names of vectors that the pool does not have."""
        unknown = sorted(set(names) - set(self.pool))
        if unknown:
            raise ValueError(f"{field}: {unknown} are not in the pool, which has {sorted(self.pool)}.")

    @property
    def vector_names(self) -> list[str]:
        """Names of the vectors in the order of the coefficients: the pool's, or that of the file."""
        if self.is_from_file and self.provenance is not None:  # a file's JSON keeps the order of a list, not of a table
            return [record["name"] for record in self.provenance["vectors"]]
        return [name for name in self.pool if name not in self.exclude_pool]

    @property
    def summary(self) -> tuple[str, str]:
        """What a model card says in place of the ranks."""
        names = ", ".join(f"{name} (`{reference_text(self.pool[name])}`)" for name in self.vector_names)
        records = (self.provenance or {}).get("vectors") or []
        bundled = bool(records) and all(bundles.file_of(record) for record in records)
        return "Task vectors", f"{names}; bundled in `{bundles.FOLDER}/`" if bundled else names

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read `adapter_config.json`, and find the vectors that were bundled; see `SubspaceConfig`."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download = cls._split_kwargs(kwargs)[0]
        found = {}
        for record in (getattr(config, "provenance", None) or {}).get("vectors") or []:
            file = bundles.file_of(record)
            path = file and find_file(os.fspath(pretrained_model_name_or_path), file, subfolder, download)
            if path:
                found[record["name"]] = path
        config.bundled = found  # its own, not a field
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the vectors if they are bundled, then `adapter_config.json`; what is not bundled here is not said to be."""
        if self.bundle_vectors and self.opened is not None and self.provenance is not None:
            opened = self.opened
            for entry, record in zip(opened.pool.entries, self.provenance["vectors"], strict=True):
                used = {entry.names[name] for name in map(opened.source_of, opened.blocks) if name in entry.names}
                bundles.write_bundle(save_directory, record, entry.vector, used)
        kept = self.provenance
        if kept is not None:
            self.provenance = {**kept, "vectors": self._records_of(save_directory, kept["vectors"])}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.provenance = kept  # what was loaded from a bundle is still read from there

    def _records_of(self, folder: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As they are saved in a folder; warns of vectors that were read from a bundle and then have no place."""
        found, gone = [], []
        for record in records:
            file, name = bundles.file_of(record), record["name"]
            if file is not None and not (self.bundle_vectors and os.path.isfile(os.path.join(folder, file))):
                if name in self.bundled and not _may_be_there(self.pool.get(name, record["reference"])):
                    gone.append(name)
                record = bundles.without_bundle(record)
            found.append(record)
        if gone:
            warnings.warn(
                f"The task vectors {shortened(gone)} were read from {os.path.dirname(self.bundled[gone[0]])} and are not saved "
                f"with the adapter in {folder}, and they are not at the places that config.pool has any more: the adapter "
                f"cannot be loaded from there. Set bundle_vectors=True, or their places in config.pool.",
                stacklevel=4,
            )
        return found

    def for_layer(self, key: str, weight: str = "weight") -> Any:
        """This config, with the name of the block."""
        resolved = super().for_layer(key, weight)
        resolved.block = block_name(key, weight)
        return resolved


def _may_be_there(source: Any) -> bool:
    """Whether the place of a vector is there, or on the Hub, where nobody looks now."""
    given = {key: value for key, value in source.items() if key != "base"} if isinstance(source, dict) else source
    place = Reference.parse(given)
    return all(os.path.exists(os.path.expanduser(name)) or HUB_ID.fullmatch(name) for name in (place.model, place.lora) if name)


class PooledModel(SubspaceModel):
    """A tuner that opens the pool of its config, and takes what the pool changes for the targets."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        everything = {name: [own] for name, _, own, _ in base_parameters(model)}  # the pool is compared with all of it
        refuse_sharded_targets(model, everything, peft_config.title)
        peft_config.opened = open_blocks(peft_config, model)
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules, peft_config.target_parameters = default_targets(peft_config.opened, model, peft_config)
        super()._prepare_model(peft_config, model)

    def _prepare_targets(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        chosen_blocks(config, model, targets)

    def deltas(self, adapter_name: str) -> Iterator[Any]:
        """Every Delta of an adapter."""
        self.config_of(adapter_name)
        for _, layer in self.named_subspace_layers():
            yield from layer.deltas(adapter_name).values()

    def _record_decisions(self, adapter_name: str) -> None:
        """Note which tensors of the file belong to which parameter: a merge without the model needs it.

        A Delta says so by `file_entry(places)`, with the name in the file of the tensors of every Delta.
        """
        super()._record_decisions(adapter_name)
        places = {
            module: name.removesuffix(f".{adapter_name}")
            for name, module in self.model.named_modules()
            if isinstance(module, self.delta_cls)
        }
        blocks: dict[str, dict[str, Any]] = {}
        for delta in self.deltas(adapter_name):
            tied = {} if delta.block == delta.parameter_name else {"tied": delta.block}
            blocks[delta.parameter_name] = {**delta.file_entry(places), **tied}
        provenance = self.peft_config[adapter_name].provenance
        assert provenance is not None  # since `_prepare_model`
        provenance["blocks"] = blocks

    @torch.no_grad()
    def save_task_vector(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Write what an adapter adds to the base as a task-vector file, for merge recipes, `inspect` and other pools.

        Args:
            path: ends in `.safetensors`; it appears when it is whole.
            adapter_name: the adapter, None for the active one.
        """
        adapter_name = self.chosen_adapter(adapter_name)
        config, tensors = self.config_of(adapter_name), {}
        for _, layer in self.named_subspace_layers():
            for container, delta in layer.deltas(adapter_name).items():
                dense = delta.geometry.native(layer.dense_update(container, adapter_name))
                tensors[delta.block] = dense.float()
        save_task_vector_file(path, tensors, config)


def add_directions(geometry: Geometry, x: Tensor, out: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """out + B (scale * (A x)) for stacked factors `[rows, R]` and `[R, columns]`, in the dtype of `out`, and a scale `[R]`."""
    down, up = (left, right.t()) if geometry.swapped else (right.t(), left)
    inner = geometry.down(x, down)
    scaled = (inner.to(scale.dtype) * scale).to(out.dtype)
    if geometry.padding_idx is not None:  # a row of padding gets no gradient, as in the embedding itself
        scaled = torch.where((x == geometry.padding_idx).unsqueeze(-1), scaled.detach(), scaled)
    return geometry.up(scaled, up, out)


def save_task_vector_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], config: Any) -> None:
    """Write a task-vector file of the base that a config names; see `write_file`."""
    base = str(config.base_model_name_or_path or "")
    metadata = {"format": "pt", FORMAT_KEY: TASK_VECTOR, "base": base, "version": "1"}
    write_file(path, entries_of(tensors), metadata, tensors.values())
