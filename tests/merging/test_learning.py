"""Recipes that learn: from data to the merged model, by entropy and by labels, for classifiers and models that write."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
import yaml
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_subspace import AtlasConfig, ConcreteConfig, draw_history
from peft_subspace.cli import run
from peft_subspace.merging import make_plan, merge, verify
from peft_subspace.merging.learn_data import check_data
from peft_subspace.merging.learn_fields import TYPES, check_fields
from peft_subspace.merging.learn_options import CONFIGS, TaskOptions
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError
from peft_subspace.task_vectors.task_vector import TaskVector
from peft_subspace.training import MergeTrainer
from peft_subspace.training.recipe_rows import Rows
from tests.merging.learn_cases import (
    CLASSES,
    COMMON,
    WORDS,
    classifiers,
    last_token_classifiers,
    recipe,
    rows_of,
    write_head,
    write_rows,
    writers,
)
from tests.merging.tiny import contents, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned"),  # random vectors are as large as the base
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:learning has not raised the accuracy"),  # random models and a few steps
]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps the device of a process's first accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def labelled(folder: Path, **more: Any) -> list[dict[str, Any]]:
    return [{"name": name, "data": str(folder / f"{name}.jsonl"), "text": "text", "label": "label", **more} for name in CLASSES]


def record(folder: Path, name: str = "out") -> dict[str, Any]:
    return json.loads((folder / f"{name}.learned" / "learning.json").read_text())  # type: ignore[no-any-return]


def check_merged(folder: Path, base: Any, name: str = "out") -> None:
    """The result is what the learned adapter merges into by itself, and not the base."""
    own = type(base).from_pretrained(folder / name, config=base.config).state_dict()
    model: Any = PeftModel.from_pretrained(base, folder / f"{name}.learned")
    for key, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    before, found = read(folder / "base"), read(folder / name)
    assert found.keys() == before.keys()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in found.items())
    assert verify(folder / name).inputs > 0


CASES: dict[str, dict[str, Any]] = {
    "aTLAS": {"config": {"init": 0.3}},
    "aTLAS, one coefficient a vector": {"config": {"granularity": "task"}},
    "Concrete": {"method": "concrete"},
    "Concrete with coefficients": {"method": "concrete", "config": {"learn_coefficients": "layer"}, "inner_lr": 0.1},
}


@pytest.mark.parametrize("loss", ["entropy", "information_maximization", "cross_entropy"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_classifiers_with_heads_of_their_own(
    fields: dict[str, Any], loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifiers(tmp_path, lora=True)
    table = recipe(tmp_path, tasks=labelled(tmp_path, held_out=8), loss=loss, **fields)
    merge(table, tmp_path / "out")
    check_merged(tmp_path, tf.AutoModel.from_pretrained(tmp_path / "base"))
    found = record(tmp_path)
    assert found["result"]["loss"].keys() == CLASSES.keys()
    means = [sum(found[name]["loss"].values()) for name in ("start", "result")]
    assert means[1] <= means[0]
    assert {"accuracy on a", "accuracy on b"} == found["result"]["metrics"].keys()
    printed = capsys.readouterr().out
    start = "the base" if fields.get("config") == {"granularity": "task"} else "task arithmetic"
    measure = {"cross_entropy": "cross-entropy", "information_maximization": "information maximization"}.get(loss, loss)
    assert re.search(rf"step 0 \({start}\): \w+ step 0: mean {measure} -?[\d.]+, .*accuracy on a", printed)
    assert re.search(r"result: \w+ step \d: mean", printed)
    assert f"{measure} at the start" in (tmp_path / "out.learned" / "README.md").read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"config": {"init": 0.3, "granularity": "partition", "partition": 2, "constraint": "nonnegative"}},
        {"method": "concrete", "config": {"learn_coefficients": "layer", "granularity": "element"}},
    ],
    ids=["aTLAS", "Concrete"],
)
def test_learning_that_changes_no_accuracy_says_so_beside_the_models_alone(fields: dict[str, Any], tmp_path: Path) -> None:
    """Those are the accuracies that transformers' own models have on the same rows."""
    classifiers(tmp_path)
    tasks = labelled(tmp_path, held_out=8)
    table = recipe(tmp_path, tasks=tasks, steps=1, lr=1e-9, mask_lr=1e-9, select="last", **fields)
    with pytest.warns(UserWarning, match=r"not raised the accuracy on held-out rows: a mean of (0\.\d+) at the start, \1"):
        merge(table, tmp_path / "out")
    found = record(tmp_path)["singles"]
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        options = make_recipe(table).subspace.learn
        assert options is not None
        rows = Rows.draw(next(task for task in options.tasks if task.name == name), 0).held_out
        model: Any = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / name, num_labels=CLASSES[name])
        right = 0
        for row in rows:
            with torch.no_grad():
                answer = model.eval()(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits
            right += int(answer.argmax()) == row["label"]
        assert found[name][f"accuracy on {name}"] == right / len(rows)
    own: Any = PeftModel.from_pretrained(tf.AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "out.learned")
    assert list(own.peft_config) == ["default"]  # nothing of the comparison was saved
    check_merged(tmp_path, tf.AutoModel.from_pretrained(tmp_path / "base"))


def test_a_result_without_a_head_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifiers(tmp_path, lora=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    text = f"Warning: the models have classifier.bias, classifier.weight, which {tmp_path / 'base'} does not have"
    for more in (["--dry-run"], []):
        assert run(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "-q", *more]) == 0
        assert text in capsys.readouterr().err
    with_head = tmp_path / "with head"
    with_head.mkdir()
    classifiers(with_head, head_in_base=True)
    (with_head / "recipe.yaml").write_text(yaml.safe_dump(recipe(with_head)))
    for more in (["--dry-run"], []):
        assert run(["merge", str(with_head / "recipe.yaml"), str(with_head / "out"), "-q", *more]) == 0
        assert "the models have" not in capsys.readouterr().err


def test_the_look_with_the_highest_accuracy_is_kept(tmp_path: Path) -> None:
    """The first of them, while the entropy falls on."""
    classifiers(tmp_path)
    tasks = labelled(tmp_path, held_out=8)
    merge(recipe(tmp_path, tasks=tasks, select="metric", lr=2.0, eval_every=1), tmp_path / "out")
    looks = json.loads((tmp_path / "out.learned" / "history.json").read_text())
    means = [statistics.mean(look["metrics"].values()) for look in looks]
    entropies = [statistics.mean(look["loss"].values()) for look in looks]
    assert record(tmp_path)["result"] == looks[means.index(max(means))]
    assert entropies.index(min(entropies)) > means.index(max(means)) > 0
    for number, history in enumerate((tmp_path / "out.learned" / "history.json", looks)):  # the file, or what is in it
        draw_history(history, tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


@pytest.mark.parametrize("make", [classifiers, last_token_classifiers])
def test_the_loss_is_that_of_the_single_models_heads(make: Any, tmp_path: Path) -> None:
    """With one vector whole (init 1) a task's own model answers: its entropy is that of step 0.

    Those that answer at the last token have no padding token in their config, and texts are of different lengths.
    """
    make(tmp_path)
    tasks = [{"name": "a", "data": str(tmp_path / "a.jsonl"), "text": "text"}]
    table = recipe(tmp_path, tasks=tasks, config={"init": {"a": 1.0}}, eval_batches=100, select="last")
    merge(table, tmp_path / "out")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    values = []
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        with torch.no_grad():
            logits = model(**tokenizer(json.loads(line)["text"], return_tensors="pt")).logits
        values.append(float(torch.distributions.Categorical(logits=logits).entropy()))
    assert record(tmp_path)["start"]["loss"]["a"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_a_base_with_a_head_composes_it_too(tmp_path: Path) -> None:
    classifiers(tmp_path, head_in_base=True)
    merge(recipe(tmp_path, tasks=labelled(tmp_path), loss="cross_entropy"), tmp_path / "out")
    check_merged(tmp_path, tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    assert not torch.equal(read(tmp_path / "out")["classifier.weight"], read(tmp_path / "base")["classifier.weight"])


def test_a_base_with_a_head_of_other_classes_says_what_to_do(tmp_path: Path) -> None:
    classifiers(tmp_path)
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**COMMON, num_labels=7)).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"(?s)classifier\.weight.*name its encoder alone as base_model: AutoModel"):
        merge(recipe(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("make", [classifiers, last_token_classifiers])
def test_texts_longer_than_the_base_has_positions_are_cut(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    rows = [{"text": " ".join(["w1"] * 200), "label": 0}, *rows_of(0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": int(1e30)}))
    merge(recipe(tmp_path, eval_batches=100), tmp_path / "out")
    assert record(tmp_path)["result"]["loss"].keys() == CLASSES.keys()


def test_what_fails_before_a_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifiers(tmp_path)
    for error in (TypeError, KeyboardInterrupt):
        monkeypatch.setattr(MergeTrainer, "train", lambda self, resume, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            merge(recipe(tmp_path), tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_models_that_write(encoder_decoder: bool, tmp_path: Path) -> None:
    """The entropy is over the answers alone; labels may be the answers themselves."""
    writers(tmp_path, encoder_decoder)
    write_rows(tmp_path, "c", 5, label="maybe")
    shared = {"text": "w1 {text} w2", "answers": ["yes", "no", "maybe"]}
    tasks = [{"name": "one", "data": str(tmp_path / "a.jsonl"), **shared}]
    tasks.append({"name": "two", "data": str(tmp_path / "c.jsonl"), "label": "label", "held_out": 4, **shared})
    merge(recipe(tmp_path, tasks=tasks, eval_batches=100), tmp_path / "out")
    cls = tf.AutoModelForSeq2SeqLM if encoder_decoder else tf.AutoModelForCausalLM
    check_merged(tmp_path, cls.from_pretrained(tmp_path / "base"))
    found = record(tmp_path)["start"]
    assert found["metrics"].keys() == {"accuracy on two"}
    model, tokenizer = cls.from_pretrained(tmp_path / "base").eval(), tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    own, words = [], [WORDS.index(word) for word in shared["answers"]]
    for line in (tmp_path / "a.jsonl").read_text().splitlines():  # one by one, without padding
        given = tokenizer(f"w1 {json.loads(line)['text']} w2", return_tensors="pt")
        start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if encoder_decoder else {}
        with torch.no_grad():
            logits = model(**given, **start).logits[0, -1, words]
        own.append(float(torch.distributions.Categorical(logits=logits).entropy()))
    assert found["loss"]["one"] == pytest.approx(sum(own) / len(own), rel=1e-4)


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_ways_to_store_data(kind: str, tmp_path: Path) -> None:
    import datasets

    classifiers(tmp_path)
    place = tmp_path / f"a.{kind}"
    if kind == "csv":
        write_rows(tmp_path, "a", 0, "csv")
    else:
        rows = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train")
        rows.to_parquet(place) if kind == "parquet" else datasets.DatasetDict({"test": rows}).save_to_disk(place)
    split = {"split": "test"} if kind == "saved" else {}
    one = {"name": "a", "text": ["text", "label"], "head": write_head(tmp_path, 4)}
    merge(recipe(tmp_path, tasks=[{**one, "data": str(tmp_path / "a.jsonl")}]), tmp_path / "lines")
    merge(recipe(tmp_path, tasks=[{**one, "data": str(place), **split}]), tmp_path / "out")
    assert record(tmp_path)["data"] == record(tmp_path, "lines")["data"]
    assert record(tmp_path)["result"] == record(tmp_path, "lines")["result"]


def test_pictures(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    for name in ("base", "a", "b"):
        model = tf.ViTForImageClassification(config)
        (model.vit if name == "base" else model).save_pretrained(tmp_path / name)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    images = [Image.new("L", (9, 9), 20 * n) for n in range(12)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [n % 3 for n in range(12)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    task = {"name": "a", "data": str(tmp_path / "rows"), "image": "image", "label": "label", "held_out": 3}
    merge(recipe(tmp_path, tasks=[task], loss="cross_entropy"), tmp_path / "out")
    check_merged(tmp_path, tf.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False))


# Running -----------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    classifiers(tmp_path)
    table = recipe(tmp_path, seed=3)
    merge(table, tmp_path / "out")
    first = (tmp_path / "out.learned" / "adapter_model.safetensors").read_bytes()
    merge(table, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.learned" / "adapter_model.safetensors").read_bytes() == first
    merge(recipe(tmp_path, seed=4), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.learned" / "adapter_model.safetensors").read_bytes() != first


def test_an_interrupted_learning_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifiers(tmp_path)
    table = recipe(tmp_path, "concrete", config={"learn_coefficients": "task"})
    expected = read(merge(table, tmp_path / "whole"))
    looks = MergeTrainer._look

    def interrupted(self: Any, trained: Any) -> None:
        looks(self, trained)
        if self._step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MergeTrainer, "_look", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(table, tmp_path / "out")
    with pytest.raises(OutputError, match=r"an unfinished learning is there\. Pass --resume"):
        merge(table, tmp_path / "out")
    with pytest.raises(OutputError, match="was begun with another recipe"):
        merge(recipe(tmp_path, "concrete", steps=5), tmp_path / "out", resume=True)
    found = read(merge(table, tmp_path / "out", resume=True))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out\.learned: already exists \(a result of learn"):
        merge(table, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(MergeTrainer, "train", None)  # what was learned is taken
        assert read(merge(table, tmp_path / "out", resume=True)).keys() == expected.keys()
    shutil.rmtree(tmp_path / "out.learned")
    with pytest.raises(OutputError, match=r"out: already exists, and \S+out\.learned, by which it was merged, does not"):
        merge(recipe(tmp_path, "concrete", steps=5), tmp_path / "out", resume=True)


@pytest.mark.parametrize("config", [{}, {"bundle_vectors": True}], ids=["pool", "bundle"])
def test_the_result_is_merged_again_without_the_data(config: dict[str, Any], tmp_path: Path) -> None:
    classifiers(tmp_path)
    merge(recipe(tmp_path, config=config), tmp_path / "out")
    for name in CLASSES:
        (tmp_path / f"{name}.jsonl").unlink()
        if config:
            shutil.rmtree(tmp_path / name)
    if config:  # the vectors beside the adapter are all there is
        table = {"merge_method": "atlas", "subspace": {"learned": str(tmp_path / "out.learned")}}
        merge(table, tmp_path / "bundle")
        merge(tmp_path / "bundle" / "merge_recipe.yaml", tmp_path / "again")
        assert contents(tmp_path / "bundle") == contents(tmp_path / "again")
        return
    merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_what_was_learned_is_taken_for_the_same_rows_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifiers(tmp_path)
    table = recipe(tmp_path)
    merge(table, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(MergeTrainer, "train", None)
    path, kept = tmp_path / "b.jsonl", (tmp_path / "b.jsonl").read_text()
    write_rows(tmp_path, "b", 9)
    with pytest.raises(OutputError, match=r"out\.learned: was learned from other rows of the task 'b'\. Pass --overwrite"):
        merge(table, tmp_path / "out", resume=True)
    path.write_text(kept.replace("text", "txt"))
    merge(table, tmp_path / "out", resume=True)
    assert "The rows of 'b' were not compared with those that were learned from: task 'b'" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.learned" / "learning.json").write_text('{"reci')
    with pytest.raises(OutputError, match=r"out\.learned/learning\.json: cannot be read .* pass --overwrite"):
        merge(table, tmp_path / "out", resume=True)


def test_the_command_and_its_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifiers(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, tasks=labelled(tmp_path))))
    program = (
        "import sys\n"
        "from peft_subspace_cli import main\n"
        f"sys.argv = ['peft-subspace', 'merge', {str(path)!r}, '--dry-run']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert re.search(r"Learns +by entropy, 4 steps of 4 rows of each task", done.stdout)
    assert re.search(r"Task +a: 'text' of \S+a\.jsonl; label 'label'; head of \S+a\n", done.stdout)
    assert not (tmp_path / "out").exists()
    assert run(["merge", str(path), str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["merge", str(path), str(tmp_path / "out")]) == 4
    assert "already exists (a result of `peft-subspace merge`" in capsys.readouterr().err


# What is refused ---------------------------------------------------------------------------------------------------------


def test_recipes_that_do_not_fit_together(tmp_path: Path) -> None:
    classifiers(tmp_path)
    one = labelled(tmp_path)[0]
    cases: list[tuple[dict[str, Any], str]] = [
        (recipe(tmp_path, stepz=3), r"unknown key 'subspace\.learn\.stepz'; did you mean 'steps'\?"),
        (recipe(tmp_path, tasks=[{**one, "lable": "x"}]), r"unknown key .*lable'; did you mean 'label'\?"),
        (recipe(tmp_path, config={"granularty": "row"}), r"config: unknown key 'granularty'; did you mean 'granularity'"),
        (recipe(tmp_path, config={"coefficients": 1.0}), r"unknown key 'coefficients'; accepted: granularity"),
        (recipe(tmp_path, "concrete", config={"granularity": "rank"}), r"a mask of directions .* cannot be merged by"),
        (recipe(tmp_path, loss="cross_entropy"), r"needs the `label` column of every task, and 'a' names none"),
        (recipe(tmp_path, loss="information_maximization", batch_size=1), r"batch_size is 2 or more"),
        (recipe(tmp_path, select="metric"), r"select: metric needs `held_out` rows of every task, and 'a' has none"),
        (recipe(tmp_path, tasks=[one, one]), r"several tasks are called 'a'"),
        (recipe(tmp_path, tasks=[one, {**one, "name": "b", "answers": ["x", "y"]}]), r"of the kinds answers and text"),
        (recipe(tmp_path, tasks=[{**one, "answers": ["x", "x"]}]), r"two or more different texts"),
        (recipe(tmp_path, tasks=[{"name": "a", "data": "x"}]), r"one of `text` and `image`"),
        (recipe(tmp_path, tasks=[{**one, "label": None, "held_out": 3}]), r"needs a `label` column"),
        (recipe(tmp_path, tasks=[{**one, "text": "{} x"}]), r"task 'a': text: '\{\} x' has \{\}; write \{column\}"),
        (
            recipe(tmp_path, tasks=[{**one, "text": "{text x"}]),
            r"task 'a': text: '\{text x' cannot be read .* write \{column\}",
        ),
        (recipe(tmp_path, tasks=[{**one, "text": "{text:d}"}]), r"task 'a': text: '\{text:d\}' has \{text:d\}; write \{column"),
        (recipe(tmp_path, tasks=[{**one, "text": "{{text}}"}]), r"task 'a': text: '\{\{text\}\}' has no \{column\}"),
        (recipe(tmp_path, config={"target_modules": 5}), r"config: target_modules: 5 is not accepted; write a text or a list"),
        (recipe(tmp_path, config={"selected": 5}), r"config: selected: 5 is not accepted; write a table"),
        (recipe(tmp_path, "concrete", config={"block_types": 5}), r"config: block_types: 5 is not accepted; write a list"),
        (recipe(tmp_path, steps=0), r"steps.* greater than or equal to 1"),
        ({**recipe(tmp_path), "merge_method": "linear"}, r"subspace\.learn goes with methods that are learned"),
        ({**recipe(tmp_path), "base_model": None}, r"subspace\.learn needs a base_model"),
    ]
    both = recipe(tmp_path)
    both["subspace"]["learned"] = str(tmp_path)
    for table, message in [*cases, (both, r"learned merges by what was learned, and subspace\.learn learns it anew")]:
        with pytest.raises(RecipeError, match=message):
            make_recipe(table)
    with pytest.raises(RecipeError, match="has a plan when it has learned"):
        make_plan(make_recipe(recipe(tmp_path)))


def test_data_that_do_not_fit_are_refused_by_name_and_leave_nothing(tmp_path: Path) -> None:
    classifiers(tmp_path)
    one = labelled(tmp_path)[0]
    write_rows(tmp_path, "wide", 0, label=7)
    write_rows(tmp_path, "words", 0, label="good")
    write_rows(tmp_path, "lists", 0, label=[1])
    gaps = [*rows_of(0), {"text": None, "label": 0}, *rows_of(1)]
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gaps))
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "notes.txt").write_text("x")
    wide = {**one, "data": str(tmp_path / "wide.jsonl")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**one, "text": "txt"}, r"task 'a': .*a\.jsonl has no column 'txt' \(text\)\. Accepted: text, label"),
        ({**one, "text": "{question}?"}, r"has no column 'question' \(text\)"),
        ({**one, "held_out": 24}, r"has 24 rows, and 24 are held out"),
        ({**one, "name": "c"}, r"task 'c': which head\? .*base has none, and no model is called 'c' \(there are a, b\)"),
        ({**one, "head": str(tmp_path / "base")}, r"has no head of BertModel \(classifier\.weight, classifier\.bias\)\. Write"),
        ({**wide, "head": write_head(tmp_path, 5)}, r"the label 7 is no number of a class: the head has 5 classes"),
        ({**one, "data": str(tmp_path / "words.jsonl")}, r"the label 'good' is none of \['LABEL_0', 'LABEL_1', 'LABEL_2'\]"),
        ({**one, "data": str(tmp_path / "lists.jsonl")}, r"the label \[1\] is no number of a class"),
        (
            {**one, "data": str(tmp_path / "gaps.jsonl")},
            r"task 'a': .*gaps\.jsonl has no value in the column 'text' .* row 25\.",
        ),
        ({**one, "data": str(tmp_path / "broken.jsonl")}, r"task 'a': the data .*broken\.jsonl cannot be read"),
        ({**one, "data": str(tmp_path / "lost.csv")}, r"task 'a': data: there is no file .*lost\.csv"),
        ({**one, "data": str(tmp_path / "notes.txt")}, r"is a file, and \.jsonl, \.json, \.csv, \.parquet are read"),
    ]
    for task, message in cases:
        with pytest.raises((RecipeError, InputError), match=message):
            merge(recipe(tmp_path, tasks=[task], loss="cross_entropy"), tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(RecipeError, match=r"subspace\.learn\.config: granularity='rows' is not known"):
        merge(recipe(tmp_path, config={"granularity": "rows"}), tmp_path / "out")


def test_what_headers_tell_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dry run too, but what the plan of the replay alone can tell."""
    classifiers(tmp_path)
    monkeypatch.setattr(MergeTrainer, "train", None)
    one = labelled(tmp_path)[0]
    (tmp_path / "nothing.jsonl").touch()
    other = write_head(tmp_path, 3)
    adapter = recipe(tmp_path)
    adapter["subspace"]["output"] = "adapter"
    base = str(tmp_path / "base")
    cases: list[tuple[dict[str, Any], str, list[str], int, str]] = [
        (adapter, "out", [], 2, r"subspace\.output is adapter, and \S+a is a whole model"),
        (recipe(tmp_path), "out", ["--device", "nowhere"], 2, r"--device nowhere: torch cannot use it here"),
        (recipe(tmp_path), "a/out", [], 4, r"is, holds or lies in the model \S+a\. Choose another folder"),
        (recipe(tmp_path, tasks=[{**one, "head": other}]), "head.safetensors", ["--overwrite"], 4, r"is a file"),
        (recipe(tmp_path, tasks=[{**one, "data": f"{base}.csv"}]), "out", [], 2, r"task 'a': data: there is no file"),
        (recipe(tmp_path, tasks=[{**one, "data": str(tmp_path / "nothing.jsonl")}]), "out", [], 3, r"task 'a': .* is empty"),
        (recipe(tmp_path, tasks=[{**one, "head": f"{base}/x/y"}]), "out", [], 3, r"task 'a': head: .*there is no such folder"),
        (recipe(tmp_path, tasks=[{**one, "name": "c"}]), "out", [], 2, r"task 'c': which head\? .* Write `head: MODEL`"),
        ({**recipe(tmp_path), "base_model": f"{base}/model.safetensors"}, "out", [], 2, r"base_model: \S+ is not the folder"),
        (recipe(tmp_path), "a.jsonl", ["--overwrite"], 4, r"is a file"),
        ({**recipe(tmp_path), "tokenizer_source": "union"}, "out", [], 2, r"tokenizer_source: union is not supported"),
        ({**recipe(tmp_path), "chat_template": "foo"}, "out", [], 2, r"chat_template: 'foo' is not known"),
        (recipe(tmp_path), "out", ["--device", "meta"], 2, r"--device meta: torch cannot use it here"),
        (
            recipe(tmp_path, tasks=[{**one, "text": "txt"}]),
            "out",
            [],
            2,
            r"has no column 'txt' \(text\)\. Accepted: text, label",
        ),
        (recipe(tmp_path, tasks=[{**one, "label": "kind"}]), "out", [], 2, r"a\.jsonl has no column 'kind' \(label\)"),
        (recipe(tmp_path, config={"init": {"typo": 0.3}}), "out", [], 2, r"init: 'typo': no task vector is called so"),
    ]
    path, before = tmp_path / "recipe.yaml", {file: file.stat().st_size for file in tmp_path.rglob("*")}
    for table, out, more, code, message in cases:
        path.write_text(yaml.safe_dump(table))
        for run_as in ([], ["--dry-run"]):
            assert run(["merge", str(path), str(tmp_path / out), *more, *run_as]) == code
            assert re.search(message, capsys.readouterr().err)
    path.unlink()
    assert {file: file.stat().st_size for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json", "folder"])
def test_a_column_that_is_missing_is_seen_in_a_dry_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a list of rows in .json it is not; those are read when one learns."""
    classifiers(tmp_path)
    task = {"name": "a", "data": str(tmp_path / f"data.{kind}"), "text": ["text", "label"]}
    if kind in ("jsonl", "csv"):
        write_rows(tmp_path, "data", 0, kind)
    else:
        rows = datasets.Dataset.from_list(rows_of(0))
        if kind == "json":
            Path(task["data"]).write_text(json.dumps(rows_of(0)))
        elif kind == "parquet":
            rows.to_parquet(task["data"])
        else:
            rows.save_to_disk(task["data"])
    for text, code in ((["text", "label"], 0), (["text", "lost"], 0 if kind == "json" else 2)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path, tasks=[{**task, "text": text}])))
        assert run(["merge", str(tmp_path / "recipe.yaml"), "--dry-run", "--quiet"]) == code
    assert ("has no column 'lost' (text). Accepted: text, label." in capsys.readouterr().err) == (kind != "json")


def test_a_row_may_leave_a_column_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n\n{"text": "y", "label": 1}\n')
    task = TaskOptions(name="x", data=str(tmp_path / "x.jsonl"), text="text", label="label")
    check_data(task)
    with pytest.raises(RecipeError, match="has no column 'kind'"):
        check_data(task.model_copy(update={"label": "kind"}))


def test_a_head_that_is_none_is_seen_in_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifiers(tmp_path, lora=True)
    one = labelled(tmp_path)[0]
    shutil.copytree(tmp_path / "b", tmp_path / "bare")
    weights = load_file(tmp_path / "b" / "adapter_model.safetensors")
    bare = {name: values for name, values in weights.items() if "classifier" not in name}
    save_file(bare, tmp_path / "bare" / "adapter_model.safetensors")
    heads = {"base": 3, "bare": 3, "a": 0, "b": 0, "head.safetensors": 0}
    write_head(tmp_path, 3)
    for name, code in heads.items():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path, tasks=[{**one, "head": str(tmp_path / name)}])))
        assert run(["merge", str(tmp_path / "recipe.yaml"), "--dry-run", "--quiet"]) == code, name
        assert (f"{name} has no head: it has no tensors beside those of" in capsys.readouterr().err) == (code != 0)


@pytest.mark.parametrize(
    ("method", "config", "adapter", "model", "message"),
    [
        ("atlas", {"granularity": "row"}, {"method": "exact"}, "b", r"exact is for weighted sums"),
        ("atlas", {}, {"method": "knots"}, "b", r"knots goes with merge_method: knots"),
        ("atlas", {}, {"method": "cat"}, "dense.safetensors", r"cat is for updates of low rank"),
        ("atlas", {}, {}, "dense.safetensors", r"is dense, so that it has no rank of its own"),
        ("concrete", {}, {"method": "cat"}, "b", r"cat is for weighted sums"),
        ("concrete", {}, {}, "dense.safetensors", r"is dense, so that it has no rank of its own"),
        ("atlas", {}, {"method": "cat"}, "b", ""),
        ("atlas", {}, {"rank": 2}, "dense.safetensors", ""),
        ("concrete", {}, {}, "b", ""),
    ],
)
def test_an_adapter_of_what_will_be_learned(
    method: str, config: dict[str, Any], adapter: dict[str, Any], model: str, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    classifiers(tmp_path, lora=True)
    TaskVector.open(tmp_path / "a", tmp_path / "base").save(tmp_path / "dense.safetensors")
    task = {"name": "b", "data": str(tmp_path / "b.jsonl"), "text": "text", "head": str(tmp_path / "b")}
    table = {**recipe(tmp_path, method, tasks=[task], config=config), "models": [{"model": str(tmp_path / model)}]}
    table["subspace"] |= {"output": "adapter", "adapter": adapter}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(table))
    assert run(["merge", str(tmp_path / "recipe.yaml"), "--dry-run", "--quiet"]) == (2 if message else 0)
    assert re.search(message, capsys.readouterr().err)


def test_an_adapter_that_cannot_be_written_is_refused_before_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifiers(tmp_path, lora=True)
    monkeypatch.setattr(MergeTrainer, "train", None)
    tasks = [{"name": "b", "data": str(tmp_path / "b.jsonl"), "text": "text"}]
    table = {**recipe(tmp_path, "concrete", tasks=tasks), "models": [{"model": str(tmp_path / "b")}]}
    table["subspace"] |= {"output": "adapter", "adapter": {"method": "exact"}}
    with pytest.raises(RecipeError, match=r"subspace\.adapter\.method: exact is for"):
        merge(table, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_code_that_comes_with_a_base_is_not_run(tmp_path: Path) -> None:
    classifiers(tmp_path)
    path = tmp_path / "base" / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (tmp_path / "base" / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"cannot make this model by itself .* Code that comes with a model is never run"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_a_head_that_does_not_run_on_the_base(tmp_path: Path) -> None:
    """BERT's head reads the pooler, which this base lacks."""
    classifiers(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"task 'a': its head does not run on the encoder of .*base"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_answers_that_begin_alike(tmp_path: Path) -> None:
    writers(tmp_path)
    task = {"name": "a", "data": str(tmp_path / "a.jsonl"), "text": "text", "answers": ["yes w1", "yes w2"]}
    with pytest.raises(RecipeError, match=r"told apart by their first tokens, which are \[3, 3\]"):
        merge(recipe(tmp_path, tasks=[task]), tmp_path / "out")


@pytest.mark.parametrize(("method", "config"), [("atlas", AtlasConfig), ("concrete", ConcreteConfig)])
def test_the_keys_of_config_are_those_of_the_adapter(method: str, config: Any) -> None:
    """Written down where no torch is imported; all that the method's own class has is there, but the recipe's own keys."""
    own = {field.name for field in dataclasses.fields(config)}
    assert set(CONFIGS[method]) <= own
    assert set(CONFIGS[method]) <= set(TYPES)
    check_fields({f.name: getattr(config(), f.name) for f in dataclasses.fields(config) if f.name in TYPES}, method, ())
    parent = {field.name for field in dataclasses.fields(config.__mro__[1])}
    assert own - parent - set(CONFIGS[method]) <= {"seed", "train_mask"}
