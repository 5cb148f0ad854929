"""No field of a config is forgotten: its value is part of what a vector is known by, changes nothing, or is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peft_subspace
from peft_subspace.task_vectors.adapter_fields import CHANGES, NO_EFFECT, OTHER_LORA, changing
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.models import open_source
from peft_subspace.task_vectors.pool import open_pool
from peft_subspace.task_vectors.provenance import digest, identity, record_of
from peft_subspace.task_vectors.readers import READERS, WAYS_OUT
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.methods import METHODS
from tests.pico import MODELS

FORMATS: dict[str, Any] = {"LORA": peft.LoraConfig, "FLORA": peft_subspace.FloraConfig, "SVFIT": peft_subspace.SvfitConfig}
# A value of each field that its update depends on, other than that of the adapter in the test.
OTHER: dict[str, Any] = {
    "r": 3, "lora_alpha": 5, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True,
    "fan_in_fan_out": True, "init_lora_weights": "pissa", "target_parameters": ["q_proj.weight"], "scale": 3.0,
    "scale_pattern": {"q_proj": 3.0}, "nonnegative": True, "svd": "full", "basis_dtype": "float16",
}  # fmt: skip


def saved(kind: str, folder: Path) -> tuple[Path, Path]:
    """Base and adapter on disk."""
    model: Any = MODELS["llama"].model()
    model.save_pretrained(folder / "base")
    start = {"init_lora_weights": False} if kind == "LORA" else {"init_weights": False}
    wrapped = peft.get_peft_model(model, FORMATS[kind](r=2, target_modules=["q_proj"], **start))
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def edit(adapter: Path, **fields: Any) -> None:
    """Write other values into the config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def known_by(adapter: Path, base: Path) -> str:
    return digest(identity(record_of("it", open_source(str(adapter)), open_source(str(base)))))


def test_every_method_is_read_or_has_a_way_out() -> None:
    assert set(READERS) == set(FORMATS) == set(CHANGES) == set(NO_EFFECT)
    assert {method.config.method for method in METHODS.values()} <= {*READERS, *WAYS_OUT}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_field_stands_in_one_place(kind: str) -> None:
    """A new field fails here, of ours or of a newer PEFT: find out whether the update depends on it."""
    fields = {field.name for field in dataclasses.fields(FORMATS[kind])}
    places = [set(CHANGES[kind]), NO_EFFECT[kind], set(OTHER_LORA) if kind == "LORA" else set()]
    assert set().union(*places) == fields
    assert sum(map(len, places)) == len(fields)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in FORMATS for name in CHANGES[kind]])
def test_a_field_that_changes_the_update_is_part_of_what_it_is_known_by(kind: str, name: str, tmp_path: Path) -> None:
    base, adapter = saved(kind, tmp_path)
    before = known_by(adapter, base)
    edit(adapter, **{name: "relative" if (kind, name) == ("SVFIT", "scale") else OTHER[name]})
    assert known_by(adapter, base) != before


@pytest.mark.filterwarnings("ignore:The task vector 'it' says that it was made for")
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in FORMATS for n in sorted(NO_EFFECT[k]) if n != "peft_type"])
def test_a_field_without_effect_changes_no_value(kind: str, name: str, tmp_path: Path) -> None:
    base, adapter = saved(kind, tmp_path)
    before, names = known_by(adapter, base), TaskVector.open(adapter, base)
    values = {key: names[key] for key in names}
    if (kind, name) == ("LORA", "use_dora"):  # the file tells by itself
        edit(adapter, use_dora=True)
        with pytest.raises(InputError, match="lora_magnitude_vector are expected"):
            TaskVector.open(adapter, base)
        return
    edit(adapter, **{name: "something"})
    after = TaskVector.open(adapter, base)
    assert list(after) == list(values)
    assert all(torch.equal(after[key], value) for key, value in values.items())
    assert known_by(adapter, base) == before
    shapes = {key: value.shape for key, value in MODELS["llama"].model().named_parameters()}
    (entry,) = open_pool({"it": str(adapter)}, shapes, base=str(base))
    with_base = open_source(str(base)) if kind == "SVFIT" else None
    assert entry.digest == digest(identity(record_of("it", open_source(str(adapter)), with_base)))


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_noted_before_is_noted_still(kind: str) -> None:
    """The fingerprints of files with defaults in later fields stay as they were."""
    first = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "scale", "scale_pattern")
    config = FORMATS[kind](target_modules=["q_proj"]).to_dict()
    config["peft_type"] = kind
    assert changing(config) == {key: config[key] for key in first if config.get(key) is not None}
    assert changing({**config, "peft_type": "BROUGHT"}) == changing(config)  # a format that another package reads


def test_a_field_that_is_not_known_here_is_warned_of(tmp_path: Path) -> None:
    base, adapter = saved("LORA", tmp_path)
    edit(adapter, off_by_default=False, of_tomorrow={"x": 1})
    with pytest.warns(UserWarning, match=r"its config has of_tomorrow, which this version.*merge_and_unload"):
        TaskVector.open(adapter, base)
