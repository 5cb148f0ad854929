"""A real merge: MiniLM fine-tuned on five text tasks, whole and by adapters, merged by every method, three seeds.

    python benchmarks/merge_tasks.py train       # the single-task models; goes on where it was interrupted
    python benchmarks/merge_tasks.py merge       # every method, its lambda chosen on held-out rows; goes on likewise
    python benchmarks/merge_tasks.py report      # the tables, the order of the methods seed by seed, the picture

Each task keeps the head of its own single-task model; the encoder is merged. The score is a merged model's accuracy on a
task's test rows over that of the single-task model. A merge is two recipes of `peft-subspace merge` on the files that
`save_pretrained` wrote: the first makes the merged task vector by the method, the second adds lambda times that file to the
base, and what transformers loads from its folder is tested. Lambda is the best of a grid by the mean score on held-out rows
that no model was trained on; for "average" and the base it is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from benchmarks import merge_tasks_report as reporting
from benchmarks.merge_tasks_models import (
    KINDS,
    ROWS,
    TASKS,
    Task,
    fisher_information,
    gram_matrices,
    load_task,
    new_model,
    single_task_model,
)
from benchmarks.merge_tasks_scores import Scorer, State, best_lambda
from peft_subspace.cli import run as peft_subspace
from peft_subspace.merging.methods.emr import modulators
from peft_subspace.task_vectors.task_vector import TaskVector

MASKS = "EMR, masks for each task"
WEIGHTLESS = ("slerp", "model_stock", "sce", "emr")

# name in the tables -> (method, parameters, semantics)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "average": ("linear", {}, "mergekit"),
    "task arithmetic": ("task_arithmetic", {}, "mergekit"),
    "TIES 0.2 (mergekit)": ("ties", {"density": 0.2}, "mergekit"),
    "TIES 0.2 (paper)": ("ties", {"density": 0.2}, "paper"),
    "DARE-TIES 0.2": ("dare_ties", {"density": 0.2}, "mergekit"),
    "KnOTS-TIES 0.2": ("knots", {"density": 0.2}, "mergekit"),
    "TSV-M": ("tsv_m", {}, "mergekit"),
    "Iso-C": ("iso_c", {}, "mergekit"),
    "magnitude prune 0.2": ("magnitude_prune", {"density": 0.2}, "mergekit"),
    "DELLA-TIES 0.3": ("della", {"density": 0.3, "epsilon": 0.15}, "mergekit"),
    "breadcrumbs-TIES 0.9": ("breadcrumbs_ties", {"density": 0.9, "gamma": 0.01}, "mergekit"),
    "EMR, unified only": ("emr", {}, "mergekit"),
    MASKS: ("emr", {}, "mergekit"),
    "TIES 0.2, summed": ("ties", {"density": 0.2, "normalize": False}, "mergekit"),
    "DARE 0.2": ("dare_linear", {"density": 0.2}, "mergekit"),
    "DELLA 0.3": ("della_linear", {"density": 0.3, "epsilon": 0.15}, "mergekit"),
    "breadcrumbs 0.9": ("breadcrumbs", {"density": 0.9, "gamma": 0.01}, "mergekit"),
    "slerp, one by one": ("slerp", {}, "mergekit"),
    "nuslerp, one by one": ("nuslerp", {}, "mergekit"),
    "multislerp": ("multislerp", {}, "mergekit"),
    "karcher": ("karcher", {}, "mergekit"),
    "model stock": ("model_stock", {}, "mergekit"),
    "SCE 0.2": ("sce", {"select_topk": 0.2}, "mergekit"),
    "Iso-CTS": ("iso_cts", {}, "mergekit"),
    "Fisher": ("fisher", {}, "mergekit"),
    "RegMean": ("regmean", {}, "mergekit"),
}


def merge_files(recipe: dict[str, Any], out: Path) -> Path:
    """Run `peft-subspace merge` on a recipe.

    Raises:
        RuntimeError: it did not end with exit code 0.
    """
    shutil.rmtree(out, ignore_errors=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    code = peft_subspace(["merge", str(path), str(out), "--threads", "1", "--quiet"])
    if code:
        raise RuntimeError(f"peft-subspace merge {path} ended with exit code {code}")
    return out


class Merger:
    """Merges the files of one kind and seed.

    Args:
        base: Folder of the base's encoder.
        singles: Folders of `single_task_model`, one a task.
        scratch: Folder for what is written; it is made anew for every merge.
    """

    def __init__(self, base: Path, singles: Sequence[Path], scratch: Path) -> None:
        self.base, self.singles, self.scratch = base, singles, scratch
        self.encoders = [str(single / "encoder") for single in singles]
        scratch.mkdir(parents=True, exist_ok=True)

    def task_vector(self, name: str) -> Path:
        """Merge by a method; the file of the merged task vector."""
        method, parameters, semantics = METHODS[name]
        out = self.scratch / "vector"
        if method in ("slerp", "nuslerp"):
            return self._extracted(self._one_by_one(method), out)
        models = [self._entry(path, single, method) for path, single in zip(self.encoders, self.singles, strict=True)]
        recipe: dict[str, Any] = {"merge_method": method, "base_model": str(self.base), "models": models}
        recipe |= {"parameters": parameters, "dtype": "float32", "subspace": {"semantics": semantics, "output": "task_vector"}}
        if method in ("linear", "karcher", "fisher", "regmean"):  # of models, not of their differences to the base
            recipe["subspace"]["output"] = "model"
            return self._extracted(merge_files(recipe, self.scratch / "whole"), out)
        return merge_files(recipe, out) / "task_vector.safetensors"

    def _entry(self, path: str, single: Path, method: str) -> dict[str, Any]:
        statistics_ = {"statistics": str(single / f"{method}.safetensors")} if method in ("fisher", "regmean") else {}
        weight = {} if method in WEIGHTLESS else {"weight": 1.0}
        return {"model": path, "parameters": {**weight, **statistics_}}

    def _one_by_one(self, method: str) -> Path:
        """Each model is taken in with its share."""
        whole = [f"{self.base}+{e}" if (Path(e) / "adapter_config.json").exists() else e for e in self.encoders]
        mean = whole[0]
        for k, encoder in enumerate(whole[1:], 1):
            recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
            if method == "slerp":
                recipe |= {"base_model": mean, "models": [{"model": encoder}], "parameters": {"t": 1 / (k + 1)}}
            else:
                pair = [{"model": mean, "parameters": {"weight": k}}, {"model": encoder, "parameters": {"weight": 1}}]
                recipe |= {"base_model": str(self.base), "models": pair}
            mean = str(merge_files(recipe, self.scratch / f"mean-{k}"))
        return Path(mean)

    def _extracted(self, model: Path, out: Path) -> Path:
        path = out.with_suffix(".safetensors")
        TaskVector.open(str(model), str(self.base)).save(path)
        return path

    def model(self, vector: Path, factor: float) -> Path:
        """The base plus factor times a task-vector file, as a folder that transformers loads."""
        entry = {"model": str(vector), "parameters": {"weight": factor}}
        recipe = {"merge_method": "task_arithmetic", "base_model": str(self.base), "models": [entry], "dtype": "float32"}
        return merge_files(recipe, self.scratch / "model")


def run(kind: str, seed: int, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Merge by every method that has no result yet; write each result as it comes."""
    tasks = [load(name, kind, seed, options) for name in TASKS]
    singles = [single_task_model(options.folder, task, kind, seed, options.epochs) for task in tasks]
    place = results.setdefault(kind, {}).setdefault(str(seed), {})
    names = [name for name in ("base", *options.methods) if name not in place]
    if not names:
        return
    base = base_folder(options.folder)
    merger, scorer = Merger(base, singles, options.folder / "scratch"), Scorer(base, tasks, singles, kind)
    place["single"] = scorer.single["test"]
    for name in names:
        begun = time.process_time()
        if name in ("Fisher", "RegMean"):
            write_statistics(scorer.models, tasks, singles, METHODS[name][0], scorer)
        place[name] = one(name, merger, scorer)
        place[name]["cpu_s"] = round(time.process_time() - begun, 1)
        reporting.write(options, results)
        mean = statistics.mean(place[name]["test"])
        print(f"{kind} {seed} {name}: {mean:.3f}, lambda {place[name]['lambda']:g}", file=sys.stderr, flush=True)
    shutil.rmtree(merger.scratch, ignore_errors=True)


