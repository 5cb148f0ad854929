"""Few labels of pictures: aTLAS with the vectors of the two other tasks, against LoRA and linear probing; ViT-S, three seeds.

    python benchmarks/few_shot_images.py              # the single-task models, if they are missing, the runs, table and picture
    python benchmarks/few_shot_images.py --report

The protocol is that of `few_shot.py`, on digits, mnist and fashion-mnist at 28 pixels: the head reads the class token. A pool
has two vectors, the models of `learned_merging.py`: fine-tuned under heads that are given, as CLIP's in the paper are. Rates
are chosen on held-out rows of digits, with models of another seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from benchmarks.few_shot import Bench, Classifier, Plan
from benchmarks.learned_merging import TASKS, parts_of, suite_of
from benchmarks.merge_tasks_models import Rows, Task


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
        suite = suite_of("image", self.seed, folder)
        parts, classes = parts_of(task)
        order = torch.randperm(len(parts["train"]["labels"]), generator=torch.Generator().manual_seed(self.seed))
        found = [pictures(parts["train"], order), pictures(parts["held"]), pictures(parts["test"])]
        pool = {name: str(path) for name, path in suite.encoders.items() if name != task}
        self.base_path = str(suite.base)
        return Task(task, classes, *found), pool, self.base_path

    def classifier(self) -> Classifier:
        return PictureClassifier(AutoModel.from_pretrained(self.base_path).eval(), self.task.classes)


PLAN = Plan("few-shot-images", "outputs/learned-merging", PictureBench, TASKS["image"], (1, 4, 16), swept="digits")

if __name__ == "__main__":
    PLAN.run(__doc__)
