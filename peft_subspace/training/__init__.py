"""Losses as pure functions, and the thin glue that trains with them."""

from ..base.teacher import as_teacher
from .batch_objectives import Entropy, InformationMaximization, Moment, Negation, Ufm
from .coefficients import CoefficientTrainer
from .distillation import feature_distillation, find_blocks, recorded_features
from .healing import Healing, HealingTrainer
from .merge_trainer import Look, MergeArguments, MergeTrainer
from .objectives import entropy_loss, information_maximization_loss
from .perturbation import max_perturbation, perturbation_penalty
from .statistics import estimate_statistics
from .tasks import Task, pooled_logits, token_logits

__all__ = [
    "CoefficientTrainer",
    "Entropy",
    "Healing",
    "HealingTrainer",
    "InformationMaximization",
    "Look",
    "MergeArguments",
    "MergeTrainer",
    "Moment",
    "Negation",
    "Task",
    "Ufm",
    "as_teacher",
    "entropy_loss",
    "estimate_statistics",
    "feature_distillation",
    "find_blocks",
    "information_maximization_loss",
    "max_perturbation",
    "perturbation_penalty",
    "pooled_logits",
    "recorded_features",
    "token_logits",
]
