"""Learned merges on real weights, three seeds: AdaMerging, Concrete and supervised aTLAS against averages and TIES.

    python benchmarks/merge_tasks.py train --kinds full     # MiniLM on the text tasks
    python benchmarks/learned_merging.py                    # the ViT on the image tasks, then every merge; can be interrupted
    python benchmarks/learned_merging.py --report           # the table and the picture of what has run

Whole encoders are merged, each task keeps the head of its own model. Lambda of task arithmetic and TIES is 0.3, as the paper
has it, and for "searched" the best of a grid on 100 labelled rows that no test sees. AdaMerging and Concrete minimise the
entropy of unlabelled batches of the test rows, the paper's protocol; aTLAS the cross-entropy of 200 labelled rows of each task.
All learn in `STEPS` steps, with rates that move a logit and a coefficient about as far as the paper's do in 2,000 and 1,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.quality import batches, rows
from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.training import MergeArguments, MergeTrainer, Task, pooled_logits
from peft_subspace.training.objectives import addition_loss

TASKS = {"text": ("trec", "sms-spam", "newsgroups", "spam-assassin"), "image": ("digits", "mnist", "fashion-mnist")}
ASSET = {"text": "minilm", "image": "vit-small"}
BATCH = {"text": 4, "image": 8}
LAMBDA, GRID, STEPS, MASK_RATE, COEFFICIENT_RATE = 0.3, (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5), 40, 0.003, 0.005


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
                    right += int((pooled_logits(head)(model, inputs).argmax(1) == batch["labels"]).sum())
            found[name] = right / len(data["labels"])
        return found

    def shuffled(self, name: str, part: str, seed: int) -> Any:
        """Endless batches of a task."""
        data, generator = self.data[name][part], torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data["labels"]), generator=generator)
            for chosen in order.split(BATCH[self.kind]):
                yield next(iter(batches({key: value[chosen] for key, value in data.items()}, torch.arange(len(chosen)))))


class Unlabelled:
    """Batches of a task's test rows without labels, gone through again and again."""

    def __init__(self, suite: Suite, name: str) -> None:
        self.suite, self.name = suite, name

    def __iter__(self) -> Any:
        data = self.suite.data[self.name]["test"]
        order = torch.randperm(len(data["labels"]))
        for chosen in order.split(BATCH[self.suite.kind]):
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


def suite_of(kind: str, seed: int, folder: Path) -> Suite:
    """Open the text models of merge_tasks.py, or train the ViT once."""
    base = folder / ("base" if kind == "text" else "base-image")
    if not base.exists():
        AutoModel.from_pretrained(assets.model_path(ASSET[kind])).save_pretrained(folder / ".part")
        (folder / ".part").rename(base)
    encoders, heads = {}, {}
    for name in TASKS[kind]:
        path = folder / f"full-{name}-{seed}"
        if not path.exists():
            if kind == "text":
                raise SystemExit(f"{path} is missing: run `python benchmarks/merge_tasks.py train --kinds full` first")
            train_image_model(name, base, seed, path)
        state = load_file(path / "head.safetensors")
        head = nn.Linear(*reversed(state["weight"].shape))
        head.load_state_dict(state)
        encoders[name], heads[name] = path / "encoder", head.eval().requires_grad_(False)
    return Suite(kind, base, encoders, heads, {name: parts_of(name)[0] for name in TASKS[kind]})


