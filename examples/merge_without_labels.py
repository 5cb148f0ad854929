"""Merge fine-tuned models by a learned mask: unlabelled texts of every task, no labels, then a replay without any data.

    accelerate launch examples/merge_without_labels.py                    # about ten minutes on one CPU core
    accelerate launch examples/merge_without_labels.py --steps 200 --learn layer --loss information_maximization

MiniLM is fine-tuned on three text tasks (once). Their encoders are merged by Concrete: task arithmetic with a mask that lowers
the entropy of the merged model's answers, or another loss that needs no labels. Each task keeps its own head. Printed are the
accuracies of the single models, of plain task arithmetic and of the learned merge; `peft-subspace merge` then writes the merged
encoder from the saved mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import assets
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from compress import arguments
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

import peft_subspace
from peft_subspace import ConcreteConfig
from peft_subspace.cli import run as command
from peft_subspace.training import MergeArguments, MergeTrainer, Task, pooled_logits
from peft_subspace.training.objectives import UNLABELLED

TASKS = ("trec", "newsgroups", "spam-assassin")


class Unlabelled:
    """Batches of a data set without their labels."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            yield {name: value for name, value in batch.items() if name != "labels"}


def main() -> None:
    """The whole way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800, help="of each task to fine-tune on")
    parser.add_argument("--test_rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learn", choices=("none", "task", "layer"), default="none", help="coefficients besides the mask")
    parser.add_argument("--loss", choices=UNLABELLED, default="entropy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/merge-without-labels"))
    options = parser.parse_args()
    set_seed(options.seed)
    folder, base = options.output_dir, assets.model_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    collate = DataCollatorWithPadding(tokenizer)

    def tokens(rows: Any) -> Any:
        encoded = rows.map(lambda part: tokenizer(part["text"], truncation=True, max_length=48), batched=True)
        return encoded.remove_columns("text").rename_column("label", "labels")

    # 1. one model for each task, made once
    heads: dict[str, nn.Module] = {}
    tests: dict[str, Any] = {}
    for name in TASKS:
        data = assets.dataset(name)
        classes = data["train"].features["label"].num_classes
        if not (folder / name).exists():
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
            rows = tokens(data["train"].shuffle(seed=0).select(range(options.rows)))
            args = arguments(folder / "checkpoints", options, learning_rate=2e-4, num_train_epochs=2)
            Trainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()
            model.bert.save_pretrained(folder / f"{name}.partial" / "encoder")
            save_file(dict(model.classifier.state_dict()), folder / f"{name}.partial" / "head.safetensors")
            (folder / f"{name}.partial").rename(folder / name)
        heads[name] = nn.Linear(AutoModel.from_pretrained(base).config.hidden_size, classes)
        heads[name].load_state_dict(load_file(folder / name / "head.safetensors"))
        tests[name] = tokens(data["test"].shuffle(seed=0).select(range(min(options.test_rows, len(data["test"])))))

    @torch.no_grad()
    def accuracies(encoder: Any, names: Any = TASKS) -> dict[str, float]:
        encoder.eval()
        found = {}
        for name in names:
            right = 0
            for batch in DataLoader(tests[name], batch_size=32, collate_fn=collate):
                labels = batch.pop("labels")
                right += int((pooled_logits(heads[name])(encoder, batch).argmax(1) == labels).sum())
            found[name] = right / len(tests[name])
        return found

    single = {name: accuracies(AutoModel.from_pretrained(folder / name / "encoder"), [name])[name] for name in TASKS}

    # 2. a mask, and coefficients if asked for, from the texts alone
    config = ConcreteConfig(
        pool={name: {"path": str(folder / name / "encoder"), "base": base} for name in TASKS},
        base=base,
        coefficients=0.3,
        learn_coefficients=None if options.learn == "none" else options.learn,
        seed=options.seed,
    )
    model = get_peft_model(AutoModel.from_pretrained(base), config)
    plain = accuracies(model)
    texts = {name: Unlabelled(DataLoader(tests[name], 8, shuffle=True, collate_fn=collate)) for name in TASKS}
    loss = UNLABELLED[options.loss]
    tasks = [Task(name, texts[name], pooled_logits(heads[name]), objective=loss) for name in TASKS]
    # the paper moves a logit by at most 2,000 steps of 1e-3; so many fewer steps want a higher rate
    rates = {"mask_lr": 2.0 / options.steps, "coefficient_lr": 1.0 / options.steps}
    given = MergeArguments(mask_steps=options.steps, coefficient_steps=options.steps, eval_every=10, **rates)
    history = MergeTrainer(model, tasks, given, accelerator=Accelerator()).train()
    learned = accuracies(model)
    model.save_pretrained(folder / "adapter")
    peft_subspace.draw_history(history, folder / "history.png")
    peft_subspace.draw_probabilities(model.base_model.mask_probabilities(), folder / "probabilities.png")
    peft_subspace.draw_density(model.base_model.density(), folder / "density.png")

    # 3. the merged encoder without data: the recipe names the adapter, which names the rest
    recipe = {"merge_method": "concrete", "subspace": {"learned": str(folder / "adapter")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if code := command(["merge", str(folder / "recipe.yaml"), str(folder / "model"), "--overwrite", "--quiet"]):
        raise SystemExit(code)
    merged = accuracies(AutoModel.from_pretrained(folder / "model"))
    assert merged == learned, (merged, learned)  # the very bits
    for title, found in (("single models", single), ("task arithmetic", plain), ("Concrete", learned)):
        print(f"{title:>16}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print(f"{folder / 'model'} and the pictures in {folder} are ready")


if __name__ == "__main__":
    main()
