"""Learn TREC from 16 questions of each class by combining what MiniLM learned on other tasks, and replay that without data.

    accelerate launch examples/compose.py                       # a few minutes on one CPU core
    accelerate launch examples/compose.py --pool_rows 2000 --shots 4

Three text tasks are fine-tuned whole; their differences from MiniLM are the task vectors. For TREC one coefficient for each
vector and parameter tensor is learned, and a head. The saved adapter has those numbers and the head; `peft-subspace merge`
makes the model out of it, the base and the pool, without data and without PEFT. At the end a recipe alone does the learning: it
has the questions, and the head.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import assets
import torch
import yaml
from accelerate.utils import set_seed
from compress import accuracy, arguments
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

import peft_subspace
from peft_subspace import AtlasConfig
from peft_subspace.cli import run as command
from peft_subspace.training import CoefficientTrainer

POOL = ("newsgroups", "wordnet", "sms-spam")


def classifier(name: str | Path, classes: int) -> Any:
    """MiniLM, or what was made of it, with a head for so many classes."""
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)


def few_of_each(rows: Any, count: int) -> Any:
    """The first `count` rows of each class."""
    seen: dict[int, int] = {}
    chosen = []
    for number, label in enumerate(rows["label"]):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            chosen.append(number)
    return rows.select(chosen)


def main() -> None:
    """The whole way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool_rows", type=int, default=800, help="of each task of the pool to train on")
    parser.add_argument("--shots", type=int, default=16, help="of each class of TREC")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test_rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compose"))
    options = parser.parse_args()
    set_seed(options.seed)
    folder, base = options.output_dir, assets.model_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    collate = DataCollatorWithPadding(tokenizer)

    def tokens(rows: Any) -> Any:
        return rows.map(lambda part: tokenizer(part["text"], truncation=True, max_length=48), batched=True).remove_columns(
            "text"
        )

    # 1. the pool: whole models of other tasks, made once
    for name in POOL:
        if not (folder / name).exists():
            data = assets.dataset(name)["train"].shuffle(seed=0)
            model = classifier(base, data.features["label"].num_classes)
            rows = tokens(data.select(range(options.pool_rows)))
            args = arguments(folder / "checkpoints", options, learning_rate=2e-4, num_train_epochs=2)
            Trainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()
            model.save_pretrained(folder / f"{name}.partial")
            (folder / f"{name}.partial").rename(folder / name)

    # 2. coefficients and a head for TREC, from a few labels
    task = assets.dataset("trec")
    classes = task["train"].features["label"].num_classes
    shots = few_of_each(task["train"].shuffle(seed=options.seed), options.shots)
    train = tokens(shots)
    test = tokens(task["test"].shuffle(seed=0).select(range(min(options.test_rows, len(task["test"])))))
    config = AtlasConfig(
        pool={name: str(folder / name) for name in POOL},
        base=base,
        modules_to_save=["classifier"],
        exclude_modules=["classifier"],  # heads of other tasks are no part of the pool
        task_type="SEQ_CLS",
    )
    model = get_peft_model(classifier(base, classes), config)
    model.print_trainable_parameters()
    args = arguments(folder / "checkpoints", options, learning_rate=2e-2, max_steps=options.steps)
    trainer = CoefficientTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, data_collator=collate, compute_metrics=accuracy,
        coefficient_lr=5e-2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    learned = trainer.evaluate()["eval_accuracy"]
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    peft_subspace.draw_coefficients(model.base_model.coefficients(), config.vector_names, folder / "coefficients.png")

    # 3. reload, as another program would
    def score(candidate: Any) -> float:
        judge = Trainer(model=candidate, args=args, eval_dataset=test, data_collator=collate, compute_metrics=accuracy)
        return judge.evaluate()["eval_accuracy"]

    again = score(PeftModel.from_pretrained(classifier(base, classes), adapter))
    assert again == learned, (again, learned)

    # 4. replay without data: the recipe names the adapter, which names the rest
    recipe = {"merge_method": "atlas", "subspace": {"learned": str(adapter)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if code := command(["merge", str(folder / "recipe.yaml"), str(folder / "model"), "--overwrite", "--quiet"]):
        raise SystemExit(code)
    merged = score(classifier(folder / "model", classes))
    torch.testing.assert_close(merged, learned, rtol=0, atol=1 / len(test))  # a rounding may turn one answer

    # 5. a recipe that learns: coefficients for the head that is there now, from a file of questions
    head = model.base_model.model.classifier.modules_to_save["default"]
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "head.safetensors")
    shots.to_json(folder / "shots.jsonl")
    files = {"data": str(folder / "shots.jsonl"), "head": str(folder / "head.safetensors")}
    learn = {
        "loss": "cross_entropy",
        "steps": options.steps,
        "lr": 2e-2,
        "eval_every": max(1, options.steps // 3),
        "tasks": [{"name": "trec", "text": "text", "label": "label", "max_length": 48, **files}],
    }
    models = [{"model": str(folder / name)} for name in POOL]
    recipe = {"merge_method": "atlas", "base_model": base, "models": models, "subspace": {"learn": learn}}
    (folder / "learn.yaml").write_text(yaml.safe_dump(recipe))
    if code := command(["merge", str(folder / "learn.yaml"), str(folder / "from-recipe"), "--overwrite"]):
        raise SystemExit(code)
    encoder = classifier(folder / "from-recipe", classes)
    encoder.classifier.load_state_dict(head.state_dict())
    by_recipe = score(encoder)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(
        f"accuracy on TREC from {options.shots} shots: {before:.3f} at the start, {learned:.3f} learned, {merged:.3f} merged, "
        f"{by_recipe:.3f} by a recipe that learns; the adapter has {size / 1e3:.1f} kB; {folder / 'model'} and "
        f"{folder / 'coefficients.png'} are ready"
    )


if __name__ == "__main__":
    main()
