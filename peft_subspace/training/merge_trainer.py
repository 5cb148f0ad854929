"""Learning how task vectors are merged, from batches of all tasks: AdaMerging, Concrete, and aTLAS's task addition.

    loss = sum over the tasks of the mean entropy of the merged model's predictions, or of another objective of theirs

    coefficients  lambda <- Adam(dloss/dlambda)                             aTLAS adapters, and the end of Concrete's
    mask          lambda' <- lambda_0 - one step of Adam;  x <- Adam(dloss/dx at lambda')     one sample of the mask in both

Source: AdaMerging (arXiv:2310.02575) and Concrete subspace learning (arXiv:2312.06173) with its official code. The second level
is of first order: no gradient goes through the step to lambda'. That code resets lambda after the model of the next inner step
was merged and keeps the inner Adam's moments; `reference_order` does so too, the default is the algorithm as it is stated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, send_to_device
from torch import Tensor, nn

from ..adapters.pooled import PooledModel
from ..task_vectors.provenance import identity
from ..whole_files import write_whole
from .merge_checkpoint import HISTORY, load_checkpoint, moments, restore_moments, run_folder, save_checkpoint
from .objectives import UNLABELLED
from .tasks import Stream, Task

# of a config, what a run that goes on must share with the one before, besides the hashes of its vectors
CONFIG_FIELDS = (
    "granularity", "temperature", "init", "coefficients", "learn_coefficients", "clamp_coefficients", "rescale", "stochastic",
    "eval_mask", "save_mask", "seed", "constraint", "partition", "partition_seed", "tie_blocks", "fused_splits", "selected",
)  # fmt: skip

MEASURES = {name: name.replace("_", " ") for name in UNLABELLED}


@dataclass
class MergeArguments:
    """How a merge is learned; the defaults are those of the paper's vision models.

    Args:
        mask_steps: steps on the mask, if the adapter has one that is trained.
        mask_lr: rate of Adam for the logits. A logit moves by at most about `mask_lr * mask_steps`.
        inner_lr: rate of the one step of Adam on the coefficients before each of them, if the adapter trains coefficients. A
            first step of Adam is `inner_lr` long for every coefficient, whatever its gradient.
        coefficient_steps: steps on the coefficients alone, afterwards.
        coefficient_lr: their rate of Adam.
        accumulation: batches of each task for one step.
        reference_order: the official code's order; see the module.
        eval_every: steps between looks at the loss (and at `evaluate`) without noise.
        eval_batches: of each task, for the loss; the same every time.
        patience: looks without a better one after which a phase ends; None for never.
        select: what is left in the model: "best", the look with the lowest mean loss, step 0 among them; "metric", the one with
            the highest mean of what `evaluate` returned; or "last". Entropy falls too while a task collapses onto one class,
            which labelled rows tell.
        output_dir: for checkpoints and the history; None writes nothing.
        save_every: steps between checkpoints.
        seed: of the order of the batches.
    """

    mask_steps: int = 2000
    mask_lr: float = 1e-3
    inner_lr: float = 1.0
    coefficient_steps: int = 1000
    coefficient_lr: float = 1e-3
    accumulation: int = 1
    reference_order: bool = False
    eval_every: int = 100
    eval_batches: int = 4
    patience: int | None = None
    select: Literal["best", "metric", "last"] = "best"
    output_dir: str | None = None
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("accumulation", "eval_every", "eval_batches", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1.")
        for name in ("mask_steps", "coefficient_steps", "mask_lr", "inner_lr", "coefficient_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience!r} must be at least 1, or None.")
        if self.select not in ("best", "metric", "last"):
            raise ValueError(f"select={self.select!r} is not known. Accepted: 'best', 'metric', 'last'.")


@dataclass
class Look:
    """The merged model at one step, without noise.

    Attributes:
        phase: "mask" or "coefficients".
        step: in the phase; 0 is its start, of the first phase that of the adapter (task arithmetic, or the base).
        loss: task -> mean loss in nats.
        metrics: what `evaluate` returned.
        measure: what the loss is: "entropy", "information maximization", "cross-entropy", or "loss" (tasks differ, or
            have objectives of their own).
    """

    phase: str
    step: int
    loss: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    measure: str = "entropy"

    @property
    def mean(self) -> float:
        """Mean loss over the tasks."""
        return sum(self.loss.values()) / len(self.loss)

    def __str__(self) -> str:
        metrics = "".join(f", {name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.phase} step {self.step}: mean {self.measure} {self.mean:.4f}{metrics}"


class MergeTrainer:
    """Learns the mask and coefficients of an adapter that merges task vectors.

    Args:
        model: a PeftModel with a Concrete adapter (mask, and coefficients with `learn_coefficients`), or an aTLAS one
            (coefficients: AdaMerging; with labels, task addition).
        tasks: all tasks; the loss is the sum of theirs.
        arguments: how.
        evaluate: `model -> {name: value}`, such as accuracies; called where the loss is looked at. Of several processes each
            calls it, and the means of what they return count.
        accelerator: for devices, mixed precision and several processes; each takes its share of the batches, and gradients are
            averaged. Trained tensors are few, so the model is not wrapped for that.
        adapter_name: of the adapter; None for the active one.
        say: what is called with each line of the log; by default the main process prints them.

    The model is in evaluation mode throughout (no dropout of the base's own); only the mask is sampled.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[Task],
        arguments: MergeArguments | None = None,
        *,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        accelerator: Accelerator | None = None,
        adapter_name: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if len({task.name for task in tasks}) != len(tasks) or not tasks:
            raise ValueError(
                f"tasks={[task.name for task in tasks]!r}: one or more tasks with names of their own are expected."
            )
        if not isinstance(getattr(model, "base_model", None), PooledModel):
            raise ValueError(
                f"{type(model).__name__} has no task vectors to merge. Give the model that get_peft_model makes with a "
                f"ConcreteConfig or an AtlasConfig."
            )
        adapter_name = model.base_model.chosen_adapter(adapter_name)
        self.model, self.tasks, self.adapter_name = model, list(tasks), adapter_name
        self.arguments = arguments or MergeArguments()
        self.accelerator = accelerator or Accelerator()
        if self.accelerator.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.accelerator.gradient_accumulation_steps} of the accelerator: give "
                f"MergeArguments(accumulation=...) instead."
            )
        if self.arguments.select == "metric" and evaluate is None:
            raise ValueError("select='metric' needs evaluate=..., a function of the model that returns {name: value}.")
        self.evaluate = evaluate
        self.masks, self.coefficients = self._trained()
        self.starts = [tensor.detach().clone() for tensor in self.coefficients]
        self._start = self._name_of_start()
        self._say = say or self.accelerator.print
        self._measure = _measure(self.tasks)
        self.history: list[Look] = []
        self._phase, self._step = "", 0
        self._best: tuple[float, list[Tensor]] | None = None
        self._looks_since_best = 0
        self._held_out = {task.name: self._first_batches(task) for task in self.tasks}
        processes = self.accelerator.process_index, self.accelerator.num_processes
        self.streams = [Stream(task, self.arguments.seed * 1_000_003 + k, *processes) for k, task in enumerate(self.tasks)]

    def _name_of_start(self) -> str:
        """What step 0 is: the number that every result has to be compared with."""
        sums = [delta.as_plain_sum() for delta in self.model.base_model.deltas(self.adapter_name)]
        if any(weights is None or weights != sums[0] for weights in sums):
            return "as it was given"
        return "task arithmetic" if any(sums[0] or ()) else "the base"

    def _trained(self) -> tuple[list[Tensor], list[Tensor]]:
        found: dict[int, Tensor] = {}
        for delta in self.model.base_model.deltas(self.adapter_name):
            found |= {id(tensor): tensor for tensor in delta.trained if tensor.requires_grad}
        coefficients = {id(p) for name, p in self.model.named_parameters() if name.endswith(".coefficients")}
        if not found:
            raise ValueError(
                f"The adapter {self.adapter_name!r} has neither a mask nor coefficients that are trained. Set train_mask=True "
                f"or learn_coefficients, and load it with is_trainable=True."
            )
        masks = [tensor for key, tensor in found.items() if key not in coefficients]
        return masks, [tensor for key, tensor in found.items() if key in coefficients]

    def _first_batches(self, task: Task) -> list[Any]:
        if iter(task.batches) is task.batches:
            raise ValueError(f"The batches of task {task.name!r} can be gone through only once. Give a list or a DataLoader.")
        with torch.random.fork_rng(devices=[]):  # a DataLoader that shuffles takes the same ones in every run
            torch.manual_seed(self.arguments.seed)
            found = list(islice(task.batches, self.arguments.eval_batches))
        if not found:
            raise ValueError(f"The task {task.name!r} has no batches.")
        return found

    # Running -----------------------------------------------------------------------------------------------------------

    def train(self, resume: bool = False) -> list[Look]:
        """Run what is left of the phases; the history, from the adapter as it starts (task arithmetic, or the base) on.

        Args:
            resume: go on from the checkpoint in `output_dir`, with the bits of a run that was not interrupted; start anew if
                there is none.

        Raises:
            ValueError: `resume` without `output_dir`, or a checkpoint of other arguments or another adapter; something else
                has the name of a checkpoint in `output_dir`, or another run writes there.
        """
        with run_folder(self.arguments.output_dir, self.accelerator):
            return self._train(resume)

    def _train(self, resume: bool) -> list[Look]:
        state = self._load() if resume else None
        if self.accelerator.num_processes > 1 and state is None:
            for tensor in (*self.masks, *self.coefficients):  # random logits may have come from other seeds
                tensor.data.copy_(broadcast(tensor.detach().clone()))
        self.model.to(self.accelerator.device).eval()
        phases = [("mask", self.arguments.mask_steps)] if self.masks else []
        phases += [("coefficients", self.arguments.coefficient_steps)] if self.coefficients else []
        for phase, steps in phases:
            if self._phase == "coefficients" and phase == "mask":
                continue  # the checkpoint is beyond it
            if self._phase != phase:
                self._begin(phase)
            self._run(phase, steps, state)
            state = None
        self._say(f"step 0 ({self._start}): {self.history[0]}")
        self._say(f"result: {self.selected}")
        self._write_history()
        return self.history

    def _begin(self, phase: str) -> None:
        if phase == "coefficients" and self.masks:
            self._reset()
            self.model.base_model.freeze_mask(self.adapter_name)
        self._phase, self._step, self._best, self._looks_since_best = phase, 0, None, 0

    def _run(self, phase: str, steps: int, state: dict[str, Tensor] | None) -> None:
        trained, rate = (self.masks, self.arguments.mask_lr)
        if phase == "coefficients":
            trained, rate = (self.coefficients, self.arguments.coefficient_lr)
        optimizer = self.accelerator.prepare(torch.optim.Adam(trained, lr=rate))
        inner = None
        if phase == "mask" and self.coefficients:
            inner = self.accelerator.prepare(torch.optim.Adam(self.coefficients, lr=self.arguments.inner_lr))
        if state is not None:
            restore_moments(optimizer, trained, state, "outer")
            if inner is not None:
                restore_moments(inner, self.coefficients, state, "inner")
        if self._step == 0:
            self._look(trained)
        while self._step < steps and not self._is_over():
            if phase == "mask":
                self._mask_step(optimizer, inner)
            else:
                self._backward(self.coefficients)
                self._apply(optimizer)
            self._step += 1
            if self._step % self.arguments.eval_every == 0 or self._step == steps:
                self._look(trained)
            if self.arguments.output_dir and (self._step % self.arguments.save_every == 0 or self._step == steps):
                self._save(optimizer, inner, trained)
        if self.arguments.select != "last" and self._best is not None:
            _assign(trained, self._best[1])

    def _mask_step(self, optimizer: Any, inner: Any) -> None:
        base = self.model.base_model
        base.sample_mask(True, self.adapter_name)
        try:
            if inner is not None:
                self._inner_step(inner)
            self._backward(self.masks)
            self._apply(optimizer)
        finally:
            base.sample_mask(False, self.adapter_name)

    def _inner_step(self, inner: Any) -> None:
        """lambda' = lambda_0 - one step, left in the model for the outer one."""
        if self.arguments.reference_order:
            self._backward(self.coefficients)  # of the model that was merged with the last lambda'
            self._reset()
        else:
            self._reset()
            inner.optimizer.state.clear()  # a fresh Adam; one more that is prepared would stay with the accelerator
            self._backward(self.coefficients)
        self._apply(inner)

    def _reset(self) -> None:
        _assign(self.coefficients, self.starts)

    def _backward(self, wanted: Sequence[Tensor]) -> None:
        """Gradients of the loss for some of the trained tensors, averaged over batches and processes."""
        everything = [tensor for tensor in (*self.masks, *self.coefficients, *self.model.parameters()) if tensor.requires_grad]
        chosen = {id(tensor) for tensor in wanted}
        for tensor in everything:
            tensor.requires_grad_(id(tensor) in chosen)
            tensor.grad = None
        try:
            for _ in range(self.arguments.accumulation):
                for task, stream in zip(self.tasks, self.streams, strict=True):
                    with self.accelerator.autocast():
                        loss = self._loss(task, stream.next())
                    self.accelerator.backward(loss / self.arguments.accumulation)
        finally:
            for tensor in everything:
                tensor.requires_grad_(True)
        if self.accelerator.num_processes > 1:
            for tensor in wanted:
                found = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad  # all take part, or none returns
                tensor.grad = self.accelerator.reduce(found, reduction="mean")

    def _apply(self, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _loss(self, task: Task, batch: Any) -> Tensor:
        return task.loss(self.model, send_to_device(batch, self.accelerator.device))

    # Looking -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, trained: Sequence[Tensor]) -> None:
        inner = [tensor.detach().clone() for tensor in self.coefficients] if self._phase == "mask" else []
        if inner:
            self._reset()  # lambda' belongs to a step; what counts is the mask with lambda_0
        metrics = {}
        losses = {task.name: self._mean_loss(task) for task in self.tasks}
        if self.evaluate is not None:
            metrics = {name: float(value) for name, value in self.evaluate(self.model).items()}
            self.model.eval()
        losses, metrics = self._averaged(losses, metrics)
        look = Look(self._phase, self._step, losses, metrics, self._measure)
        self._check_finite(look)
        self.history.append(look)
        self._say(str(look))
        if self._best is None or self._score(look) < self._best[0]:
            self._best, self._looks_since_best = (self._score(look), [t.detach().clone() for t in trained]), 0
        else:
            self._looks_since_best += 1
        if inner:
            _assign(self.coefficients, inner)

    def _mean_loss(self, task: Task) -> float:
        with self.accelerator.autocast():
            found = [float(self._loss(task, batch)) for batch in self._held_out[task.name]]
        return sum(found) / len(found)

    def _averaged(self, *tables: dict[str, float]) -> tuple[dict[str, float], ...]:
        """Means over the processes, whose data may differ: what is kept and when it is enough must be the same in all."""
        if self.accelerator.num_processes == 1:
            return tables
        everywhere = gather_object([tables])
        if any([table.keys() for table in one] != [table.keys() for table in tables] for one in everywhere):
            names = [sorted(name for table in one for name in table) for one in everywhere]
            raise ValueError(f"evaluate returned other names in some processes: {names}. Return the same in all of them.")
        return tuple(
            {name: sum(one[k][name] for one in everywhere) / len(everywhere) for name in table}
            for k, table in enumerate(everywhere[0])
        )

    def _check_finite(self, look: Look) -> None:
        for name, value in look.loss.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"The {self._measure} of task {name!r} is not finite at {self._phase} step {self._step}. Lower the rates, "
                    f"or look for NaN in its batches."
                )

    def _is_over(self) -> bool:
        return self.arguments.patience is not None and self._looks_since_best >= self.arguments.patience

    @property
    def selected(self) -> Look:
        """The look that is left in the model."""
        last = [look for look in self.history if look.phase == self._phase]
        return last[-1] if self.arguments.select == "last" else min(last, key=self._score)

    def _score(self, look: Look) -> float:
        """What is lowest at the best look."""
        if self.arguments.select != "metric":
            return look.mean
        if not look.metrics or not all(map(math.isfinite, look.metrics.values())):
            raise ValueError(f"select='metric': evaluate returned {look.metrics}; one or more finite numbers are expected.")
        return -sum(look.metrics.values()) / len(look.metrics)

    # Checkpoints -------------------------------------------------------------------------------------------------------

    def _save(self, optimizer: Any, inner: Any, trained: Sequence[Tensor]) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = self._tensors() | moments(optimizer, trained, "outer")
        if inner is not None and self.arguments.reference_order:
            tensors |= moments(inner, self.coefficients, "inner")
        tensors |= {f"start.{i}": tensor for i, tensor in enumerate(self.starts)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate([] if self._best is None else self._best[1])}
        state = {
            "arguments": self._identity(),
            "phase": self._phase,
            "step": self._step,
            "mask_steps": self.arguments.mask_steps,
            "taken": [stream.taken for stream in self.streams],
            "best": None if self._best is None else self._best[0],
            "looks_since_best": self._looks_since_best,
            "history": [asdict(look) for look in self.history],
        }
        save_checkpoint(str(self.arguments.output_dir), tensors, state)

    def _tensors(self) -> dict[str, Tensor]:
        masks = {f"mask.{i}": tensor for i, tensor in enumerate(self.masks)}
        return masks | {f"coefficients.{i}": tensor for i, tensor in enumerate(self.coefficients)}

    def _identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on; it may be longer, and saved more often."""
        own = asdict(self.arguments) | {"measure": self._measure}
        for name in ("output_dir", "mask_steps", "coefficient_steps", "save_every", "patience"):
            del own[name]
        config = self.model.peft_config[self.adapter_name].to_dict()
        given = {name: config[name] for name in CONFIG_FIELDS if name in config}
        vectors = [identity(record) for record in (config.get("provenance") or {}).get("vectors", [])]
        adapter = json.dumps([given, vectors, len(self.masks), len(self.coefficients)], sort_keys=True, default=str)
        names = [[task.name, _name(task)] for task in self.tasks]
        return own | {"tasks": names, "processes": self.accelerator.num_processes, "adapter": adapter}

    def _load(self) -> dict[str, Tensor] | None:
        found = load_checkpoint(self.arguments.output_dir, self._identity())
        if found is None:
            return None
        tensors, state = found
        own = self._tensors()
        if any(name not in tensors or tensors[name].shape != tensor.shape for name, tensor in own.items()):
            raise ValueError(
                f"The checkpoint in {self.arguments.output_dir} is of another adapter: its tensors do not fit those of "
                f"{self.adapter_name!r}."
            )
        _assign(list(own.values()), [tensors[name] for name in own])
        self.starts = [tensors[f"start.{i}"].to(start.device) for i, start in enumerate(self.starts)]
        self._phase, self._step = state["phase"], state["step"]
        if self._phase == "coefficients" and self.masks and state["mask_steps"] != self.arguments.mask_steps:
            raise ValueError(
                f"mask_steps={self.arguments.mask_steps}: the checkpoint is beyond the mask, after {state['mask_steps']} steps."
            )
        if self._phase == "coefficients" and self.masks:
            self.model.base_model.freeze_mask(self.adapter_name)
        best = [tensors[f"best.{i}"] for i in range(sum(name.startswith("best.") for name in tensors))]
        self._best = None if state["best"] is None else (state["best"], best)
        self._looks_since_best = state["looks_since_best"]
        self.history = [Look(**look) for look in state["history"]]
        for stream, taken in zip(self.streams, state["taken"], strict=True):
            stream.skip(taken)
        return tensors

    def _write_history(self) -> None:
        if self.arguments.output_dir and self.accelerator.is_main_process:
            path = Path(self.arguments.output_dir) / HISTORY
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps([asdict(look) for look in self.history], indent=1))


def _measure(tasks: Sequence[Task]) -> str:
    found = {_name(task) for task in tasks}
    return found.pop() if len(found) == 1 and found <= {"cross-entropy", *MEASURES.values()} else "loss"


def _name(task: Task) -> str:
    if task.labels is not None:
        return "cross-entropy"
    own = getattr(task.objective, "__qualname__", type(task.objective).__qualname__)
    return next((MEASURES[name] for name, objective in UNLABELLED.items() if objective is task.objective), own)


@torch.no_grad()
def _assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