def one(name: str, merger: Merger, scorer: Scorer) -> dict[str, Any]:
    """The result of one method."""
    if name == "base":
        return {"lambda": 0.0, "test": scorer.relative([scorer.base] * len(scorer.tasks), "test")}
    vector = merger.task_vector(name)
    merged = TaskVector.open(str(vector), str(merger.base))
    delta = {n: merged[n].float() if n in merged else torch.zeros_like(x) for n, x in scorer.base.items()}
    each: list[State] = [delta] * len(scorer.tasks)
    if name == MASKS:
        masks, scales = modulators(delta, scorer.deltas)
        each = [{key: s * m[key] * delta[key] for key in delta} for m, s in zip(masks, scales, strict=True)]
    held_out = {1.0: 0.0}
    if name != "average":
        held_out = best_lambda(lambda factor: statistics.mean(scorer.scaled(each, factor, "held_out")))
    best = max(held_out, key=held_out.__getitem__)
    if name == MASKS:  # a model for each task, made in memory from the merged file
        test = scorer.scaled(each, best, "test")
    else:
        test = scorer.relative([loaded(merger.model(vector, best))] * len(scorer.tasks), "test")
    rounded = {f"{factor:g}": round(score, 4) for factor, score in sorted(held_out.items())}
    return {"lambda": best, "held_out": rounded, "test": [round(score, 4) for score in test]}


