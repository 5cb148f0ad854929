"""The same recipe file through mergekit 0.1.5 and through us gives the same model, for methods that draw nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peft_subspace.merging import merge
from peft_subspace.merging.planner import make_plan
from peft_subspace.merging.recipe import make_recipe
from tests.merging.tiny import near, read
from tests.pico import MODELS

merge_module = pytest.importorskip("mergekit.merge", reason="mergekit is not installed (extra `oracles`)")

GRADIENT: list[Any] = [
    {"filter": "mlp", "value": [0.2, 0.9]},
    {"filter": "self_attn", "value": 0.7},
    {"value": 0.4},
]
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "linear": ("linear", {}, [{"weight": 0.3}, {"weight": GRADIENT}]),
    "linear, not normalised": ("linear", {"normalize": False}, [{"weight": 0.3}, {"weight": [0.1, 0.5, 0.2]}]),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.8}, [{"weight": 0.5}, {"weight": -0.3}]),
    "ties": ("ties", {"density": 0.5}, [{"weight": 0.5}, {"weight": GRADIENT, "density": 0.3}]),
    "ties, not normalised": (
        "ties",
        {"normalize": False, "int8_mask": True},
        [{"weight": 1.0}, {"weight": 0.5, "density": 0.3}],
    ),
    "slerp": ("slerp", {"t": GRADIENT}, [{}]),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.1}, [{"weight": 0.5}, {"weight": 0.4}]),
    "model_stock": ("model_stock", {}, [{}, {}]),
    "nuslerp": ("nuslerp", {}, [{"weight": 0.6}, {"weight": 0.3}]),
    "sce": ("sce", {"select_topk": 0.4}, [{}, {}]),
    "karcher": ("karcher", {}, [{}, {}]),
}


# What happens to a model with a negative weight: method, options, weights; whether it is added, and not taken away.
NEGATIVE: dict[str, tuple[str, dict[str, Any], tuple[float, float], bool]] = {
    "the sum is above 0": ("linear", {}, (1.0, -0.5), False),
    "the sum is below 0": ("linear", {}, (0.5, -1.0), True),
    "linear, as they are": ("linear", {"normalize": False}, (0.5, -1.0), False),
    "task_arithmetic": ("task_arithmetic", {}, (0.5, -1.0), False),
    "task_arithmetic, divided": ("task_arithmetic", {"normalize": True}, (0.5, -1.0), True),
    "ties": ("ties", {}, (1.0, -0.5), True),
    "ties, as they are": ("ties", {"normalize": False}, (1.0, -0.5), False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NEGATIVE)
def test_a_negative_weight_that_is_divided_by_a_negative_sum_is_warned_of(case: str, tmp_path: Path) -> None:
    """A value that only the second model changes: mergekit adds the change where the warning says so."""
    method, shared, weights, added = NEGATIVE[case]
    model = MODELS["llama"].model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name, first = "model.norm.weight", torch.zeros_like(base["model.norm.weight"])
    for label, place in (("base", None), ("a", 0), ("b", 1)):
        first.zero_()
        if place is not None:
            first[place] = 0.1
        model.load_state_dict({**base, name: base[name] + first})
        model.save_pretrained(tmp_path / label)
    entries = [{"model": str(tmp_path / label), "parameters": {"weight": weights[n]}} for n, label in enumerate("ab")]
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": shared, "dtype": "float32"}
    if method != "linear":
        recipe["base_model"] = str(tmp_path / "base")
    plan = make_plan(make_recipe(recipe))
    noted = [note for note in plan.notes if "has a negative weight" in note]
    assert len(noted) == added
    if added:
        assert noted[0].startswith(str(tmp_path / "b"))
    config = merge_module.MergeConfiguration.model_validate(recipe)
    merge_module.run_merge(config, str(tmp_path / "theirs"), merge_module.MergeOptions(copy_tokenizer=False, quiet=True))
    change = read(tmp_path / "theirs")[name] - base[name] * (sum(weights) if case == "linear, as they are" else 1)
    assert (float(change[1]) > 0) == added


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_same_recipe_gives_the_same_model(case: str, tmp_path: Path) -> None:
    method, shared, own = CASES[case]
    model = MODELS["llama"].model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, name in enumerate(("base", *"ab"[: len(own)])):
        model.load_state_dict(near(base, seed, 0.02) if seed else base)
        model.save_pretrained(tmp_path / name)
    entries = [{"model": str(tmp_path / "ab"[n]), **({"parameters": table} if table else {})} for n, table in enumerate(own)]
    recipe = {"merge_method": method, "models": entries, "parameters": shared, "dtype": "float32"}
    if method not in ("linear", "karcher", "nuslerp"):
        recipe["base_model"] = str(tmp_path / "base")
    if method == "slerp":
        recipe["models"] = [{"model": str(tmp_path / "base")}, *entries]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = merge_module.MergeConfiguration.model_validate(yaml.safe_load((tmp_path / "recipe.yaml").read_text()))
    options = merge_module.MergeOptions(copy_tokenizer=False, quiet=True)
    merge_module.run_merge(config, str(tmp_path / "theirs"), options)
    merge(tmp_path / "recipe.yaml", tmp_path / "ours")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
