"""Losses as pure functions, and the thin glue that trains with them."""

from ..base.teacher import as_teacher
from .distillation import feature_distillation, find_blocks, recorded_features
from .healing import Healing, HealingTrainer
from .perturbation import max_perturbation, perturbation_penalty

__all__ = [
    "Healing",
    "HealingTrainer",
    "as_teacher",
    "feature_distillation",
    "find_blocks",
    "max_perturbation",
    "perturbation_penalty",
    "recorded_features",
]
