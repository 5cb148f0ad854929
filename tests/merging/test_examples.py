"""The recipes of the examples run, and the recipes in the documentation are read."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from peft_subspace.merging import merge, verify
from peft_subspace.merging.learn_fields import ELSEWHERE
from peft_subspace.merging.learn_options import CONFIGS
from peft_subspace.merging.methods.registry import get, names
from peft_subspace.merging.parameters import check_parameters
from peft_subspace.merging.recipe import load_recipe, parse_recipe
from tests.merging.learn_cases import classifiers, write_rows
from tests.processes import REPOSITORY


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # put back at the end; the script changes it
    path = REPOSITORY / "examples" / "merging" / "merge_adapters.py"
    spec = importlib.util.spec_from_file_location("merge_adapters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    printed = capsys.readouterr().out
    assert re.findall(r"(\w+) verified", printed) == ["ties", "gradient", "subtract"]
    assert re.search(r"left out by rank 8: \d+\.\d%", printed)


def test_every_recipe_is_read() -> None:
    found = sorted((REPOSITORY / "examples" / "merging").glob("*.yaml"))
    assert {"learn", "learn-mask"} <= {path.stem for path in found}
    for path in found:
        recipe = load_recipe(path)
        check_parameters(recipe, recipe.method)
    listed = re.findall(r"^\| `(\S+)` \|", (found[0].parent / "README.md").read_text(), re.MULTILINE)
    assert {path.name for path in found} == set(listed)


@pytest.mark.filterwarnings("ignore:learning has not raised the accuracy")  # of random models on random texts
@pytest.mark.parametrize("name", ["learn", "learn-mask"])
def test_what_the_examples_learn_is_learned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe as it is, but for fewer steps and rows: with tiny models at the places that it names."""
    classifiers(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    places = {"base": "encoder", "a": "encoder-questions", "b": "encoder-spam"}
    Path("me").mkdir()
    for own, place in places.items():
        (tmp_path / "models" / own).rename(tmp_path / "me" / place)
    write_rows(tmp_path, "questions", 0)
    write_rows(tmp_path, "spam", 1, "csv", subject="w1", body="w2 w3", is_spam=1)
    table = load_recipe(REPOSITORY / "examples" / "merging" / f"{name}.yaml").to_yaml()
    table = table.replace("held_out: 100", "held_out: 4")
    recipe = parse_recipe(table)
    assert recipe.subspace.learn is not None
    few = recipe.subspace.learn.model_copy(update={"steps": 2, "eval_every": 1})
    recipe = recipe.model_copy(update={"subspace": recipe.subspace.model_copy(update={"learn": few})})
    verify(merge(recipe, "out"))
    assert json.loads(Path("out.learned/learning.json").read_text())["result"]["step"] <= 2


def test_every_method_is_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "merge-methods.md").read_text()
    listed = re.findall(r"^\| `(\w+)`(?: \(`(\w+)`\))? \|", page.split("## ")[0], re.MULTILINE)
    assert sorted(name for name, _ in listed) == names()
    assert {get(alias).name for name, alias in listed if alias} == {name for name, alias in listed if alias}


def test_what_config_accepts_is_in_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "merging.md").read_text()
    accepted, refused = text.split("`config` accepts")[1].split("| key of a task")[0].split("Pool and base are")
    assert set(re.findall(r"`(\w+)`", accepted)) == {"atlas", "concrete", *CONFIGS["atlas"], *CONFIGS["concrete"]}
    assert set(re.findall(r"`(\w+)`", refused)) >= set(ELSEWHERE) - {"modules_to_save"}


@pytest.mark.parametrize("page", ["README.md", "docs/merging.md"])
def test_recipes_in_the_documentation(page: str) -> None:
    found = [
        text for text in re.findall(r"```yaml\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL) if "merge_method" in text
    ]
    assert found
    for text in found:
        recipe = parse_recipe(text)
        check_parameters(recipe, recipe.method)
