"""Few labels of pictures: aTLAS with the vectors of the two other tasks, against LoRA and linear probing; ViT-S, three seeds.

    python benchmarks/few_shot_images.py              # the single-task models, if they are missing, the runs, table and picture
    python benchmarks/few_shot_images.py --report

The protocol is that of `few_shot.py`, on digits, mnist and fashion-mnist at 28 pixels: the head reads the class token. A pool
has two vectors, whole models that were fine-tuned on 960 rows for two epochs. Rates are chosen on held-out rows of digits.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks import few_shot_report as reporting
from benchmarks.few_shot import Bench, Classifier, Runs
from benchmarks.merge_tasks_models import Rows, Task, assets
from benchmarks.quality import rows

TASKS, SHOTS, SWEPT, METHODS = ("digits", "mnist", "fashion-mnist"), (1, 4, 16), "digits", ("probe", "lora", "atlas")
EPOCHS, RATE, HEAD_RATE, BATCH = 2, 5e-5, 2e-3, 16


class Pictures(Rows):
    """Pictures and labels, under the names that `Rows` has for texts."""

    def batches(self, size: int, shuffle: random.Random | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield pictures `[b, 3, 28, 28]`, nothing, labels `[b]`."""
        order = list(range(len(self.labels)))
        if shuffle:
            shuffle.shuffle(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield torch.stack([self.ids[i] for i in chosen]), torch.empty(0), torch.tensor([self.labels[i] for i in chosen])


class PictureClassifier(Classifier):
    """The class token, normalised and times 10, through a linear head."""

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = self.encoder(pixel_values=ids).last_hidden_state
        return 10 * F.normalize(states[:, 0].float(), dim=-1)


def pictures(part: dict[str, Tensor], order: Tensor | None = None) -> Pictures:
    """Rows of `quality.rows`, in another order."""
    order = torch.arange(len(part["labels"])) if order is None else order
    return Pictures(list(part["pixel_values"][order]), part["labels"][order].tolist())


class PictureBench(Bench):
    """One task and seed of pictures."""

    matrices = "all-linear"

    def open(self, folder: Path, task: str, number: int) -> tuple[Task, dict[str, str], str]:
        base = folder / "vit"
        if not base.exists():
            AutoModel.from_pretrained(assets.model_path("vit-small")).save_pretrained(folder / ".vit")
            (folder / ".vit").rename(base)
        parts, classes = rows(task)
        order = torch.randperm(len(parts["train"]["labels"]), generator=torch.Generator().manual_seed(self.seed))
        found = [pictures(parts["train"], order), pictures(parts["held"]), pictures(parts["test"])]
        pool = {name: str(fine_tuned(name, base, number, folder)) for name in TASKS if name != task}
        self.base_path = str(base)
        return Task(task, classes, *found), pool, str(base)

    def classifier(self) -> Classifier:
        return PictureClassifier(AutoModel.from_pretrained(self.base_path).eval(), self.task.classes)


def fine_tuned(name: str, base: Path, seed: int, folder: Path) -> Path:
    """The whole ViT and a new head on a task, once for each seed; the head is dropped."""
    path = folder / f"picture-{name}-{seed}"
    if path.exists():
        return path
    parts, classes = rows(name)
    torch.manual_seed(seed)
    model = PictureClassifier(AutoModel.from_pretrained(base).train(), classes)
    groups: list[Any] = [
        {"params": model.encoder.parameters(), "lr": RATE},
        {"params": model.head.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    data, shuffle = pictures(parts["train"]), random.Random(seed)
    for _ in range(EPOCHS):
        for pixels, mask, labels in data.batches(BATCH, shuffle):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels, mask), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.encoder.save_pretrained(folder / f".picture-{name}-{seed}")
    (folder / f".picture-{name}-{seed}").rename(path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/few-shot-images"), help="where the single-task models are")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only report")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    for folder in (options.out, options.folder):
        folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.out / "few-shot-images-runs.jsonl", options.folder, PictureBench, SWEPT)
    if not options.report:
        rates = {method: runs.best_rate(method) for method in METHODS}
        for seed in options.seeds:
            for task in options.tasks:
                for count in options.shots:
                    for method in METHODS:
                        runs.get(task, method, count, rates[method], seed)
    reporting.report(list(runs.done.values()), options.out, "few-shot-images")


if __name__ == "__main__":
    main()
