"""Several processes write one result at once: one of them does it, and the others hear so before they have done any work.

A new verb that writes adds a row to `VERBS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from peft import get_peft_model

from peft_subspace.cli.app import run
from peft_subspace.merging import verify
from peft_subspace.merging.journal import Journal
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.locks import only_writer
from peft_subspace.task_vectors.task_vector import TaskVector
from peft_subspace.training import MergeArguments, MergeTrainer, Task
from tests.merging.learn_cases import classifiers
from tests.merging.learn_cases import recipe as learning_recipe
from tests.merging.tiny import contents, recipe, trio
from tests.methods import METHODS, Method
from tests.pico import MODELS, output
from tests.together.races import race

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned"),
    pytest.mark.filterwarnings("ignore:learning has not raised the accuracy"),
]
RUNS = 3


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    trio(folder)
    extract_lora(str(folder / "a"), str(folder / "base"), folder / "lora", rank=2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    adapters = {**recipe(folder, models=""), "models": [{"model": str(folder / "lora")}], "subspace": {"output": "adapter"}}
    (folder / "adapters.yaml").write_text(yaml.safe_dump(adapters))
    classifiers(folder / "learn")
    (folder / "learn.yaml").write_text(yaml.safe_dump(learning_recipe(folder / "learn")))
    return folder


VERBS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "merge": lambda zoo, out: ["merge", zoo / "recipe.yaml", out],
    "merge of adapters": lambda zoo, out: ["merge", zoo / "adapters.yaml", out],
    "merge that learns": lambda zoo, out: ["merge", zoo / "learn.yaml", out],
    "extract": lambda zoo, out: ["extract", zoo / "a", out, "--base", zoo / "base", "--rank", 2],
    "extract --task-vector": lambda zoo, out: [
        "extract", zoo / "a", out.with_suffix(".safetensors"), "--base", zoo / "base", "--task-vector"
    ],
}  # fmt: skip
RESUMES = ("merge", "merge that learns")
CASES = [(verb, flag) for verb in VERBS for flag in ("", "--overwrite", "--resume") if flag != "--resume" or verb in RESUMES]


@pytest.mark.parametrize(("verb", "flag"), CASES)
def test_one_of_several_processes_writes(verb: str, flag: str, made_once: Path, tmp_path: Path) -> None:
    """With exit code 0, the others with 4; the result is that of one process alone, and nothing is left beside it."""
    arguments = [*map(str, VERBS[verb](made_once, tmp_path / "work" / "out")), "--quiet", *([flag] if flag else [])]
    (tmp_path / "work").mkdir()
    if flag == "--overwrite":
        assert run(arguments[:-1]) == 0
    (tmp_path / "said").mkdir()
    runs = race(tmp_path / "said", RUNS, lambda _: run(arguments))
    assert sorted((one["found"], one["worked"]) for one in runs) == [(0, True)] + (RUNS - 1) * [(4, False)], runs
    found = sorted(os.listdir(tmp_path / "work"))
    assert run([*map(str, VERBS[verb](made_once, tmp_path / "alone" / "out")), "--quiet"]) == 0
    assert found == sorted(os.listdir(tmp_path / "alone"))
    for name in found:
        mine, alone = tmp_path / "work" / name, tmp_path / "alone" / name
        if mine.is_file():
            assert mine.read_bytes() == alone.read_bytes()
        elif verb != "merge that learns":  # its recipe names the folder of what was learned
            assert contents(mine) == contents(alone)


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("verb", RESUMES)
def test_one_of_several_processes_goes_on(verb: str, flag: str, made_once: Path, tmp_path: Path) -> None:
    """With what an interrupted one left; or starts anew."""
    arguments = [*map(str, VERBS[verb](made_once, tmp_path / "work" / "out")), "--quiet"]
    (tmp_path / "said").mkdir()
    save, add, seen = MergeTrainer._save, Journal.add, []

    def saved(self: MergeTrainer, *given: Any) -> None:
        save(self, *given)
        raise KeyboardInterrupt

    def added(self: Journal, *given: Any) -> None:
        add(self, *given)
        seen.append(given)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeTrainer, "_save", saved)
        patch.setattr(Journal, "add", added)
        assert run(arguments) == 130
    unfinished = [name for name in os.listdir(tmp_path / "work") if name.endswith(".partial")]
    assert unfinished == ["out.learned.partial" if verb == "merge that learns" else "out.partial"]
    runs = race(tmp_path / "said", RUNS, lambda _: run([*arguments, flag]))
    assert sorted((one["found"], one["worked"]) for one in runs) == [(0, True)] + (RUNS - 1) * [(4, False)], runs
    assert sorted(os.listdir(tmp_path / "work")) == (["out", "out.learned"] if verb == "merge that learns" else ["out"])
    verify(tmp_path / "work" / "out")


COMPOSING = {name: method for name, method in METHODS.items() if method.composes}


@pytest.mark.parametrize("resume", [False, True], ids=["", "resume"])
@pytest.mark.parametrize("method", COMPOSING.values(), ids=COMPOSING)
def test_one_of_several_merge_trainers_has_its_folder(method: Method, resume: bool, tmp_path: Path) -> None:
    pico, (folder, said) = MODELS["mlp"], (tmp_path / "run", tmp_path / "said")
    said.mkdir()

    begins: list[Callable[[], None]] = []

    def trainer(**more: Any) -> MergeTrainer:
        def logits(model: Any, batch: Any) -> Any:
            for begin in begins:
                begin()
            return output(model, batch)

        model = get_peft_model(pico.model(), method.make(pico, **method.steady))
        given = {"mask_steps": 2, "coefficient_steps": 2, "eval_every": 1, "save_every": 1, "output_dir": str(folder), **more}
        tasks = [Task("one", [pico.batch()], logits)]
        return MergeTrainer(model, tasks, MergeArguments(**given), accelerator=Accelerator(cpu=True), say=lambda _: None)

    def train(working: Callable[[], None]) -> int:
        begins.append(working)
        return len(made.train(resume=resume))

    if resume:
        trainer(coefficient_steps=1).train()
    made = trainer()
    runs = race(said, RUNS, train)
    (first,) = [one for one in runs if not one["error"]]
    others = [one for one in runs if one["error"]]
    assert first["worked"]
    assert not any(one["worked"] for one in others)
    assert all(one["error"].startswith(f"OutputError: {folder}") for one in others), runs
    assert all("another process is writing this result" in one["error"] for one in others), runs
    assert sorted(os.listdir(folder)) == ["checkpoint", "history.json"]
    trainer().train(resume=True)  # the lock went with the run


def test_what_a_killed_process_left_of_a_task_vector_goes(made_once: Path, tmp_path: Path) -> None:
    """Its unfinished file, and its lock; files of others with such names stay."""
    out = tmp_path / "out.safetensors"
    (tmp_path / ".out.safetensors-0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".out.safetensors.lock").touch()
    (tmp_path / ".other.safetensors-0123456789abcdef").write_bytes(b"half of another")
    with only_writer(out):
        TaskVector.open(made_once / "a", made_once / "base").save(out)
    assert sorted(os.listdir(tmp_path)) == [".other.safetensors-0123456789abcdef", "out.safetensors"]
