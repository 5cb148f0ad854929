"""What a config refuses before there is a model, and what it writes and reads."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, get_peft_config

from peft_subspace import FloraConfig, __version__

FIELDS = ["target_modules", "r_spatial", "rank_pattern", "metrics"]  # some of those that a message must list
BAD_FIELDS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"target_module": ["q"]}, TypeError, ["'target_module'", "Did you mean 'target_modules'", "Accepted: ", *FIELDS]),
    ({"ranks": 8, "droput": 0.1}, TypeError, ["'droput', 'ranks'", "Did you mean 'dropout' instead of 'droput'?"]),
    ({"lora_alpha": 16}, TypeError, ["FloraConfig got an unexpected keyword argument 'lora_alpha'", *FIELDS]),
    ({"r": 0}, ValueError, ["r=0", "positive integer", "list"]),
    ({"r": -3}, ValueError, ["r=-3", "positive integer"]),
    ({"r": True}, ValueError, ["r=True", "positive integer"]),
    ({"r": 2.5}, ValueError, ["r=2.5", "positive integer"]),
    ({"r": "8"}, ValueError, ["r='8'", "positive integer"]),
    ({"r": []}, ValueError, ["r=[]", "positive integer"]),
    ({"r": [4, 0]}, ValueError, ["r=[4, 0]", "one per mode"]),
    ({"r_spatial": 0}, ValueError, ["r_spatial=0", "positive integer"]),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, ["q_proj=0", "positive integer"]),
    ({"dropout": 1.0}, ValueError, ["dropout=1.0", "at least 0 and less than 1"]),
    ({"dropout": -0.1}, ValueError, ["dropout=-0.1", "at least 0 and less than 1"]),
    ({"init_weights": "pissa"}, ValueError, ["init_weights='pissa'", "True, False, 'orthogonal', 'gradient'"]),
    ({"energy": 0.0}, ValueError, ["energy=0.0", "(0, 1]"]),
    ({"energy": 1.01}, ValueError, ["energy=1.01", "(0, 1]"]),
    ({"layers_pattern": "h"}, ValueError, ["layers_pattern='h'", "layers_to_transform"]),
    (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        ValueError,
        ["'.*q_proj'", "layers_to_transform", "into the expression"],
    ),
    ({"task_type": "CAUSAL"}, ValueError, ["CAUSAL"]),
    ({"peft_subspace_version": "one"}, ValueError, ["'one'", "not a version"]),
]


@pytest.mark.parametrize(("fields", "error", "parts"), BAD_FIELDS, ids=[", ".join(map(str, f)) for f, *_ in BAD_FIELDS])
def test_a_bad_field_is_refused(fields: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as refused:
        FloraConfig(**fields)
    for part in parts:
        assert part in str(refused.value), refused.value


@pytest.mark.parametrize("fields", [{"layers_to_transform": 0, "layers_pattern": "h"}, {"energy": 1.0}, {"dropout": 0}])
def test_the_ends_of_a_range_are_accepted(fields: dict[str, Any]) -> None:
    config = FloraConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


FULL = {
    "r": [4, 3],
    "r_spatial": [2, 1],
    "scale": 0.5,
    "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "all-conv"],
    "exclude_modules": ["lm_head"],
    "rank_pattern": {"q_proj": [2, 2], r"layers\.1\..*": 3},
    "scale_pattern": {"q_proj": 2.0},
    "metrics": {"accuracy": 0.93},
    "task_type": "CAUSAL_LM",
    "init_weights": "orthogonal",
}


@pytest.mark.parametrize("reader", [PeftConfig, FloraConfig])
def test_what_is_written_is_read(reader: type[PeftConfig], tmp_path: Path) -> None:
    config = FloraConfig(**FULL)
    config.save_pretrained(str(tmp_path))
    found = reader.from_pretrained(str(tmp_path))
    assert type(found) is FloraConfig
    assert found.to_dict() == config.to_dict()
    assert found.peft_subspace_version == __version__


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, order in (("a", 1), ("b", -1)):
        config = FloraConfig(target_modules=["q", "k", "v", "o", "gate"][::order], exclude_modules=["x", "y", "z"][::order])
        config.save_pretrained(str(tmp_path / folder))
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == (tmp_path / "b" / "adapter_config.json").read_bytes()


def test_it_can_be_copied_and_made_from_a_dictionary() -> None:
    config = FloraConfig(**FULL)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), get_peft_config(config.to_dict())):
        assert type(twin) is FloraConfig
        assert twin == config
        assert twin is not config


def edited(folder: Path, **changes: Any) -> str:
    FloraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize("reader", [PeftConfig, FloraConfig])
@pytest.mark.parametrize("version", ["0.99.0", "1.0", "2.1.3.dev4"])
def test_a_newer_version_is_refused(version: str, reader: type[PeftConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"saved by peft_subspace {version}, .*Install peft_subspace>={version}"):
        reader.from_pretrained(edited(tmp_path, peft_subspace_version=version))


@pytest.mark.parametrize("reader", [PeftConfig, FloraConfig])
def test_a_newer_version_with_an_unknown_key_is_refused_by_both_names(reader: type[PeftConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved by peft_subspace 0\.99\.0.*\['whitening'\].*Install peft_subspace>=0\.99\.0"):
        reader.from_pretrained(edited(tmp_path, peft_subspace_version="0.99.0", whitening=True))


@pytest.mark.parametrize("reader", [PeftConfig, FloraConfig])
def test_an_unknown_key_of_the_same_version_is_reported(reader: type[PeftConfig], tmp_path: Path) -> None:
    """PEFT itself adds keys to every config from time to time: refusing them would tie us to one release."""
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['arrow'\]"):
        config = reader.from_pretrained(edited(tmp_path, arrow=1))
    assert config.r == 4


@pytest.mark.parametrize("version", [__version__, f"{__version__}.dev1", f"{__version__}.post3"])
def test_a_patch_release_is_read(version: str, tmp_path: Path) -> None:
    assert FloraConfig.from_pretrained(edited(tmp_path, peft_subspace_version=version)).r == 4


def test_a_value_in_a_file_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="r=0: `r` should be a positive integer"):
        PeftConfig.from_pretrained(edited(tmp_path, r=0))


@pytest.mark.parametrize(
    ("key", "weight", "expected"),
    [
        ("model.layers.0.q_proj", "weight", 2),
        ("model.layers.1.q_proj", "weight", 3),  # an exact name wins over an expression
        ("model.layers.10.v_proj", "weight", 8),  # an expression matches whole names only
        ("model.layers.0.v_proj", "weight", 4),
        ("attention", "in_proj_weight", 6),  # a weight of a layer wins over the layer
        ("attention", "out_proj.weight", 5),
    ],
)
def test_patterns(key: str, weight: str, expected: int) -> None:
    table = {
        "q_proj": 2,
        r"layers\.[0-9]\.v_proj": 4,
        "model.layers.1.q_proj": 3,
        "attention": 5,
        "attention.in_proj_weight": 6,
    }
    config = FloraConfig(r=8, rank_pattern=table)
    assert config.for_layer(key, weight).r == expected
    assert config.r == 8
