"""What a recipe may write under `subspace.learn.config` is what the configs of the adapters accept; said without torch."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.functional.choices import CHOICES
from peft_subspace.merging.learn_fields import ELSEWHERE, TYPES, check_fields
from peft_subspace.merging.learn_options import CONFIGS
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import RecipeError

CLASSES: dict[str, Any] = {"atlas": AtlasConfig, "concrete": ConcreteConfig}
POOL = {"a": "x", "b": "y"}

# method, fields, and what the message says; `None`: accepted
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("atlas", {}, None),
    ("atlas", {"granularity": "rows"}, r"granularity='rows' is not known. Accepted: 'task', 'block'"),
    ("atlas", {"constraint": "soft"}, r"constraint='soft' is not known. Accepted: null, 'nonnegative', 'softmax'"),
    ("atlas", {"constraint": None}, None),
    ("atlas", {"constraint": "softmax", "init": 0.1}, None),
    ("atlas", {"partition": 4}, r"partition=4 with granularity='block'"),
    ("atlas", {"granularity": "partition"}, r"partition=None with granularity='partition'"),
    ("atlas", {"granularity": "partition", "partition": 4, "partition_seed": 2}, None),
    ("atlas", {"granularity": "partition", "partition": 300}, r"parts from 1 to 256"),
    ("atlas", {"granularity": "partition", "partition": 0}, r"parts from 1 to 256"),
    ("atlas", {"init": {"typo": 0.3}}, r"init: 'typo': no task vector is called so; there are a, b"),
    ("atlas", {"init": {"a": 0.3}}, None),
    ("atlas", {"init": float("nan")}, r"init=nan: a finite number"),
    ("atlas", {"selected": {"w": ["c"]}}, r"selected: 'c': no task vector"),
    ("atlas", {"selected": {"w": ["a"]}, "granularity": "task"}, r"share their vectors too"),
    ("atlas", {"selected": {"w": ["a"]}, "constraint": "softmax"}, r"keep its share of one"),
    ("atlas", {"selected": {"w": ["a"]}}, None),
    ("atlas", {"fused_splits": {"qkv": 0}}, r"a positive number of parts"),
    ("atlas", {"block_types": ["linear", "lstm"]}, r"block_types=\['linear', 'lstm'\]: accepted are 'linear', 'conv'"),
    ("atlas", {"block_types": []}, r"block_types=\[\]: accepted"),
    ("atlas", {"vector_dtype": "int8"}, r"vector_dtype='int8' is not known"),
    ("atlas", {"placement": "moon"}, r"placement='moon' is not known"),
    ("concrete", {"granularity": "block"}, r"granularity='block' is not known. Accepted: 'element'"),
    ("concrete", {"temperature": -1.0}, r"temperature=-1.0 must be a positive number"),
    ("concrete", {"temperature": float("inf")}, r"temperature=inf must be"),
    ("concrete", {"coefficients": {"c": 1.0}}, r"coefficients: 'c': no task vector"),
    ("concrete", {"coefficients": {"b": 1.0}, "temperature": 1}, None),
    ("concrete", {"init": {"a": 0.3}}, r"init: the logits of the mask start at one number; .* is `coefficients`"),
    ("concrete", {"init": 2.0, "learn_coefficients": "layer", "rescale": False}, None),
    ("concrete", {"learn_coefficients": "block"}, r"learn_coefficients='block' is not known. Accepted: null, 'task', 'layer'"),
    ("concrete", {"eval_mask": "soft"}, r"eval_mask='soft' is not known"),
    ("concrete", {"save_mask": "int8"}, r"save_mask='int8' is not known"),
    ("concrete", {"save_mask": "hard"}, r"Set eval_mask: hard, or save_mask: bfloat16"),
    ("concrete", {"save_mask": "hard", "eval_mask": "hard"}, None),
]


@pytest.mark.parametrize(("method", "fields", "message"), CASES)
def test_a_recipe_and_a_config_agree(method: str, fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_fields(fields, method, POOL)
        CLASSES[method](pool=POOL, **fields)
        return
    with pytest.raises(ValueError, match=r"subspace\.learn\.config: .*" + message):
        check_fields(fields, method, POOL)
    with pytest.raises(ValueError, match=r"."):
        CLASSES[method](pool=POOL, **fields)


def test_the_choices_are_those_of_the_configs() -> None:
    """As their types say them, for editors and type checkers."""
    for method, cls in CLASSES.items():
        hints = get_type_hints(cls)
        for name, accepted in CHOICES[method].items():
            parts = get_args(hints[name]) if type(None) in get_args(hints[name]) else [hints[name]]
            said = [value for part in parts for value in ([None] if part is type(None) else get_args(part))]
            assert sorted(said, key=str) == sorted(accepted, key=str), name
        assert set(CHOICES[method]) <= set(CONFIGS[method]) <= set(hints) & set(TYPES)
        assert not set(CONFIGS[method]) & set(ELSEWHERE)


@pytest.mark.parametrize("name", ["pool", "exclude_pool", "base", "seed", "train_mask", "modules_to_save"])
@pytest.mark.parametrize("method", ["atlas", "concrete"])
def test_fields_that_belong_elsewhere_say_so(method: str, name: str) -> None:
    task = {"name": "a", "data": "a.jsonl", "text": "text"}
    table = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a"}],
        "subspace": {"learn": {"loss": "entropy", "tasks": [task], "config": {name: 1}}},
    }
    with pytest.raises(RecipeError, match=f"config: '{name}' is not written here: ") as found:
        make_recipe(table)
    assert "did you mean" not in str(found.value)
