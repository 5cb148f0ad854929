"""Learned merges on real weights, three seeds: AdaMerging, Concrete and supervised aTLAS against averages and TIES.

    python benchmarks/learned_merging.py                    # models, sweep of the rates, every merge; can be interrupted
    python benchmarks/learned_merging.py --further          # besides: ten times the steps; chosen looks; information
    python benchmarks/learned_merging.py --report           # the table and the picture of what has run

The papers' models are CLIP's, with zero-shot heads that are given and fixed. Likewise each task here has a head that is not
learned: the mean features of four rows of each class, as the base sees them. The encoder (its embeddings excepted) is
fine-tuned under that head, whole encoders are merged, and each task keeps its head. Lambda of task arithmetic and TIES is
0.3, as the paper has it, and for "searched" the best of a grid on 100 labelled rows that no test sees. AdaMerging and
Concrete minimise the entropy of unlabelled batches of the test rows, the paper's protocol; aTLAS the cross-entropy of 200
labelled rows of each task. All learn in `STEPS` steps. Rates are chosen on those 100 rows, with models of another seed that no
table has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import assets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.quality import batches, rows
from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.training import MergeArguments, MergeTrainer, Task
from peft_subspace.training.objectives import addition_loss, entropy_loss, information_maximization_loss

TASKS = {"text": ("trec", "sms-spam", "newsgroups", "spam-assassin"), "image": ("digits", "mnist", "fashion-mnist")}
ASSET = {"text": "minilm", "image": "vit-small"}
FINE_TUNING = {"text": (5e-5, 2), "image": (2e-5, 2)}  # rate of the encoder, epochs over 960 rows
BATCH = 8
SHOTS, SCALES = 4, (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
LAMBDA, GRID, STEPS, LONG = 0.3, (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5), 40, 400
TUNED = ["linear", "norm", "bias", "other"]  # the embeddings have no difference
SWEEP_SEED = 100  # models and draws that the rates are chosen with
MASK_RATES, COEFFICIENT_RATES = (0.003, 0.01, 0.03), (0.003, 0.01, 0.03)


@dataclass
class Suite:
    """The single-task models of one kind and seed, and their rows."""

    kind: str
    base: Path
    encoders: dict[str, Path]
    heads: dict[str, nn.Module]
    data: dict[str, dict[str, dict[str, Tensor]]]

    @property
    def pool(self) -> dict[str, Any]:
        """For a config."""
        return {name: {"path": str(path), "base": str(self.base)} for name, path in self.encoders.items()}

    def model(self) -> Any:
        """The base's encoder."""
        return AutoModel.from_pretrained(self.base).eval()

    @torch.no_grad()
    def accuracies(self, model: Any, part: str = "test") -> dict[str, float]:
        """Task -> share of its rows that are right; in bfloat16."""
        found = {}
        model.eval()
        for name, head in self.heads.items():
            data = self.data[name][part]
            right = 0
            for batch in batches(data, torch.arange(len(data["labels"]))):
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                with torch.autocast("cpu", torch.bfloat16):
                    right += int((answers(head)(model, inputs).argmax(1) == batch["labels"]).sum())
            found[name] = right / len(data["labels"])
        return found

    def shuffled(self, name: str, part: str, seed: int) -> Any:
        """Endless batches of a task."""
        data, generator = self.data[name][part], torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data["labels"]), generator=generator)
            for chosen in order.split(BATCH):
                yield next(iter(batches({key: value[chosen] for key, value in data.items()}, torch.arange(len(chosen)))))


class Unlabelled:
    """Batches of a task's test rows without labels, gone through again and again."""

    def __init__(self, suite: Suite, name: str) -> None:
        self.suite, self.name = suite, name

    def __iter__(self) -> Any:
        data = self.suite.data[self.name]["test"]
        order = torch.randperm(len(data["labels"]))
        for chosen in order.split(BATCH):
            (batch,) = batches({k: v[chosen] for k, v in data.items() if k != "labels"}, torch.arange(len(chosen)))
            yield batch


