"""Trainer for few trained numbers: a rate of their own, and objectives that need more than one batch of one data set.

    few labels     CE(inputs), the model's own loss                                  objective=None
    negation       -CE(inputs) + CE(control)                                         `Negation`, with `control_dataset`
    test time      entropy of the unlabelled inputs                                  `Entropy`
    test time      UFM: the strong view fits what the weak one is sure about         `Ufm`

Source: the objectives of aTLAS (arXiv:2407.02880) and AdaMerging (arXiv:2310.02575); `training.objectives` has them as
functions of logits, and says where the official code differs.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .batch_objectives import Inputs, Moment, logits_of

ROW = "row"  # column with the number of a row, where an objective remembers something about rows
STATE = "objective_state.json"


class _Numbered(Dataset[dict[str, Any]]):
    """A data set with the number of each row."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], ROW: number}


class _AtEpochs(TrainerCallback):
    def __init__(self, trainer: CoefficientTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._choose_trusted(int(state.epoch or 0))


class CoefficientTrainer(Trainer):
    """`Trainer` with a rate for coefficients, and an objective in training; evaluation is that of the task.

    Args:
        coefficient_lr: rate of an aTLAS adapter's coefficients, with `weight_decay` of the arguments for all of them; whatever
            else is trained (a head) has the arguments' own. None leaves the optimizer as it is.
        objective: `(model, inputs, moment) -> (loss, outputs)`; None for the model's own loss.
        control_dataset: labelled rows for `Negation`, in the order of a generator of the arguments' seed, round and round.
        kwargs: as for `Trainer`. Checkpoints hold what the objective needs to go on.
    """

    def __init__(
        self,
        *args: Any,
        coefficient_lr: float | None = 1e-2,
        objective: Any = None,
        control_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.coefficient_lr = coefficient_lr
        self.objective: Any = objective
        self.control_dataset = control_dataset
        self.model_accepts_loss_kwargs = objective is None and self.model_accepts_loss_kwargs  # a mean over a batch is its own
        self._calls = 0
        if objective is not None and objective.needs_control and control_dataset is None:
            raise ValueError(f"{type(objective).__name__} needs a control set: pass control_dataset.")
        if objective is not None and objective.needs_rows:
            self.train_dataset = _Numbered(self.train_dataset)
            self.add_callback(_AtEpochs(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Coefficients at their own rate, one optimizer group; see `AtlasModel.coefficient_groups`."""
        inner: Any = self.model if model is None else model
        tuner = next((m for m in inner.modules() if hasattr(type(m), "coefficient_groups")), None)
        if self.optimizer is not None or self.coefficient_lr is None or tuner is None:
            return super().create_optimizer(model)
        groups = tuner.coefficient_groups(self.coefficient_lr, self.args.weight_decay)
        known = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in inner.parameters() if p.requires_grad and id(p) not in known]  # a head around the PeftModel
        groups += [{"params": rest}] if rest else []
        optimizer_cls, settings = self.get_optimizer_cls_and_kwargs(self.args, inner)
        self.optimizer = optimizer_cls(groups, **settings)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The objective in training, the task's loss otherwise."""
        inputs = dict(inputs)
        rows = inputs.pop(ROW, None)
        if self.objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        progress = self.state.global_step / max(1, self.state.max_steps)
        control = self._control_batch() if self.objective.needs_control else None
        loss, outputs = self.objective(model, inputs, Moment(progress, rows, control))
        return (loss, outputs) if return_outputs else loss

    def _control_batch(self) -> Inputs:
        """The next batch: a function of seed, call and process alone, so that a resumed run goes on with the same."""
        size, count = self.args.per_device_train_batch_size, len(self.control_dataset)
        first = (self._calls * self.args.world_size + self.args.process_index) * size
        self._calls += 1
        chosen, orders = [], dict[int, list[int]]()
        for place in range(first, first + size):
            generator = torch.Generator().manual_seed(self.args.seed + place // count)
            order = orders.setdefault(place // count, torch.randperm(count, generator=generator).tolist())
            chosen.append(self.control_dataset[order[place % count]])
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return self._prepare_inputs(collate(chosen))

    @torch.no_grad()
    def _choose_trusted(self, epoch: int) -> None:
        if self.objective.epoch == epoch:
            return  # resumed within the epoch
        model, found = self.model_wrapped, []
        training, _ = model.training, model.eval()
        for inputs in self.get_test_dataloader(self.train_dataset):  # type: ignore[arg-type]
            inputs = dict(self._prepare_inputs(inputs))
            rows = inputs.pop(ROW)
            with self.compute_loss_context_manager():
                logits, _ = logits_of(model, inputs)
            found.append(self.accelerator.gather((rows, logits.float().softmax(-1))))
        model.train(training)
        self.objective.trust(torch.cat([rows for rows, _ in found]), torch.cat([p for _, p in found]), epoch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = os.path.join(self._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and os.path.isdir(folder):
            state = {"calls": self._calls}
            if hasattr(self.objective, "state_dict"):
                state["objective"] = self.objective.state_dict()
            with open(os.path.join(folder, STATE), "w") as writer:
                json.dump(state, writer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = os.path.join(resume_from_checkpoint, STATE)
        if os.path.isfile(path):
            with open(path) as reader:
                state = json.load(reader)
            self._calls = int(state["calls"])
            if "objective" in state:
                self.objective.load_state_dict(state["objective"])
