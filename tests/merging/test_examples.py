"""The recipes of the examples run, and the recipes in the documentation are read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from peft_subspace.merging.parameters import check_parameters
from peft_subspace.merging.recipe import load_recipe, parse_recipe
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
    assert "learn" in [path.stem for path in found]
    for path in found:
        recipe = load_recipe(path)
        check_parameters(recipe, recipe.method)


@pytest.mark.parametrize("page", ["README.md", "docs/merging.md"])
def test_recipes_in_the_documentation(page: str) -> None:
    found = [
        text for text in re.findall(r"```yaml\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL) if "merge_method" in text
    ]
    assert found
    for text in found:
        recipe = parse_recipe(text)
        check_parameters(recipe, recipe.method)
