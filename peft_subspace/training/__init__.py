"""Losses as pure functions, and the thin glue that trains with them."""

from ..base.teacher import as_teacher
from .batch_objectives import Entropy, Moment, Negation, Ufm
from .coefficients import CoefficientTrainer
from .distillation import feature_distillation, find_blocks, recorded_features
from .healing import Healing, HealingTrainer
from .perturbation import max_perturbation, perturbation_penalty

__all__ = [
    "CoefficientTrainer",
    "Entropy",
    "Healing",
    "HealingTrainer",
    "Moment",
    "Negation",
    "Ufm",
    "as_teacher",
    "feature_distillation",
    "find_blocks",
    "max_perturbation",
    "perturbation_penalty",
    "recorded_features",
]
