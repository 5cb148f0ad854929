"""The single-task models of `merge_tasks.py`: MiniLM fine-tuned on five text tasks, and statistics of their data."""

from __future__ import annotations

import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import assets

TASKS = ("trec", "sms-spam", "newsgroups", "wordnet", "spam-assassin")
KINDS = ("full", "lora", "flora")
RATES = {"full": 2e-4, "lora": 2e-3, "flora": 4e-3}
ROWS = {"full": 800, "lora": 480, "flora": 480}  # to train on
BACKBONE = "bert."  # merged; the classifier is each task's own


@dataclass
class Rows:
    """Token ids and labels, in batches of texts of about one length."""

    ids: list[list[int]]
    labels: list[int]

    def batches(self, size: int, shuffle: random.Random | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ids `[b, tokens]`, their mask, labels `[b]`."""
        order = sorted(range(len(self.ids)), key=lambda i: (len(self.ids[i]), shuffle.random() if shuffle else i))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        if shuffle:
            shuffle.shuffle(groups)
        for group in groups:
            width = max(len(self.ids[i]) for i in group)
            ids = torch.tensor([self.ids[i] + [0] * (width - len(self.ids[i])) for i in group])
            yield ids, (ids != 0).long(), torch.tensor([self.labels[i] for i in group])


@dataclass
class Task:
    """Rows of one task: to train on, to choose lambda on, to report on."""

    name: str
    classes: int
    train: Rows
    held_out: Rows
    test: Rows


def load_task(name: str, seed: int, train: int, held_out: int, test: int, tokens: int) -> Task:
    """Draw the rows of a task; the test rows are the same for every seed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    data = assets.dataset(name)

    def rows(part: Any) -> Rows:
        texts = [text[:2000] for text in part["text"]]
        return Rows(tokenizer(texts, truncation=True, max_length=tokens)["input_ids"], list(part["label"]))

    mixed = data["train"].shuffle(seed=seed)
    parts = mixed.select(range(train)), mixed.select(range(train, train + held_out))
    return Task(
        name,
        data["train"].features["label"].num_classes,
        rows(parts[0]),
        rows(parts[1]),
        rows(data["test"].shuffle(seed=0).select(range(min(test, len(data["test"]))))),
    )


def new_model(classes: int) -> nn.Module:
    """MiniLM with a fresh head."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(assets.model_path("minilm"), num_labels=classes)


def _adapted(encoder: nn.Module, kind: str) -> nn.Module:
    """The encoder with an adapter on all of its matrices; the head beside it is trained whole."""
    if kind == "full":
        return encoder
    from peft import LoraConfig, get_peft_model

    from peft_subspace import FloraConfig

    targets = ["query", "key", "value", "dense"]
    if kind == "lora":
        return get_peft_model(encoder, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    return get_peft_model(encoder, FloraConfig(r=16, target_modules=targets))


def train(task: Task, kind: str, seed: int, epochs: int, batch: int = 32) -> nn.Module:
    """Fine-tune on one task, in bfloat16 with weights in float32."""
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    model = new_model(task.classes)
    model.bert = _adapted(model.bert, kind)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind], weight_decay=0.01)
    steps = epochs * math.ceil(len(task.train.ids) / batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm + 1)))
    for _ in range(epochs):
        for ids, mask, labels in task.train.batches(batch, shuffle):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows) -> float:
    """Share of the rows that are classified rightly; in bfloat16, which takes half the time here, for every model alike."""
    model.eval()
    right = 0
    with torch.autocast("cpu", torch.bfloat16):
        for ids, mask, labels in rows.batches(64):
            right += int((model(input_ids=ids, attention_mask=mask).logits.argmax(1) == labels).sum())
    return right / len(rows.labels)


def single_task_model(folder: Path, task: Task, kind: str, seed: int, epochs: int) -> Path:
    """The folder of a trained encoder or adapter, as `save_pretrained` writes it, and `head.safetensors` for the classifier.

    It is made once: an interrupted benchmark goes on where it stopped.
    """
    path = folder / f"{kind}-{task.name}-{seed}"
    if not path.exists():
        start = time.process_time()
        model = train(task, kind, seed, epochs)
        partial = folder / f".{path.name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        model.bert.save_pretrained(partial / "encoder")
        save_file(dict(model.classifier.state_dict()), partial / "head.safetensors")
        partial.rename(path)
        print(
            f"trained {path.name} in {time.process_time() - start:.0f} CPU s, {accuracy(model, task.held_out):.3f} of the "
            f"held-out rows",
            file=sys.stderr,
            flush=True,
        )
    return path


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(BACKBONE)}


@torch.no_grad()
def gram_matrices(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """X^T X of the inputs of every linear layer, by weight name; padding is left out."""
    found: dict[str, Tensor] = {}
    keep: list[Tensor] = []

    def hook(name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            x = x[keep[-1].bool()] if x.dim() == 3 else x
            key = f"{name.removeprefix(BACKBONE)}.weight"
            found[key] = found.get(key, 0) + x.t() @ x

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in _linears(model).items()]
    model.eval()
    for ids, mask, _ in rows.batches(64):
        keep.append(mask)
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def fisher_information(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Mean over the rows of the squared gradient of the log-likelihood of the label that the model itself finds likeliest.

    Over its root mean square: the Fisher information of a task that a model is sure of is smaller by orders of magnitude, and
    the merge would be the model that is least sure.
    """
    parameters = {n.removeprefix(BACKBONE): x for n, x in model.named_parameters() if n.startswith(BACKBONE)}
    found = {name: torch.zeros_like(value) for name, value in parameters.items()}
    model.eval()
    for ids, mask, _ in rows.batches(1):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits, logits.argmax(1).detach())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.square_(), alpha=1 / len(rows.labels))
    squares = sum(float(x.double().square().sum()) for x in found.values())
    size = (squares / sum(x.numel() for x in found.values())) ** 0.5
    return {name: x / size for name, x in found.items()}
