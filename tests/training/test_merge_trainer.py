"""Learning how vectors are merged from unlabelled batches: the two levels, their order, selection, and going on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.training import InformationMaximization, MergeArguments, MergeTrainer, Task, pooled_logits, token_logits
from peft_subspace.training.objectives import addition_loss, entropy_loss, information_maximization_loss
from peft_subspace.training.tasks import Stream
from tests.pico import MODELS
from tests.pools import pool_of, vector_of, write_vector
from tests.processes import run_python
from tests.training import ddp_merge

PICO = MODELS["mlp"]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


START = 0.3


def head(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(PICO.model()(**PICO.batch()).shape[-1], 3).requires_grad_(False)


def tasks(count: int = 2) -> list[Task]:
    """Unlabelled rows in a shuffled DataLoader, and a head each."""
    found = []
    for k in range(count):
        rows, classify = 2 * PICO.batch(seed=k)["x"].repeat(3, 1), head(k)
        loader = DataLoader(rows + 0.1 * torch.randn(rows.shape), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        found.append(Task(f"task{k}", loader, lambda model, x, classify=classify: classify(model(x))))
    return found


def make(config: Any = ConcreteConfig, **fields: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(PICO.model(), config(pool=pool_of(PICO), **fields))


def trainer(model: Any, objective: Any = entropy_loss, **arguments: Any) -> MergeTrainer:
    given = {"mask_steps": 6, "mask_lr": 0.1, "coefficient_steps": 6, "coefficient_lr": 0.05, "eval_every": 2, **arguments}
    torch.manual_seed(7)
    chosen = [replace(task, objective=objective) for task in tasks()]
    return MergeTrainer(model, chosen, MergeArguments(**given), accelerator=Accelerator(cpu=True))


def lambdas(model: Any) -> list[Tensor]:
    return [value.clone() for value in model.base_model.coefficients().values()]


# What is learned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["task", "block"])
def test_adamerging_lowers_the_entropy(granularity: str) -> None:
    """Coefficients of an aTLAS adapter: task-wise and layer-wise."""
    model = make(AtlasConfig, granularity=granularity, init=START)
    history = trainer(model, coefficient_steps=20).train()
    assert {look.phase for look in history} == {"coefficients"}
    assert min(look.mean for look in history) < history[0].mean - 0.01
    assert not torch.equal(lambdas(model)[0], torch.full((2,), START))


def test_concrete_task_arithmetic_lowers_the_entropy_by_the_mask_alone() -> None:
    model = make()
    before = model.state_dict()
    history = trainer(model, mask_steps=30).train()
    assert {look.phase for look in history} == {"mask"}
    assert min(look.mean for look in history) < history[0].mean - 0.01
    changed = {name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])}
    assert all(torch.equal(value, torch.full((2,), START)) for value in lambdas(model))
    assert all("logits" in name for name in changed)


@pytest.mark.parametrize("learned", ["task", "layer"])
def test_concrete_adamerging_learns_the_mask_then_the_coefficients(learned: str) -> None:
    model = make(learn_coefficients=learned)
    history = trainer(model).train()
    assert [look.phase for look in history] == ["mask"] * 4 + ["coefficients"] * 4
    assert [look.step for look in history] == [0, 2, 4, 6] * 2
    assert model.peft_config["default"].train_mask is False
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"coefficients"}


@pytest.mark.parametrize("start", [0.0, START])
def test_labels_make_it_task_addition(start: float, capsys: pytest.CaptureFixture[str]) -> None:
    """The first look and gradient are those of `addition_loss` over the tasks."""
    model = make(AtlasConfig, init=start)
    given = []
    for k in range(2):
        batch = {**PICO.batch(seed=k), "labels": torch.arange(4) % 3}
        classify = head(k)
        given.append(Task(f"task{k}", [batch], lambda model, inputs, classify=classify: classify(model(**inputs)), "labels"))
    arguments = MergeArguments(coefficient_steps=10, coefficient_lr=0.05, eval_every=5)
    run = MergeTrainer(model, given, arguments, accelerator=Accelerator(cpu=True))
    run._backward(run.coefficients)
    found = [tensor.grad.clone() for tensor in run.coefficients]
    pairs = [(task.logits(model, PICO.batch(seed=k)), torch.arange(4) % 3) for k, task in enumerate(given)]
    expected = torch.autograd.grad(addition_loss(pairs), run.coefficients)
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)
    history = run.train()
    assert sum(history[0].loss.values()) == pytest.approx(addition_loss(pairs).item(), rel=1e-5)
    assert history[-1].mean < history[0].mean - 0.01
    words = "the base" if start == 0 else "task arithmetic"
    assert f"step 0 ({words}): coefficients step 0: mean cross-entropy" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"task 'a' have no 'labels', its labels; there is: \['x'\]"):
        Task("a", [], given[0].logits, "labels").loss(model, PICO.batch())


STARTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "softmax": (AtlasConfig, {"constraint": "softmax"}, "task arithmetic"),  # the average
    "nothing is let through": (AtlasConfig, {"constraint": "nonnegative", "init": -1.0}, "the base"),
    "by name": (AtlasConfig, {"init": {"task0": 0.5}}, "task arithmetic"),
    "at random": (AtlasConfig, {"init_weights": False}, "as it was given"),
    "mean": (ConcreteConfig, {"init": 2.0}, "task arithmetic"),
    "hard": (ConcreteConfig, {"eval_mask": "hard"}, "task arithmetic"),
    "hard, closed": (ConcreteConfig, {"eval_mask": "hard", "init": -1.0}, "the base"),
    "sample": (ConcreteConfig, {"eval_mask": "sample"}, "as it was given"),
    "not rescaled": (ConcreteConfig, {"rescale": False}, "as it was given"),
    "a mask at random": (ConcreteConfig, {"init_weights": False}, "as it was given"),
}


@pytest.mark.parametrize(("config", "fields", "words"), STARTS.values(), ids=STARTS)
def test_the_first_look_is_called_what_it_is(config: Any, fields: dict[str, Any], words: str) -> None:
    """Against the weights that come out: those of one lambda a vector, of none, or others."""
    model = make(config, **fields)
    assert trainer(model)._start == words
    merged, base = model.merge_and_unload().state_dict(), PICO.model().state_dict()
    vectors = [load_file(path) for path in pool_of(PICO).values()]
    flat = [torch.cat([tensors[name].flatten() for name in base]) for tensors in vectors]
    difference = torch.cat([(merged[name] - base[name]).flatten() for name in base])
    matrix = torch.stack(flat, 1)
    rest = difference - matrix @ torch.linalg.lstsq(matrix, difference[:, None]).solution[:, 0]
    if words == "the base":
        assert not difference.any()
    elif words == "task arithmetic":
        assert float(rest.norm()) < 1e-5 * float(difference.norm())
    elif fields != {"rescale": False}:  # half of every lambda is a sum of the vectors too, but not the one that was asked for
        assert float(rest.norm()) > 0.05 * float(difference.norm())


def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    """A batch each, against two batches a step in one process; and a run that goes on finds what it left."""
    (tmp_path / "pool").mkdir()
    for t in range(2):
        write_vector(tmp_path / "pool" / f"task{t}.safetensors", vector_of(PICO.model(), t))
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, Path(ddp_merge.__file__), tmp_path)
    losses, found = {}, {}
    for name in ("plain", "sampled", "resumed"):
        one, other = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2))
        losses[name], found[name] = one, load_file(tmp_path / f"{name}-0.safetensors")
        assert one == other
        theirs = load_file(tmp_path / f"{name}-1.safetensors")
        assert all(torch.equal(theirs[key], value) for key, value in found[name].items())
    alone = ddp_merge.learn(tmp_path, Accelerator(cpu=True), sampled=False)
    assert losses["plain"] == pytest.approx([look.mean for look in alone.history], rel=1e-5)
    assert min(losses["plain"]) < losses["plain"][0] - 0.01
    for key, value in ddp_merge.tensors(alone).items():
        torch.testing.assert_close(found["plain"][key], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(found["resumed"][key], found["sampled"][key])


def test_a_model_without_task_vectors_is_refused() -> None:
    model = get_peft_model(PICO.model(), LoraConfig(**PICO.targets))
    with pytest.raises(ValueError, match=r"PeftModel has no task vectors to merge\. Give the model that get_peft_model makes"):
        MergeTrainer(model, tasks(), accelerator=Accelerator(cpu=True))


def test_the_first_look_is_plain_task_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = make(learn_coefficients="task"), make(AtlasConfig, init=START).eval()
    run = trainer(model)
    history = run.train()
    for task in run.tasks:
        batches = run._held_out[task.name]
        with torch.no_grad():
            expected = sum(float(entropy_loss(task.logits(plain, batch))) for batch in batches) / len(batches)
        assert history[0].loss[task.name] == pytest.approx(expected, rel=1e-5)
    printed = capsys.readouterr().out
    assert f"step 0 (task arithmetic): mask step 0: mean entropy {history[0].mean:.4f}" in printed
    assert "result: coefficients step" in printed


def test_a_task_may_have_an_objective_of_its_own() -> None:
    """And a look says what the loss is, where all tasks have the same."""
    for objective, measure in (
        (information_maximization_loss, "information maximization"),
        (lambda logits: -logits.softmax(-1).amax(-1).mean(), "loss"),
    ):
        model, plain = make(learn_coefficients="task"), make(AtlasConfig, init=START).eval()
        run = trainer(model, objective)
        history = run.train()
        for task in run.tasks:
            batches = run._held_out[task.name]
            with torch.no_grad():
                expected = sum(float(objective(task.logits(plain, batch))) for batch in batches) / len(batches)
            assert history[0].loss[task.name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert {look.measure for look in history} == {measure}
        assert min(look.mean for look in history) < history[0].mean


def test_objectives_that_do_not_fit_a_task_are_refused() -> None:
    batches, logits = [torch.zeros(1)], lambda model, batch: batch
    with pytest.raises(ValueError, match="task 'a': with `labels` the loss is the cross-entropy; leave `objective` out"):
        Task("a", batches, logits, labels="labels", objective=information_maximization_loss)
    with pytest.raises(ValueError, match=r"task 'a': objective=\S*InformationMaximization.* is called with logits alone"):
        Task("a", batches, logits, objective=InformationMaximization())  # type: ignore[arg-type]

    @dataclass
    class Own:  # has no hash
        factor: float = 1.0

        def __call__(self, logits: Tensor) -> Tensor:
            return self.factor * entropy_loss(logits)

    assert trainer(make(), Own())._measure == "loss"


def test_metrics_are_asked_for_where_the_entropy_is_looked_at(tmp_path: Path) -> None:
    model = make()
    run = trainer(model)
    run.evaluate = lambda merged: (
        {"accuracy": torch.tensor(0.5), "training": float(merged.training)} if merged.train(False) else {}
    )
    run.arguments.output_dir = str(tmp_path)  # the history is JSON
    assert all(look.metrics == {"accuracy": 0.5, "training": 0.0} for look in run.train())


def test_the_bases_dropout_stays_off() -> None:
    """Only the mask is sampled: the official models have no dropout, others have."""
    model = make()
    seen = []
    original = model.base_model.model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    run = trainer(model)
    run.evaluate = lambda merged: {"mode": float(merged.train().training)}  # a careless one
    seen.clear()
    run.train()
    original.remove()
    assert not any(seen)


def test_one_inner_optimizer_is_left_with_the_accelerator() -> None:
    run = trainer(make(learn_coefficients="layer"))
    run.train()
    assert len(run.accelerator._optimizers) == 3  # of the mask, of the inner step, of the coefficients


# The two levels ----------------------------------------------------------------------------------------------------------


class Spy(MergeTrainer):
    """Notes lambda, and the sums of the samples, at every gradient."""

    def _backward(self, wanted: Any) -> None:
        level = "mask" if wanted is self.masks else "coefficients"
        numbers = [float(delta.current_mask().values().sum()) for delta in self.model.base_model._deltas("default")]
        super()._backward(wanted)
        self.notes: list[Any] = [*getattr(self, "notes", []), (level, lambdas(self.model)[0], numbers)]


def spied(**arguments: Any) -> list[Any]:
    model = make(learn_coefficients="task", clamp_coefficients=False)
    given = {"mask_steps": 3, "mask_lr": 0.1, "coefficient_steps": 0, "inner_lr": 0.2, **arguments}
    torch.manual_seed(7)
    run = Spy(model, tasks(), MergeArguments(**given), accelerator=Accelerator(cpu=True))
    run.train()
    return run.notes


def test_the_inner_gradient_is_taken_at_the_start_and_the_outer_one_a_step_from_it() -> None:
    """One step of a fresh Adam is `inner_lr` long; one sample of the mask serves both levels of a step."""
    notes = spied()
    assert [level for level, _, _ in notes] == ["coefficients", "mask"] * 3
    for at, (level, numbers, draws) in enumerate(notes):
        distance = (numbers - START).abs()
        torch.testing.assert_close(distance, torch.full((2,), 0.0 if level == "coefficients" else 0.2), rtol=1e-4, atol=1e-6)
        assert (draws == notes[at - 1][2]) == (level == "mask"), "one sample for both levels, another for the next step"


def test_the_reference_order_takes_the_inner_gradient_at_the_last_outer_point() -> None:
    """Its lambda is set back after the model was merged, and its Adam keeps its moments: stale from the second step on."""
    notes = spied(reference_order=True)
    inner = [numbers for level, numbers, _ in notes if level == "coefficients"]
    outer = [numbers for level, numbers, _ in notes if level == "mask"]
    assert torch.equal(inner[0], torch.full((2,), START))
    assert torch.equal(inner[1], outer[0])
    assert torch.equal(inner[2], outer[1])
    torch.testing.assert_close((outer[0] - START).abs(), torch.full((2,), 0.2), rtol=1e-4, atol=1e-6)


def test_the_coefficients_start_anew_after_the_mask() -> None:
    model = make(learn_coefficients="task")
    trainer(model, coefficient_steps=0).train()
    assert torch.equal(lambdas(model)[0], torch.full((2,), START))


def test_batches_of_several_backward_passes_are_averaged() -> None:
    """Two batches of each task at once move lambda as their mean gradient does."""
    found = []
    for accumulation in (1, 2):
        model = make(AtlasConfig, granularity="task", init=START)
        run = trainer(model, accumulation=accumulation)
        run._backward(run.coefficients)
        (gradient,) = (tensor.grad for tensor in run.coefficients)
        found.append((gradient, run))
    run = found[0][1]
    run._backward(run.coefficients)
    second = run.coefficients[0].grad
    torch.testing.assert_close(found[1][0], (found[0][0] + second) / 2)


# Selection ---------------------------------------------------------------------------------------------------------------


def test_the_lowest_entropy_is_left_in_the_model() -> None:
    model = make(AtlasConfig, granularity="task", init=START)
    run = trainer(model, coefficient_lr=3.0, coefficient_steps=12)  # so large that it wanders
    history = run.train()
    best = min(history, key=lambda look: look.mean)
    run._look(run.coefficients)
    assert run.history[-1].mean == pytest.approx(best.mean, rel=1e-6)
    last = make(AtlasConfig, granularity="task", init=START)
    again = trainer(last, coefficient_lr=3.0, coefficient_steps=12, select="last")
    assert again.train()[-1].mean == history[-1].mean
    again._look(again.coefficients)
    assert again.history[-1].mean == pytest.approx(history[-1].mean, rel=1e-6)


def test_the_best_metric_is_left_in_the_model(tmp_path: Path) -> None:
    """What `evaluate` says goes before the loss, also where a run goes on; it must be there, and say something."""
    scores = [0.1, 0.3, 0.8, 0.2, 0.4, 0.6, 0.5]

    def learned(steps: int, resume: bool = False) -> tuple[Any, MergeTrainer]:
        model = make(AtlasConfig, granularity="task", init=START)
        given = MergeArguments(
            coefficient_steps=steps, coefficient_lr=0.05, eval_every=2, select="metric", output_dir=str(tmp_path), save_every=2
        )
        torch.manual_seed(7)
        run = MergeTrainer(model, tasks(), given, evaluate=lambda _: {"score": scores[len(run.history)]})
        run.train(resume=resume)
        return model, run

    torch.manual_seed(7)
    at_best, early = learned(4)
    expected = lambdas(at_best)
    assert early.selected.step == 4
    shutil.rmtree(tmp_path)
    learned(8)
    model, run = learned(12, resume=True)
    assert (run.selected.step, run.selected.metrics) == (4, {"score": 0.8})
    assert run.selected.mean > min(look.mean for look in run.history)
    assert all(torch.equal(*pair) for pair in zip(lambdas(model), expected, strict=True))
    with pytest.raises(ValueError, match="select='metric' needs evaluate="):
        trainer(make(AtlasConfig, init=START), select="metric")
    with pytest.raises(ValueError, match=r"evaluate returned \{\}; one or more finite numbers"):
        MergeTrainer(make(AtlasConfig, init=START), tasks(), MergeArguments(select="metric"), evaluate=lambda _: {}).train()


def test_a_phase_ends_when_it_does_not_get_better() -> None:
    model = make(AtlasConfig, granularity="task", init=START)
    history = trainer(model, coefficient_lr=0.0, coefficient_steps=100, patience=2).train()
    assert [look.step for look in history] == [0, 2, 4]


# Going on ----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("at", [3, 9], ids=["in the mask", "in the coefficients"])
def test_a_run_that_goes_on_ends_with_the_same_bits(at: int, reference: bool, tmp_path: Path) -> None:
    fields = {"reference_order": reference, "save_every": 2, "mask_steps": 7, "coefficient_steps": 7}
    whole = make(learn_coefficients="layer")
    expected = trainer(whole, **fields).train()

    broken = trainer(make(learn_coefficients="layer"), **fields, output_dir=str(tmp_path))
    apply, steps = broken._apply, iter(range(1000))

    def dies(optimizer: Any) -> None:
        inner = len(broken.masks) and optimizer.optimizer.param_groups[0]["params"][0].numel() == 2
        if not (inner and broken._phase == "mask") and next(steps) == at:
            raise Stop
        apply(optimizer)

    broken._apply = dies  # type: ignore[method-assign]
    with pytest.raises(Stop):
        broken.train()
    model = make(learn_coefficients="layer")
    found = trainer(model, **fields, output_dir=str(tmp_path)).train(resume=True)
    assert found == expected
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    assert [look["step"] for look in json.loads((tmp_path / "history.json").read_text())] == [look.step for look in expected]


def test_going_on_needs_a_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume=True needs `output_dir`"):
        trainer(make()).train(resume=True)
    trainer(make(), output_dir=str(tmp_path), save_every=2).train(resume=True)  # there is none: from the start
    said = r"written with other arguments: mask_lr \(0.1 there, 0.5 here\), seed \(0 there, 3 here\)"
    with pytest.raises(ValueError, match=said):
        trainer(make(), output_dir=str(tmp_path), mask_lr=0.5, seed=3).train(resume=True)
    for other in ({"granularity": "row"}, {"seed": 5}, {"coefficients": 0.9}, {"learn_coefficients": "task"}):
        with pytest.raises(ValueError, match="written with other arguments: adapter"):
            trainer(make(**other), output_dir=str(tmp_path)).train(resume=True)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # the process ended between two renames
    assert trainer(make(), output_dir=str(tmp_path), mask_steps=8).train(resume=True)[-1].step == 8


def test_batches_belong_to_a_seed_and_a_process() -> None:
    rows = torch.arange(12.0)

    def taken(seed: int, rank: int, world: int, count: int) -> list[list[float]]:
        stream = Stream(Task("t", DataLoader(rows, batch_size=2, shuffle=True), lambda m, x: x), seed, rank, world)  # type: ignore[arg-type]
        torch.manual_seed(rank)  # of the program: no matter
        return [stream.next().tolist() for _ in range(count)]

    one = taken(0, 0, 1, 8)
    assert sorted(x for batch in one[:6] for x in batch) == rows.tolist()
    assert one != taken(1, 0, 1, 8)
    assert taken(0, 0, 2, 4) == one[::2]
    assert taken(0, 1, 2, 4) == one[1::2]


# Models of other kinds ---------------------------------------------------------------------------------------------------


def test_answers_of_encoders_and_generative_models() -> None:
    classify = nn.Linear(4, 3)
    hidden, pooled = torch.randn(2, 5, 4), torch.randn(2, 4)

    def model(**batch: Any) -> Any:
        return SimpleNamespace(
            last_hidden_state=hidden, pooler_output=batch.get("pooled"), logits=torch.arange(30).view(2, 3, 5)
        )

    answer: Any = pooled_logits(classify)
    assert torch.equal(answer(model, {}), classify(hidden[:, 0]))
    assert torch.equal(answer(model, {"pooled": pooled}), classify(pooled))
    assert token_logits([4, 1])(model, {}).tolist() == [[14, 11], [29, 26]]  # type: ignore[arg-type]
    assert token_logits([0], position=0)(model, {}).tolist() == [[0], [15]]  # type: ignore[arg-type]


def test_a_generative_model_is_merged_by_the_entropy_of_its_answers() -> None:
    pico = MODELS["llama"]
    model: Any = get_peft_model(pico.model(), ConcreteConfig(pool=pool_of(pico), block_types=["linear"]))
    batch = {"input_ids": pico.batch()["input_ids"]}
    run = MergeTrainer(
        model, [Task("answers", [batch], token_logits([3, 5, 7]))],
        MergeArguments(mask_steps=20, mask_lr=0.3, eval_every=5), accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    history = run.train()
    assert history[0].mean <= math.log(3) + 1e-5
    assert min(look.mean for look in history) < history[0].mean


def test_mixed_precision() -> None:
    """The accelerator's autocast, in steps and looks."""
    expected = trainer(make(learn_coefficients="layer")).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")  # for those that follow
    found = trainer(make(learn_coefficients="layer")).train()
    assert found[0].mean == pytest.approx(expected[0].mean, rel=2e-2)
    assert found[0].mean != expected[0].mean
    assert found[-1].mean < found[0].mean


