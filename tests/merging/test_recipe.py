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
from peft_subspace.merging.methods.checks import turns_signs
from peft_subspace.merging.parameters import check_filters, check_parameters, depths, evaluate, resolve, uses
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


ANCHORS = """
x-shared: &shared {density: 0.5, weight: 0.3}
x-models:
  - &first {model: a, parameters: {<<: *shared, weight: 0.7}}
merge_method: ties
base_model: base
models:
  - *first
  - model: b
    parameters:
      <<: [*shared, {weight: 0.9, gamma: 1}]
      density: 0.2
"""


def test_anchors_merge_keys_and_helper_keys_are_read_as_by_mergekit() -> None:
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed (extra `oracles`)")
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(ANCHORS))
    ours = parse_recipe(ANCHORS)
    assert [one.parameters for one in ours.models] == [one.parameters for one in theirs.models]
    assert ours.models[0].parameters == {"density": 0.5, "weight": 0.7}
    assert "x-" not in ours.to_yaml()
    assert parse_recipe(ours.to_yaml()) == ours
    with pytest.raises(RecipeError, match="the key 'weight' is there twice"):
        parse_recipe(ANCHORS.replace("<<: *shared, weight: 0.7", "<<: *shared, weight: 0.7, weight: 0.8"))
    with pytest.raises(RecipeError, match=r"unknown key 'shared'.*for anchors may stand under a key that begins with x-"):
        parse_recipe(ANCHORS.replace("x-shared", "shared"))
    with pytest.raises(RecipeError, match=r"unknown key 'models\.0\.x-note'"):
        parse_recipe(ANCHORS.replace("{model: a,", "{model: a, x-note: 1,"))


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


LISTS: dict[str, tuple[Any, str]] = {
    "empty": ([], "density: [] says no value. Write a number, or leave 'density' out"),
    "empty in a filter": ([{"filter": "mlp", "value": []}], "density: [] says no value"),
    "a filter after the value for all": (
        [{"value": 0.5}, {"filter": "mlp", "value": 0.1}],
        "density: the filter 'mlp' stands after the value for all tensors (0.5), so nothing comes to it. Move",
    ),
    "a filter after a star": (
        [{"filter": "*", "value": 0.5}, {"filter": "mlp", "value": 0.1}],
        "density: the filter 'mlp' stands after",
    ),
    "two values for all": ([{"value": 0.5}, {"value": 0.1}], "density: the value stands after the value for all tensors (0.5)"),
}


@pytest.mark.parametrize("where", ["parameters", "models[0].parameters"])
@pytest.mark.parametrize("case", LISTS)
def test_lists_that_say_nothing_are_refused(case: str, where: str) -> None:
    setting, message = LISTS[case]
    own = {"parameters": {"density": setting}}
    recipe = make_recipe({**BASE, **own} if where == "parameters" else {**BASE, "models": [{"model": "a", **own}]})
    with pytest.raises(RecipeError) as error:
        check_parameters(recipe, recipe.method)
    assert f"{where}: {message}" in str(error.value)


FILTERS: dict[str, tuple[list[Any], str | None]] = {
    "of all kinds": ([{"filter": "mlp", "value": 1}, {"filter": "*", "value": 1}], None),
    "a typo": ([{"filter": "self_atn", "value": 1}], "filter 'self_atn' is in no tensor's name; did you mean 'self_attn'?"),
    "of another model": ([{"filter": "experts", "value": 1}], "in no tensor's name; parts of their names are embed_tokens,"),
    "of a tied head": ([{"filter": "lm_head", "value": 1}], "the base's file has no head of its own. One that is tied"),
    "behind a wider one": (
        [{"filter": "mlp", "value": 1}, {"filter": "mlp.up", "value": 2}],
        "the filter 'mlp.up' is in the names of 5 tensors, and filters before it count for all of them",
    ),
    "nothing left for the value for all": ([{"filter": "model.", "value": 1}, {"value": 2}], None),
}


@pytest.mark.parametrize("case", FILTERS)
def test_a_filter_that_no_tensor_is_left_for_is_refused(case: str) -> None:
    setting, message = FILTERS[case]
    recipe = make_recipe({**BASE, "models": [{"model": "a", "parameters": {"weight": setting}}]})
    if message is None:
        check_filters(recipe, NAMES)
        return
    with pytest.raises(RecipeError) as error:
        check_filters(recipe, NAMES)
    assert "models[0].parameters: weight: " in str(error.value)
    assert message in str(error.value)