def train_image_model(name: str, base: Path, seed: int, path: Path) -> None:
    """Fine-tune the ViT and a new head, whole, three epochs over 960 rows."""
    parts, classes = parts_of(name)
    torch.manual_seed(seed)
    encoder, head = AutoModel.from_pretrained(base).train(), nn.Linear(384, classes)
    groups = [{"params": encoder.parameters(), "lr": 5e-5}, {"params": head.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for _ in range(3):
        for batch in batches(parts["train"], torch.randperm(len(parts["train"]["labels"]))):
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(pooled_logits(head)(encoder, batch).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    partial = path.with_name(f".{path.name}")
    encoder.save_pretrained(partial / "encoder")
    save_file(dict(head.state_dict()), partial / "head.safetensors")
    partial.rename(path)


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


def by_entropy(suite: Suite, seed: int, config: Any) -> dict[str, Any]:
    """AdaMerging or Concrete."""
    torch.manual_seed(seed)
    model = get_peft_model(suite.model(), config)
    tasks = [Task(name, Unlabelled(suite, name), pooled_logits(head)) for name, head in suite.heads.items()]
    arguments = MergeArguments(
        mask_steps=STEPS, mask_lr=MASK_RATE, coefficient_steps=STEPS, coefficient_lr=COEFFICIENT_RATE, eval_every=10, seed=seed
    )
    trainer = MergeTrainer(model, tasks, arguments, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    history = trainer.train()
    looks = [{"phase": look.phase, "step": look.step, "entropy": round(look.mean, 4)} for look in history]
    return {"accuracy": suite.accuracies(model), "history": looks}


def by_labels(suite: Suite, seed: int, config: Any) -> dict[str, Any]:
    """aTLAS: the coefficients that lower the cross-entropy of all tasks."""
    torch.manual_seed(seed)
    model = get_peft_model(suite.model(), config).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=COEFFICIENT_RATE)
    streams = {name: suite.shuffled(name, "labelled", seed) for name in suite.heads}
    for _ in range(STEPS):
        optimizer.zero_grad()
        for name, head in suite.heads.items():
            batch = next(streams[name])
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits = pooled_logits(head)(model, batch)
            addition_loss([(logits, labels)]).backward()
        optimizer.step()
    return {"accuracy": suite.accuracies(model)}


def atlas(suite: Suite, granularity: str, start: float = LAMBDA) -> AtlasConfig:
    """One coefficient for each vector, or for each vector and parameter."""
    return AtlasConfig(pool=suite.pool, granularity=granularity, init=start)


def concrete(suite: Suite, seed: int, learned: Any) -> ConcreteConfig:
    """The paper's settings."""
    return ConcreteConfig(pool=suite.pool, coefficients=LAMBDA, learn_coefficients=learned, seed=seed, save_mask="float32")


METHODS: dict[str, Callable[[Suite, int], dict[str, Any]]] = {
    "single-task models": lambda suite, seed: individual(suite),
    "base": lambda suite, seed: {"accuracy": suite.accuracies(suite.model())},
    "average": lambda suite, seed: fixed(suite, 1 / len(suite.heads)),
    "task arithmetic, 0.3": lambda suite, seed: fixed(suite, LAMBDA),
    "task arithmetic, searched": lambda suite, seed: fixed(suite, None, search=True),
    "TIES, 0.3": lambda suite, seed: fixed(suite, LAMBDA, "ties"),
    "TIES, searched": lambda suite, seed: fixed(suite, None, "ties", search=True),
    "AdaMerging, task": lambda suite, seed: by_entropy(suite, seed, atlas(suite, "task")),
    "AdaMerging, layer": lambda suite, seed: by_entropy(suite, seed, atlas(suite, "block")),
    "Concrete TA": lambda suite, seed: by_entropy(suite, seed, concrete(suite, seed, None)),
    "Concrete AM, task": lambda suite, seed: by_entropy(suite, seed, concrete(suite, seed, "task")),
    "Concrete AM, layer": lambda suite, seed: by_entropy(suite, seed, concrete(suite, seed, "layer")),
    "aTLAS, isotropic (labels)": lambda suite, seed: by_labels(suite, seed, atlas(suite, "task")),
    "aTLAS, anisotropic (labels)": lambda suite, seed: by_labels(suite, seed, atlas(suite, "block")),
}


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
    for method in METHODS:
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
        names = [m for m in METHODS if any(key[:2] == (kind, m) for key in runs)]
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
    parser.add_argument("--folder", type=Path, default=Path("outputs/merge-tasks"), help="where the single-task models are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kinds", nargs="+", default=["image", "text"], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = options.output / "learned-merging-runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = {(run["kind"], run["method"], run["seed"]): run for run in map(json.loads, lines)}
    for kind in [] if options.report else options.kinds:
        for seed in options.seeds:
            suite = suite_of(kind, seed, options.folder)
            for name in [name for name in METHODS if (kind, name, seed) not in runs]:
                start = time.process_time()
                run = {"kind": kind, "method": name, "seed": seed, **METHODS[name](suite, seed)}
                run["cpu_s"] = round(time.process_time() - start, 1)
                with path.open("a") as sink:
                    sink.write(json.dumps(run) + "\n")
                runs[kind, name, seed] = run
                print(f"{kind} {seed} {name}: {mean_of(run):.1f} in {run['cpu_s']} s", file=sys.stderr, flush=True)
    report(runs, options.output)


if __name__ == "__main__":
    main()
