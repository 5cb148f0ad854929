"""What fields of configs and recipes may say. Needs no torch: a dry run and a plan check by it."""

from __future__ import annotations

from typing import Any, Literal, get_args

Constraint = Literal["nonnegative", "softmax"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
MAX_PARTS = 256  # a part's number is kept in one byte

# Field of every config with a pool -> what it may be; then of each method.
POOLED: dict[str, tuple[Any, ...]] = {
    "vector_dtype": ("float32", "float16", "bfloat16"),
    "placement": ("device", "cpu", "disk"),
}
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "atlas": {
        **POOLED,
        "granularity": ("task", "block", "row", "column", "partition"),
        "constraint": (None, *CONSTRAINTS),
    },
    "concrete": {
        **POOLED,
        "granularity": ("element", "row", "column", "rank"),
        "learn_coefficients": (None, "task", "layer"),
        "eval_mask": ("mean", "sample", "hard"),
        "save_mask": ("float32", "bfloat16", "hard"),
    },
}
BLOCK_TYPES = ("linear", "conv", "embedding", "norm", "bias", "other")