def test_what_a_value_is_used_for() -> None:
    own = {"weight": [{"filter": "mlp", "value": [0, 1]}, {"filter": "embed", "value": 0.25}], "density": 0.5}
    shared = {"weight": [{"filter": "q_proj", "value": 3}, {"value": 2.0}], "normalize": True}
    recipe = make_recipe({**BASE, "models": [{"model": "a", "parameters": own}, {"model": "b"}], "parameters": shared})
    found = [(use.model, use.parameter, use.text, use.tensors) for use in uses(recipe, recipe.method, NAMES)]
    assert found == [
        ("a", "weight", "'mlp': 0, 1 from the first layer to the last", 5),
        ("a", "weight", "'embed': 0.25", 1),
        ("a", "weight", "'q_proj': 3", 5),
        ("a", "weight", "2", 1),
        ("b", "weight", "'q_proj': 3", 5),
        ("b", "weight", "2", 7),
        ("a", "density", "0.5", 12),
        ("b", "density", "1 (default)", 12),
        (None, "normalize", "true", 12),
    ]


@pytest.mark.parametrize("name", ["linear", "slerp", "nuslerp", "multislerp", "ties", "della", "breadcrumbs", "sce"])
@pytest.mark.parametrize("setting", ["none fits", "all", "none fits, but for all models"])
def test_a_list_without_a_value_for_the_rest_is_mergekits(name: str, setting: str) -> None:
    """mergekit raises where it demands the parameter, and takes its default for the others."""
    base = pytest.importorskip("mergekit.merge_methods.registry", reason="mergekit is not installed (extra `oracles`)")
    resolver = pytest.importorskip("mergekit.parameter_resolver")
    config = pytest.importorskip("mergekit.config")
    spec, method = base.get(name).spec, registry.get(name)
    for theirs in spec.parameters:
        ours = method.parameter(theirs.name)
        assert ours.demanded == theirs.required
        if isinstance(ours.default, bool):
            continue
        value = {"lambda": 0.5, "t": 0.5}.get(ours.name, 1)
        filters = [Condition(value=value, filter="mlp" if setting == "all" else "nothing")]
        own = {ours.name: [config.ConditionalParameter(value=value, filter=one.filter) for one in filters]}
        shared = {ours.name: value} if "but for all" in setting else {}

        def resolved(name: str = ours.name, own: Any = own, shared: Any = shared, theirs: Any = theirs) -> Any:
            return resolver.resolve_parameter(theirs, [own, shared], tensor_name="x.mlp.w")

        tables = ({**shared}, [{ours.name: filters}]) if ours.scope == "model" else ({**shared, ours.name: filters}, [{}])
        if ours.scope == "global" and shared:
            continue  # one place only
        if theirs.required and setting == "none fits":
            with pytest.raises(RuntimeError, match="Missing required parameter"):
                resolved()
            with pytest.raises(ValueError, match=rf"no filter of '{ours.name}' is in its name.*`- value: "):
                resolve(method, *tables, "x.mlp.w", 0)
            continue
        options, (per_model,) = resolve(method, *tables, "x.mlp.w", 0)
        assert {**options, **per_model}[ours.name] == resolved()


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


@pytest.mark.parametrize(
    ("name", "weights", "turns"),
    [
        *[(name, (0.5, -1.0), True) for name in ("linear", "nuslerp", "multislerp", "karcher", "regmean", "fisher", "ties")],
        *[(name, (1.0, -0.5), name in ("fisher", "ties", "della", "knots")) for name in registry.names()],
        *[(name, (1.0, 0.5), False) for name in registry.names()],
    ],
)
def test_which_methods_turn_a_negative_weight(name: str, weights: tuple[float, float], turns: bool) -> None:
    method = registry.get(name)
    options = {parameter.name: parameter.default for parameter in method.parameters if parameter.scope == "global"}
    assert turns_signs(method, options, weights, "mergekit") == turns
    if "majority_sign_method" in options:  # the others count those that agree
        assert not turns_signs(method, options, weights, "peft")
    assert not turns_signs(method, {**options, "normalize": False}, weights, "mergekit") or "normalize" not in options


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
