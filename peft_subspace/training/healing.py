"""PELA's intermediate stage: task loss, feature distillation and weight perturbation in one objective, and its Trainer.

    L = w L_task + alpha L_fd + beta MSE(logits) + gamma mean_p penalty(R_p, L_p, W_p)

Source: PELA (arXiv:2310.10700) and its official code, which this mends: the teacher gets no gradient and is in eval mode, both
passes see one input, the student runs once a step, and the penalty is computed in float32 outside autocast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..base import SubspaceLayer
from ..base.teacher import as_teacher
from .distillation import Features, Normalize, feature_distillation, find_blocks, masked_mean, recorded_features
from .perturbation import MODES, Mode, max_perturbation, perturbation_penalty


@dataclass
class Healing:
    """The objective: call it with a model, its inputs and its forward; works with any loop, Trainer and accelerate.

    Args:
        task: w, weight of the model's own loss; 0 for unlabelled data.
        alpha: weight of the feature distillation (1 in the vision recipes of the official code, 0.1 for ALBEF).
        beta: weight of the squared distance of the logits (0 there).
        gamma: weight of the weight-perturbation penalty (0 or 1 there).
        features: endings of the names of the modules whose outputs are distilled; None for all blocks.
        mask_padding: leave padded tokens out of the distances, by the inputs' `attention_mask`.
        normalize: see `feature_distillation`.
        layer_weights: see there.
        mode: of the penalty, see `training.perturbation`.
        eps: of the penalty (0.001 or 0 in the official code).
        relative_eps: eps is a share of each weight's own deviation at the first step: an absolute one has no scale.
        penalty_every: compute the penalty in every n-th step only, n times as heavy.

    Each call leaves the parts of the loss in `parts` (detached).
    """

    task: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    features: Sequence[str] | None = None
    mask_padding: bool = True
    normalize: Normalize | None = None
    layer_weights: Sequence[float] | None = None
    mode: Mode = "official"
    eps: float = 1e-3
    relative_eps: bool = False
    penalty_every: int = 1
    parts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)
    _first: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("task", "alpha", "beta", "gamma")}
        if any(not value >= 0 for value in weights.values()) or not any(weights.values()):
            raise ValueError(f"{weights}: the weights of the losses must be at least 0, and one of them above.")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not known. Accepted: {', '.join(map(repr, MODES))}.")
        if self.penalty_every < 1:
            raise ValueError(f"penalty_every={self.penalty_every}: a number of steps, at least 1.")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], forward: Any = None) -> tuple[Tensor, Any]:
        """The loss of a batch, and what the model returned.

        Args:
            model: a PeftModel (or a transformers model) with an active PELA adapter; or what DDP made of it.
            inputs: keyword arguments of its forward. Teacher and student get the same; without `labels` there is no task loss.
            forward: `(model, inputs) -> (task loss or None, outputs)`; None calls `model(**inputs)` and takes its `loss`.

        Raises:
            ValueError: no task loss where `task` asks for one, no layer for the penalty, or features without a graph.
        """
        inner: Any = model.module if hasattr(model, "module") and not hasattr(model, "base_model") else model
        distils = bool(self.alpha or self.beta)
        blocks = find_blocks(inner, self.features) if self.alpha else []
        theirs, target = self._teach(inner, inputs, blocks) if distils else (Features(), [])
        with recorded_features(blocks) as ours:
            loss, outputs = _call(model, inputs) if forward is None else forward(model, inputs)
        parts = {}
        if self.task:
            if loss is None:
                raise ValueError("The model returned no loss: give it `labels`, or set task=0 for unlabelled data.")
            parts["task"] = self.task * loss
        if self.alpha:
            _check_graph(ours, model)
            masks = [self._mask(inner, inputs, module) for module in ours.modules]
            parts["features"] = self.alpha * feature_distillation(ours, theirs, masks, self.normalize, self.layer_weights)
        if self.beta:
            mask = self._mask(inner, inputs, None)
            pairs = zip(_logits(outputs), target, strict=True)
            distances = [masked_mean((mine.float() - wanted.float()).square(), mask) for mine, wanted in pairs]
            parts["logits"] = self.beta * torch.stack(distances).mean()
        if self.gamma and self._steps % self.penalty_every == 0:
            parts["penalty"] = self.gamma * self.penalty_every * self.penalty(inner)
        if torch.is_grad_enabled():
            self._steps += 1
        self.parts = {name: part.detach() for name, part in parts.items()}
        total: Any = sum(parts.values())
        if not self.task and model is not inner:  # DDP waits for a gradient of every parameter that the outputs depend on
            total = total + 0.0 * sum(found.sum() for found in _logits(outputs))
        return total, outputs

    def _mask(self, model: nn.Module, inputs: Mapping[str, Any], module: nn.Module | None) -> Tensor | None:
        """Which tokens count for a module's output; None stands for the model's own. A decoder has a mask of its own."""
        if not self.mask_padding:
            return None
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder = model.get_encoder()  # type: ignore[operator]
            if module is None or all(module is not other for other in encoder.modules()):
                labels = inputs.get("labels")
                return inputs.get("decoder_attention_mask", None if labels is None else labels != -100)
        return inputs.get("attention_mask")

    @staticmethod
    def _teach(model: nn.Module, inputs: Mapping[str, Any], blocks: list[nn.Module]) -> tuple[Features, list[Tensor]]:
        with as_teacher(model), recorded_features(blocks) as features:
            outputs = model(**inputs)  # labels too: an encoder-decoder makes the decoder's input of them
        return features, _logits(outputs)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and the deviations that a relative eps refers to."""
        return {"steps": self._steps, "first": dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._steps, self._first = int(state["steps"]), dict(state["first"])

    def penalty(self, model: nn.Module) -> Tensor:
        """The mean penalty over the weights of all active low-rank adapters.

        Raises:
            ValueError: there is none.
        """
        total, count = torch.zeros(()), 0
        for name, up, down, weight in low_rank_pairs(model):
            eps = self.eps
            if self.relative_eps:
                if name not in self._first:
                    self._first[name] = float(max_perturbation(up, down, weight))
                eps = self.eps * self._first[name]
            total = total.to(up.device) + perturbation_penalty(up, down, weight, self.mode, eps)
            count += 1
        if not count:
            raise ValueError("gamma asks for the weight-perturbation penalty, but no active adapter has factors of a matrix.")
        return total / count


def low_rank_pairs(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (name, R, L, W) of every matrix that an active adapter keeps as two factors; kernels with a core are left out.

    One at a time, because a quantised W is dequantised for it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, SubspaceLayer):
            for adapter in layer.active_adapters:
                for container, delta in layer.deltas(adapter).items():
                    if delta.replaces_base and getattr(delta, "core", None) is None:
                        down = delta.down.mT if delta.geometry.kind == "embedding" else delta.down
                        weight = layer._canonical_weight(container)
                        shape = (*delta.up.shape[:-1], down.shape[-1])
                        yield f"{name}.{container}", delta.up, down, weight.reshape(shape)


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
    outputs = model(**inputs)
    return getattr(outputs, "loss", None), outputs


def _logits(outputs: Any) -> list[Tensor]:
    """All logits of a model's output (a question answerer has two); without any, its first tensor."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if hasattr(outputs, "items"):
        named = [value for name, value in outputs.items() if name.endswith("logits") and isinstance(value, Tensor)]
        outputs = named or [value for name, value in outputs.items() if name != "loss"]
        if named:
            return named
    return [next(value for value in outputs if isinstance(value, Tensor) and value.ndim)]


def _check_graph(features: Sequence[Tensor], model: nn.Module) -> None:
    if torch.is_grad_enabled() and features and not any(feature.requires_grad for feature in features):
        raise ValueError(
            "The student's features carry no gradient. With gradient checkpointing this is its reentrant form, which runs the "
            "blocks without a graph: use gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


STATE = "healing_state.json"


class HealingTrainer(Trainer):
    """`Trainer` with a `Healing` objective in training; evaluation is that of the task.

    Args:
        healing: the objective.
        kwargs: as for `Trainer`. The parts of the loss are logged by name, as means since the last log over all processes.
    """

    def __init__(self, *args: Any, healing: Healing, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.healing = healing
        # A loss of means is divided by the accumulation steps; one normalised by the tokens of all of them would not be.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, float] = {}
        self._calls = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The healing objective in training, the task's loss otherwise."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        loss, outputs = self.healing(model, inputs, self._forward)
        self._calls += 1
        for name, part in self.healing.parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(part)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: Any, inputs: Any) -> tuple[Tensor | None, Any]:
        if self.healing.task and "labels" in inputs:
            return super().compute_loss(model, dict(inputs), return_outputs=True)  # type: ignore[return-value]
        return _call(model, inputs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As usual; without labels the loss is that of the healing objective."""
        if self.healing.task or any(name in inputs for name in self.label_names):
            return super().prediction_step(model, inputs, *args, **kwargs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _ = self.healing(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss, of all processes as the loss itself."""
        if "loss" in logs and self._calls:
            found = gather_object([(self._sums, self._calls)]) if self.args.world_size > 1 else [(self._sums, self._calls)]
            calls = sum(count for _, count in found)
            parts = {f"loss_{name}": sum(sums.get(name, 0.0) for sums, _ in found) / calls for name in self._sums}
            logs = {**logs, **parts}
            self._sums, self._calls = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = os.path.join(self._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and os.path.isdir(folder):
            with open(os.path.join(folder, STATE), "w") as writer:
                json.dump(self.healing.state_dict(), writer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = os.path.join(resume_from_checkpoint, STATE)
        if os.path.isfile(path):
            with open(path) as reader:
                self.healing.load_state_dict(json.load(reader))