# What is refused -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_learned_is_said() -> None:
    with pytest.raises(ValueError, match="neither a mask nor coefficients that are trained"):
        MergeTrainer(make(train_mask=False), tasks(), accelerator=Accelerator(cpu=True))
    with pytest.raises(ValueError, match=r"tasks=\['a', 'a'\]"):
        MergeTrainer(make(), [Task("a", [], lambda m, x: x)] * 2, accelerator=Accelerator(cpu=True))
    with pytest.raises(ValueError, match="tasks=\\[\\]"):
        MergeTrainer(make(), [], accelerator=Accelerator(cpu=True))
    with pytest.raises(ValueError, match=r"select='first' is not known\. Accepted: 'best', 'metric', 'last'"):
        MergeArguments(select="first")  # type: ignore[arg-type]
    for wrong in ({"eval_every": 0}, {"patience": 0}, {"mask_steps": -1}, {"mask_lr": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MergeArguments(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no adapter 'default ', only \['default'\]"):
        MergeTrainer(make(), tasks(), accelerator=Accelerator(cpu=True), adapter_name="default ")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        MergeTrainer(make(), tasks(), accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4))


def test_a_task_without_batches_and_an_entropy_that_is_not_finite_are_named() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="The task 'quiet' has no batches"):
        MergeTrainer(make(), [Task("quiet", [], lambda m, x: x)], MergeArguments(), accelerator=accelerator)
    with pytest.raises(ValueError, match="batches of task 'once' can be gone through only once"):
        MergeTrainer(make(), [Task("once", iter([PICO.batch()["x"]]), lambda m, x: m(x))], accelerator=accelerator)
    broken = Task("broken", [PICO.batch()["x"]], lambda model, x: model(x) * math.nan)
    with pytest.raises(ValueError, match="entropy of task 'broken' is not finite at mask step 0"):
        MergeTrainer(make(), [broken], MergeArguments(), accelerator=accelerator).train()
