"""Recipes: mergekit's are read as they are; what is wrong is said with the key, the value and the nearest name."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_subspace.merging.methods import registry
from peft_subspace.merging.parameters import check_parameters, depths, evaluate, resolve
from peft_subspace.merging.recipe import Condition, Recipe, load_recipe, make_recipe, parse_recipe
from peft_subspace.task_vectors.errors import RecipeError
from peft_subspace.task_vectors.references import Reference

MERGEKIT = """
# a recipe as people share them
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: psmathur/orca_mini_v3_13b@main
    parameters:
      density: [1, 0.7, 0.1]  # density gradient
      weight: 1.0
  - model: WizardLM/WizardMath-13B-V1.0+me/lora@v2
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 1e-3
  - model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
out_dtype: bfloat16
tokenizer_source: base
chat_template: auto
"""


def test_a_recipe_of_mergekit() -> None:
    recipe = parse_recipe(MERGEKIT)
    assert recipe.models[1].model == Reference("WizardLM/WizardMath-13B-V1.0", None, "me/lora", "v2")
    assert recipe.models[1].parameters["weight"] == [Condition(value=0.5, filter="mlp"), Condition(value=1e-3)]
    assert [str(entry.model) for entry in recipe.merged_models] == [
        "psmathur/orca_mini_v3_13b@main",
        str(recipe.models[1].model),
    ]
    check_parameters(recipe, recipe.method)
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_our_additions_stand_under_one_key() -> None:
    table = {
        "merge_method": "linear",
        "models": [{"model": "a"}],
        "subspace": {"seed": 3, "shard_size": "2GB", "output": "model"},
    }
    assert make_recipe(table).subspace.shard_size == 2 * 10**9
    assert make_recipe({**table, "subspace": {"shard_size": "500 MiB"}}).subspace.shard_size == 500 * 2**20


BASE: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"merge_methd": "ties"}, "unknown key 'merge_methd'; did you mean 'merge_method'?"),
    "a typo in a model": ({"models": [{"modle": "a"}]}, "'models.0.model' is missing"),
    "a typo in ours": ({"subspace": {"sede": 1}}, "unknown key 'subspace.sede'; did you mean 'seed'?"),
    "a typo below ours": ({"subspace": {"adapter": {"rnk": 1}}}, "unknown key 'subspace.adapter.rnk'; did you mean 'rank'?"),
    "ours in the wrong place": ({"semantics": "peft"}, "unknown key 'semantics'; it belongs under `subspace`"),
    "an unknown method": ({"merge_method": "tise"}, "unknown merge method 'tise'; did you mean 'ties'"),
    "an unknown dtype": ({"dtype": "int8"}, "'int8' is not a dtype to merge in. Accepted: float16, bfloat16"),
    "no base": ({"base_model": None}, "'ties' needs a base_model"),
    "too many": ({"merge_method": "slerp", "models": [{"model": m} for m in "abc"]}, "'slerp' takes 1 model beside the base"),
    "only the base": (
        {"models": [{"model": "base"}]},
        "and there are 0 (the base itself does not count)",
    ),
    "none": ({"models": []}, "models: "),
    "slices": ({"slices": [{"sources": []}]}, "`slices` is not supported: layers cannot be stacked anew"),
    "modules": ({"modules": {"text": {}}}, "`modules` is not supported"),
    "tokens": ({"tokenizer": {"source": "union"}}, "`tokenizer` is not supported"),
    "a choice": ({"subspace": {"semantics": "mergkit"}}, "subspace.semantics: Input should be 'mergekit', 'peft' or 'paper'"),
    "a seed below zero": ({"subspace": {"seed": -1}}, "subspace.seed: "),
    "a size": ({"subspace": {"shard_size": "5 apples"}}, "'5 apples' is not a size such as 5GB"),
    "infinity": ({"parameters": {"lambda": float("inf")}}, "inf is not a finite number"),
    "bare names": ({"models": ["a"]}, "models.0: expected a table, as in `- model: NAME`, not 'a'"),
    "a method as parameters": ({"parameters": "ties"}, "parameters: expected a table, as in `weight: 0.5`, not 'ties'"),
    "a model that is a number": ({"models": [{"model": 3}]}, "3 does not name a model"),
}


def test_several_recipes_in_one_file() -> None:
    with pytest.raises(RecipeError, match=r"has several recipes, with --- between them\. Put each into a file of its own"):
        parse_recipe("merge_method: linear\n---\nmerge_method: ties\n")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(RecipeError) as error:
        make_recipe({**BASE, **change})
    assert message in str(error.value)


PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": (
        {"parameters": {"densty": 0.5}},
        "parameters: merge method 'ties' has no parameter 'densty'; did you mean 'density'",
    ),
    "of another method": ({"parameters": {"t": 0.5}}, "has no parameter 't'"),
    "out of range": ({"parameters": {"density": 1.5}}, "density=1.5: expected a number >= 0 and <= 1"),
    "in a gradient": ({"parameters": {"density": [0.1, -3]}}, "density=-3"),
    "in a filter": ({"parameters": {"weight": [{"filter": "mlp", "value": "much"}]}}, "weight='much': expected a number"),
    "global, of one model": (
        {"models": [{"model": "a", "parameters": {"normalize": True}}]},
        "models[0].parameters: 'normalize' is one value for all models",
    ),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_are_checked_before_any_file_is_opened(case: str) -> None:
    change, message = PARAMETERS[case]
    recipe = make_recipe({**BASE, **change})
    with pytest.raises(RecipeError) as error:
        check_parameters(recipe, recipe.method)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("merge_method: ties\nmerge_method: linear", "the key 'merge_method' is there twice"),
        ("- a", "a table with merge_method and models is expected, not list"),
        ("", "not NoneType"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("? [a]\n: b", "a key must be a name"),
        ("\x00", "is not YAML"),
        ("a: 2026-99-99", "is not YAML"),
    ],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert message in str(error.value)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="a recipe has at most"):
        load_recipe(tmp_path / "x.yaml")


NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}" for layer in range(5) for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight")),
    "model.norm.weight",
]
SETTINGS: list[Any] = [
    0.5,
    1,
    "1e-3",
    [0, 1],
    [0.1, 0.9, 0.3],
    [1],
    [{"filter": "mlp", "value": 0.25}, {"value": 0.75}],
    [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "q_proj", "value": 0.4}],
    {"filter": "*", "value": [0.2, 0.8]},
    {"value": 0.3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_are_mergekits(setting: Any) -> None:
    """`evaluate_setting` of mergekit, which is called with `idx / (layers - 1)` in layers and 0 outside."""
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed (extra `oracles`)")
    ours = make_recipe(
        {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}], "parameters": {"density": setting}}
    )
    theirs = config.MergeConfiguration.model_validate(
        {"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"density": setting}}
    )
    density = registry.get("ties").parameter("density")
    for name, depth in depths(NAMES).items():
        expected = config.evaluate_setting(name, theirs.parameters["density"], depth, validate=float)
        assert evaluate(ours.parameters["density"], name, depth, density) == expected


def test_depths_need_no_table_of_architectures() -> None:
    found = depths(NAMES)
    assert found["model.embed_tokens.weight"] == found["model.norm.weight"] == 0
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    two_towers = depths(["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "decoder.block.3.w"])
    assert two_towers == {"encoder.block.0.w": 0, "encoder.block.1.w": 1, "decoder.block.0.w": 0, "decoder.block.3.w": 1}
    assert depths(["h.0.w"]) == {"h.0.w": 1}


def test_a_models_value_comes_before_the_recipes_and_that_before_the_default() -> None:
    method = registry.get("ties")
    own: list[dict[str, Any]] = [{"weight": 2.0, "density": [Condition(value=0.1, filter="mlp")]}, {}]
    options, per_model = resolve(method, {"weight": 3.0, "lambda": 0.5}, own, "x.mlp.w", 0)
    assert options["lambda"] == 0.5
    assert options["normalize"] is True
    assert [values["weight"] for values in per_model] == [2.0, 3.0]
    assert [values["density"] for values in per_model] == [0.1, 1.0]
    assert resolve(method, {"density": 0.7}, own, "x.attn.w", 0)[1][0]["density"] == 0.7  # no filter fits: the next place


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=8))
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8
)
_KEYS = st.sampled_from([*Recipe.model_fields, "slices", "modules", "model", "parameters", "weight", "value", "filter", "x"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6), st.booleans())
def test_no_table_crashes(table: dict[str, Any], complete: bool) -> None:
    table = {**BASE, **table} if complete else table
    for read in (lambda: make_recipe(table), lambda: parse_recipe(yaml.safe_dump(table))):
        with contextlib.suppress(RecipeError):
            recipe = read()
            check_parameters(recipe, recipe.method)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_no_text_crashes(text: str | bytes) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)
