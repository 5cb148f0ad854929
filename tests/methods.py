"""The methods that the shared tests run over. A new method adds one row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, PelaConfig, SubspaceConfig, SvfitConfig
from tests.pico import Pico
from tests.pools import pool_of


@dataclass(frozen=True)
class Method:
    """One row: two configs of different sizes, and what the shared tests need to know about them."""

    config: type[SubspaceConfig]
    fields: dict[str, Any]  # of the adapter "default"
    other: dict[str, Any]  # of a second adapter, unlike the first
    patterns: dict[str, Any] = field(default_factory=dict)  # a value for every pattern field of the config
    lora_rank: int = 2  # the LoRA of the same rank, which may keep as many bytes for backward
    dropout: bool = True  # whether the update has an input that can be dropped
    composes: bool = False  # effective weights are composed of a pool of task vectors
    vector_rank: int | None = None  # of the matrices in that pool; None for dense ones
    leaves: frozenset[str] = frozenset()  # of tests.pico.LAYERS, those that the method refuses

    starts_at_base: bool = True  # whether a new adapter changes nothing
    sums: bool = True  # whether a weighted sum of adapters is one
    saturates: bool = False  # whether infinite parameters make finite weights
    steady: dict[str, Any] = field(default_factory=dict)  # fields with which training draws no random numbers
    stored: tuple[dict[str, Any], ...] = ()  # fields with which the file, or what is made again on loading, is another one

    @property
    def exports(self) -> bool:
        """Whether every update of a linear layer is an exact LoRA."""
        return not self.replaces_base and (not self.composes or self.vector_rank is not None)

    @property
    def replaces_base(self) -> bool:
        """Whether an adapter stands in for the layer, so that there can be one only."""
        return bool(PEFT_TYPE_TO_TUNER_MAPPING[self.config.method].delta_cls.replaces_base)

    def make(self, pico: Pico, second: bool = False, **fields: Any) -> Any:
        """The config of "default", or of the second adapter, for a pico model and with other fields."""
        pool = {"pool": pool_of(pico, self.vector_rank)} if self.composes else {}
        if not self.dropout:
            fields.pop("dropout", None)
        return self.config(**{**(self.other if second else self.fields), **pool, **fields})


MASKED: dict[str, Any] = {
    "dropout": False,
    "composes": True,
    "starts_at_base": False,
    "sums": False,
    "saturates": True,
    "steady": {"stochastic": False, "learn_coefficients": "layer"},
}

METHODS = {
    "FLORA": Method(FloraConfig, {"r": 2}, {"r": 3, "scale": 0.5}, {"rank_pattern": 3, "scale_pattern": 0.25}),
    "SVFIT": Method(SvfitConfig, {"r": 2}, {"r": 3}, {"rank_pattern": 3}),
    "SVFIT, basis made again on loading": Method(
        SvfitConfig,
        {"r": "full", "save_basis": False},
        {"r": 3, "save_basis": False, "scale": "relative"},
        {"rank_pattern": 3},
        lora_rank=16,
    ),
    "ATLAS": Method(
        AtlasConfig,
        {},
        {"init": 0.1},
        dropout=False,
        composes=True,
        stored=(
            {"granularity": "partition", "partition": 3, "partition_seed": 2},
            {"granularity": "task"},
            {"granularity": "row", "constraint": "softmax"},
            {"tie_blocks": [["q_proj.weight", "o_proj.weight"]]},
        ),
    ),
    "ATLAS, vectors of low rank": Method(AtlasConfig, {}, {"init": 0.1}, dropout=False, composes=True, vector_rank=2),
    "CONCRETE": Method(
        ConcreteConfig,
        {},
        {"coefficients": 0.1, "granularity": "row"},
        stored=(
            {"eval_mask": "sample", "seed": 3},
            {"eval_mask": "hard", "save_mask": "hard"},
            {"save_mask": "bfloat16", "granularity": "column", "learn_coefficients": "task"},
        ),
        **MASKED,
    ),
    "CONCRETE, directions of vectors of low rank": Method(
        ConcreteConfig,
        {"granularity": "rank"},
        {"granularity": "element", "learn_coefficients": "layer"},
        vector_rank=2,
        **MASKED,
    ),
    "PELA": Method(
        PelaConfig,
        {"r": 2},
        {"r": 3},
        {"rank_pattern": 3},
        starts_at_base=False,
        leaves=frozenset(  # their blocks are too small for two factors
            ("conv, depthwise", "conv, depthwise, wider", "conv, pointwise, groups", "transposed, depthwise")
        ),
    ),
}

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