def loaded(folder: Path) -> State:
    """The weights that transformers reads out of a folder."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).state_dict()


def write_statistics(
    models: Sequence[nn.Module], tasks: Sequence[Task], singles: Sequence[Path], method: str, scorer: Scorer
) -> None:
    """What RegMean and Fisher averaging know of each task, beside its model."""
    scorer.relative([{n: x + delta[n] for n, x in scorer.base.items()} for delta in scorer.deltas], "held_out")
    rows = 256 if method == "regmean" else 32
    for model, task, single in zip(models, tasks, singles, strict=True):
        path = single / f"{method}.safetensors"
        if not path.exists():
            part = type(task.train)(task.train.ids[:rows], task.train.labels[:rows])
            found = gram_matrices(model, part) if method == "regmean" else fisher_information(model, part)
            save_file(found, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


def base_folder(folder: Path) -> Path:
    """The folder of the base's encoder, made once."""
    path = folder / "base"
    if not path.exists():
        new_model(2).bert.save_pretrained(folder / ".base.part")
        (folder / ".base.part").rename(path)
    return path


def load(name: str, kind: str, seed: int, options: argparse.Namespace) -> Task:
    """The rows of a task for one kind of model and seed."""
    return load_task(name, seed, options.rows or ROWS[kind], options.held_out, options.test, options.tokens)


def main() -> None:
    """Train, merge or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "merge", "report"))
    parser.add_argument("--folder", type=Path, default=Path("outputs/merge-tasks"), help="where the single-task models are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="of each task to train on; default: 800 for whole models, 480 for adapters")
    parser.add_argument("--held-out", type=int, default=30, help="rows of each task to choose lambda on")
    parser.add_argument("--test", type=int, default=100, help="rows of each task to report on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48, help="of each text")
    options = parser.parse_args()
    path = options.output / reporting.FILE
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    if options.step == "report":
        return reporting.report(options, results, tuple(METHODS))
    for seed in options.seeds:
        for kind in options.kinds:
            if options.step == "merge":
                run(kind, seed, options, results)
                continue
            for name in TASKS:
                task = load(name, kind, seed, options)
                single_task_model(options.folder, task, kind, seed, options.epochs)
    return None


if __name__ == "__main__":
    main()
