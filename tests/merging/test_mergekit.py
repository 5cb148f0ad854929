"""The same recipe file through mergekit 0.1.5 and through us gives the same model, for methods that draw nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peft_subspace.merging import merge
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