@cache
def parts_of(name: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Rows of a task: to train on, labelled for aTLAS, to search lambda on, to test on."""
    parts, classes = rows(name)
    held = parts["held"]
    parts["labelled"] = {key: value[:200] for key, value in held.items()}
    parts["search"] = {key: value[200:] for key, value in held.items()}
    return parts, classes


def features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a head reads `[b, d]`: the mean of a text's tokens, an image's class token."""
    hidden: Tensor = model(**inputs).last_hidden_state
    if "attention_mask" not in inputs:
        return hidden[:, 0]
    mask = inputs["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


class Prototypes(nn.Module):
    """A head that is given, not learned: logits c cos(f - m, c_k) of a row's features f.

    c_k is the mean feature of `SHOTS` rows of class k, as the base sees them, less the mean m of all of them; c is the one of
    `SCALES` with which the base's answers fit the training rows best, so that its probabilities mean something.
    """

    def __init__(self, mean: Tensor, classes: Tensor) -> None:
        super().__init__()
        self.scale = 1.0
        self.register_buffer("mean", mean)
        self.register_buffer("classes", classes)

    def forward(self, found: Tensor) -> Tensor:
        return self.scale * F.normalize(found - self.mean, dim=-1) @ F.normalize(self.classes - self.mean, dim=-1).t()


def answers(head: nn.Module) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """Logits of a task, for `Task`."""
    return lambda model, inputs: head(features(model, inputs))


@torch.no_grad()
def prototypes(model: nn.Module, name: str) -> Prototypes:
    """The head of a task."""
    parts, classes = parts_of(name)
    labels = parts["train"]["labels"]
    rows = [
        features(model, {key: value for key, value in batch.items() if key != "labels"})
        for batch in batches(parts["train"], torch.arange(len(labels)))
    ]
    found = torch.cat(rows)
    means = torch.stack([found[(labels == label).nonzero()[:SHOTS, 0]].mean(0) for label in range(classes)])
    head = Prototypes(means.mean(0), means)
    answered = head(found)
    head.scale = min(SCALES, key=lambda scale: float(F.cross_entropy(scale * answered, labels)))
    return head


def fine_tune(kind: str, name: str, head: nn.Module, base: Path, seed: int, path: Path) -> None:
    """Fine-tune the encoder under a fixed head; embeddings and pooler stay the base's."""
    parts, _ = parts_of(name)
    rate, epochs = FINE_TUNING[kind]
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(base).train()
    for part, parameter in encoder.named_parameters():
        parameter.requires_grad_(not part.startswith(("embeddings", "pooler")))
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(epochs):
        for batch in batches(parts["train"], torch.randperm(len(parts["train"]["labels"]))):
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(answers(head)(encoder, batch).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    unfinished = path.with_name(f".{path.name}")
    encoder.save_pretrained(unfinished)
    unfinished.rename(path)


def suite_of(kind: str, seed: int, folder: Path) -> Suite:
    """Open the base, the heads and the single-task encoders, or make them once."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"base-{kind}"
    if not base.exists():
        AutoModel.from_pretrained(assets.model_path(ASSET[kind])).save_pretrained(folder / f".base-{kind}")
        (folder / f".base-{kind}").rename(base)
    encoders, heads = {}, {}
    for name in TASKS[kind]:
        heads[name] = prototypes(AutoModel.from_pretrained(base).eval(), name)
        encoders[name] = folder / f"{name}-{seed}"
        if not encoders[name].exists():
            fine_tune(kind, name, heads[name], base, seed, encoders[name])
    return Suite(kind, base, encoders, heads, {name: parts_of(name)[0] for name in TASKS[kind]})


@dataclass
class Rates:
    """Learning rates of logits, of coefficients without labels, and of coefficients with labels."""

    mask: float = 0.0
    coefficient: float = 0.0
    labelled: float = 0.0


# Merges ------------------------------------------------------------------------------------------------------------------


def fixed(suite: Suite, weights: float | None, method: str = "task_arithmetic", search: bool = False) -> dict[str, Any]:
    """Merge by a formula; `search` chooses its lambda on labelled rows."""
    base = suite.model()
    theta = dict(base.named_parameters())
    deltas = []
    for path in suite.encoders.values():
        tuned = dict(AutoModel.from_pretrained(path).named_parameters())
        deltas.append({name: (tuned[name] - value).detach() for name, value in theta.items()})
    merged: dict[str, Tensor] = {}
    for name, value in theta.items():
        options = {"density": 0.2, "normalize": True} if method == "ties" else {}
        given = {"are_deltas": True, "as_delta": True, "options": options}
        semantics: Any = "paper" if method == "ties" else "mergekit"
        merged[name] = merge_tensors(method, value.detach(), [d[name] for d in deltas], semantics=semantics, **given)

    def at(factor: float) -> nn.Module:
        model = suite.model()
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(merged[name], alpha=factor)
        return model

    chosen = weights
    if search:
        scores = {factor: statistics.mean(suite.accuracies(at(factor), "search").values()) for factor in GRID}
        chosen = max(scores, key=lambda factor: scores[factor])
    assert chosen is not None
    return {"lambda": chosen, "accuracy": suite.accuracies(at(chosen))}


def individual(suite: Suite) -> dict[str, Any]:
    """Every task by its own model: the upper bound."""
    found = {}
    for name, path in suite.encoders.items():
        found[name] = suite.accuracies(AutoModel.from_pretrained(path))[name]
    return {"accuracy": found}


def by_entropy(
    suite: Suite,
    seed: int,
    config: Any,
    rates: Rates,
    part: str = "test",
    steps: int = STEPS,
    labelled: bool = False,
    objective: Callable[[Tensor], Tensor] = entropy_loss,
) -> dict[str, Any]:
    """AdaMerging or Concrete; the look with the lowest loss, or with the highest accuracy on the 100 labelled rows."""
    torch.manual_seed(seed)
    model = get_peft_model(suite.model(), config)
    tasks = [Task(name, Unlabelled(suite, name), answers(head), objective=objective) for name, head in suite.heads.items()]
    arguments = MergeArguments(
        mask_steps=steps,
        mask_lr=rates.mask,
        coefficient_steps=steps,
        coefficient_lr=rates.coefficient,
        eval_every=steps // 4,
        select="metric" if labelled else "best",
        seed=seed,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    evaluate = partial(suite.accuracies, part="search") if labelled else None
    trainer = MergeTrainer(model, tasks, arguments, evaluate=evaluate, accelerator=accelerator)
    history = trainer.train()
    looks = [{"phase": look.phase, "step": look.step, look.measure: round(look.mean, 4)} for look in history]
    return {"accuracy": suite.accuracies(model, part), "history": looks}


def by_information(suite: Suite, seed: int, config: Any, rates: Rates, steps: int = STEPS) -> dict[str, Any]:
    """The same with the entropy of the mean answer taken off the loss, at the rates that were chosen for entropy."""
    return by_entropy(suite, seed, config, rates, steps=steps, objective=information_maximization_loss)


def by_labels(suite: Suite, seed: int, config: Any, rate: float, part: str = "test") -> dict[str, Any]:
    """aTLAS: the coefficients that lower the cross-entropy of all tasks."""
    torch.manual_seed(seed)
    model = get_peft_model(suite.model(), config).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    streams = {name: suite.shuffled(name, "labelled", seed) for name in suite.heads}
    for _ in range(STEPS):
        optimizer.zero_grad()
        for name, head in suite.heads.items():
            batch = next(streams[name])
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits = answers(head)(model, batch)
            addition_loss([(logits, labels)]).backward()
        optimizer.step()
    return {"accuracy": suite.accuracies(model, part)}


def atlas(suite: Suite, granularity: str, start: float = LAMBDA) -> AtlasConfig:
    """One coefficient for each vector, or for each vector and parameter."""
    return AtlasConfig(pool=suite.pool, granularity=granularity, init=start, block_types=TUNED)


def concrete(suite: Suite, seed: int, learned: Any) -> ConcreteConfig:
    """The paper's settings."""
    return ConcreteConfig(
        pool=suite.pool, coefficients=LAMBDA, learn_coefficients=learned, seed=seed, save_mask="float32", block_types=TUNED
    )


METHODS: dict[str, Callable[[Suite, int, Rates], dict[str, Any]]] = {
    "single-task models": lambda suite, seed, rates: individual(suite),
    "base": lambda suite, seed, rates: {"accuracy": suite.accuracies(suite.model())},
    "average": lambda suite, seed, rates: fixed(suite, 1 / len(suite.heads)),
    "task arithmetic, 0.3": lambda suite, seed, rates: fixed(suite, LAMBDA),
    "task arithmetic, searched": lambda suite, seed, rates: fixed(suite, None, search=True),
    "TIES, 0.3": lambda suite, seed, rates: fixed(suite, LAMBDA, "ties"),
    "TIES, searched": lambda suite, seed, rates: fixed(suite, None, "ties", search=True),
    "AdaMerging, task": lambda suite, seed, rates: by_entropy(suite, seed, atlas(suite, "task"), rates),
    "AdaMerging, layer": lambda suite, seed, rates: by_entropy(suite, seed, atlas(suite, "block"), rates),
    "Concrete TA": lambda suite, seed, rates: by_entropy(suite, seed, concrete(suite, seed, None), rates),
    "Concrete AM, task": lambda suite, seed, rates: by_entropy(suite, seed, concrete(suite, seed, "task"), rates),
    "Concrete AM, layer": lambda suite, seed, rates: by_entropy(suite, seed, concrete(suite, seed, "layer"), rates),
    "aTLAS, isotropic (labels)": lambda suite, seed, rates: by_labels(suite, seed, atlas(suite, "task"), rates.labelled),
    "aTLAS, anisotropic (labels)": lambda suite, seed, rates: by_labels(suite, seed, atlas(suite, "block"), rates.labelled),
}
FURTHER: dict[str, Callable[[Suite, int, Rates], dict[str, Any]]] = {
    f"Concrete TA, {LONG} steps": lambda s, seed, rates: by_entropy(s, seed, concrete(s, seed, None), rates, steps=LONG),
    f"AdaMerging, layer, {LONG} steps": lambda s, seed, rates: by_entropy(s, seed, atlas(s, "block"), rates, steps=LONG),
    "AdaMerging, layer, chosen look": lambda s, seed, rates: by_entropy(s, seed, atlas(s, "block"), rates, labelled=True),
    "Concrete AM, layer, chosen look": lambda s, seed, rates: by_entropy(
        s, seed, concrete(s, seed, "layer"), rates, labelled=True
    ),
    "AdaMerging, layer, information": lambda s, seed, rates: by_information(s, seed, atlas(s, "block"), rates),
    "Concrete TA, information": lambda s, seed, rates: by_information(s, seed, concrete(s, seed, None), rates),
    "Concrete AM, layer, information": lambda s, seed, rates: by_information(s, seed, concrete(s, seed, "layer"), rates),
    f"Concrete TA, information, {LONG} steps": lambda s, seed, rates: by_information(
        s, seed, concrete(s, seed, None), rates, steps=LONG
    ),
}


# Rates -------------------------------------------------------------------------------------------------------------------


def trial(suite: Suite, what: str, rate: float) -> dict[str, Any]:
    """One rate of one kind, judged by the 100 labelled rows."""
    if what == "mask":
        return by_entropy(suite, SWEEP_SEED, concrete(suite, SWEEP_SEED, None), Rates(mask=rate), "search")
    if what == "coefficient":
        return by_entropy(suite, SWEEP_SEED, atlas(suite, "block"), Rates(coefficient=rate), "search")
    return by_labels(suite, SWEEP_SEED, atlas(suite, "block"), rate, "search")


def chosen_rates(kind: str, runs: Mapping[tuple[str, str, int], Any]) -> Rates:
    """The best rate of each kind out of the sweep."""
    best = {}
    for what, tried in (("mask", MASK_RATES), ("coefficient", COEFFICIENT_RATES), ("labelled", COEFFICIENT_RATES)):
        best[what] = max(tried, key=lambda rate: mean_of(runs[kind, f"sweep: {what} {rate}", SWEEP_SEED]))
    return Rates(**best)


# Results -----------------------------------------------------------------------------------------------------------------


def mean_of(run: Mapping[str, Any]) -> float:
    """Mean accuracy over the tasks, in percent."""
    return 100 * statistics.mean(run["accuracy"].values())


def report(runs: dict[tuple[str, str, int], Any], output: Path) -> None:
    """The table on the terminal, and the picture."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in TASKS if any(key[0] == kind for key in runs)]
    view = Table("method", *(f"{kind}: mean accuracy" for kind in kinds), *(name for kind in kinds for name in TASKS[kind]))
    figure = Figure(figsize=(10, 4.2))
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for method in [*METHODS, *FURTHER]:
        cells, single = [], []
        for kind in kinds:
            found = [runs[key] for seed in range(10) if (key := (kind, method, seed)) in runs]
            means = [mean_of(run) for run in found]
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells.append(f"{statistics.mean(means):.1f}{spread} [{len(means)}]" if means else "-")
            for name in TASKS[kind]:
                single.append(f"{100 * statistics.mean(run['accuracy'][name] for run in found):.1f}" if found else "-")
        view.add_row(method, *cells, *single)
    for place, kind in zip(axes, kinds, strict=True):
        names = [m for m in [*METHODS, *FURTHER] if any(key[:2] == (kind, m) for key in runs)]
        values = [[mean_of(runs[key]) for seed in range(10) if (key := (kind, m, seed)) in runs] for m in names]
        place.barh(names[::-1], [statistics.mean(v) for v in values][::-1], color="#7a9cc6")
        for at, found in enumerate(values[::-1]):
            place.plot(found, [at] * len(found), "k.", markersize=4)
        place.set_title(f"{kind} tasks")
        place.set_xlabel("mean accuracy, %")
    figure.tight_layout()
    figure.savefig(output / "learned-merging.png", dpi=120)
    Console(width=220).print(view)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/learned-merging"), help="where the single-task models are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--kinds", nargs="+", default=["image", "text"], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--further", action="store_true", help=f"also {', '.join(FURTHER)}")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = options.output / "learned-merging-runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = {(run["kind"], run["method"], run["seed"]): run for run in map(json.loads, lines)}

    def run(kind: str, method: str, seed: int, work: Callable[[], dict[str, Any]]) -> None:
        if (kind, method, seed) in runs:
            return
        start = time.process_time()
        found = {"kind": kind, "method": method, "seed": seed, **work()}
        found["cpu_s"] = round(time.process_time() - start, 1)
        with path.open("a") as sink:
            sink.write(json.dumps(found) + "\n")
        runs[kind, method, seed] = found
        print(f"{kind} {seed} {method}: {mean_of(found):.1f} in {found['cpu_s']} s", file=sys.stderr, flush=True)

    for kind in [] if options.report else options.kinds:
        suite = suite_of(kind, SWEEP_SEED, options.folder)
        for what, tried in (("mask", MASK_RATES), ("coefficient", COEFFICIENT_RATES), ("labelled", COEFFICIENT_RATES)):
            for rate in tried:
                run(kind, f"sweep: {what} {rate}", SWEEP_SEED, partial(trial, suite, what, rate))
        rates = chosen_rates(kind, runs)
        for seed in options.seeds:
            suite = suite_of(kind, seed, options.folder)
            for name, method in {**METHODS, **(FURTHER if options.further else {})}.items():
                if options.only and name not in options.only:
                    continue
                run(kind, name, seed, partial(method, suite, seed, rates))
    report(runs, options.output)


if __name__ == "__main__":
    main()
