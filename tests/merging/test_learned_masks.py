"""Merges by a saved Concrete adapter: the very bits that it merges into by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_subspace import ConcreteConfig
from peft_subspace.merging import execute, make_plan, merge, verify
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError
from tests.merging.test_learned import learn
from tests.merging.tiny import contents, read
from tests.pico import MODELS
from tests.pools import vector_of, write_vector

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned"),  # random vectors are as large as the base
]


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "concrete", "subspace": {"learned": str(folder / "adapter"), **more.pop("subspace", {})}, **more}


def learn_dense(folder: Path, name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A base, two task-vector files and a saved adapter on disk; the merged model."""
    base: Any = MODELS[name].model(dtype)
    base.save_pretrained(folder / "base")
    pool = {f"v{k}": write_vector(folder / f"v{k}.safetensors", vector_of(MODELS[name].model(), k)) for k in range(3)}
    base = type(base).from_pretrained(folder / "base", dtype=dtype).train(False)
    model: Any = get_peft_model(base, ConcreteConfig(pool=pool, base=str(folder / "base"), init_weights=False, **fields))
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload()


FIELDS: dict[str, dict[str, Any]] = {
    "mean": {},
    "bfloat16": {"save_mask": "bfloat16"},
    "sample": {"eval_mask": "sample", "seed": 4, "temperature": 0.7},
    "hard": {"eval_mask": "hard"},
    "packed": {"eval_mask": "hard", "save_mask": "hard"},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "packed rows": {"granularity": "row", "eval_mask": "hard", "save_mask": "hard"},
    "not rescaled": {"rescale": False},
    "coefficients of layers": {"learn_coefficients": "layer", "coefficients": {"v0": 0.5, "v2": 1.7}},
    "one coefficient a vector": {"learn_coefficients": "task", "clamp_coefficients": False, "coefficients": -0.4},
    "one vector off": {"coefficients": {"v1": 0.3}},
    "some parameters left out": {"block_types": ["linear"], "exclude_modules": ["c_proj", "lm_head"]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_replay_has_the_bits_of_the_adapters_own_merge(fields: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2: Conv1D stores linear weights the other way round; tied embeddings."""
    if fields.get("granularity") in ("row", "column"):
        fields = {**fields, "exclude_modules": ["wte", "lm_head"]}  # they are tied, and are not masked in parts
    state = learn_dense(tmp_path, "gpt2", **fields).state_dict()
    found = read(merge(recipe(tmp_path), tmp_path / "out"))
    base = read(tmp_path / "base")
    assert found.keys() == base.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, base[name]) for name, tensor in found.items())
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "resnet"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    merged = learn_dense(tmp_path, name, strict=name != "resnet")  # weights of BatchNorm are left out
    merge(recipe(tmp_path), tmp_path / "out")
    own = type(merged).from_pretrained(tmp_path / "out").state_dict()
    for key, wanted in merged.state_dict().items():
        assert torch.equal(own[key], wanted), key


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    state = learn_dense(tmp_path, "llama", torch.bfloat16).state_dict()
    found = read(merge(recipe(tmp_path), tmp_path / "out"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_vectors_of_low_rank_agree_to_a_rounding(tmp_path: Path) -> None:
    """The adapter multiplies factors whose coefficients are in them; the merge adds deltas."""
    merged = learn(tmp_path, "llama", kind=ConcreteConfig)
    state = merged.state_dict()
    for name, tensor in read(merge(recipe(tmp_path), tmp_path / "out")).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)


def test_the_same_bytes_for_any_threads_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn_dense(tmp_path, "gpt2", eval_mask="sample")
    monkeypatch.setattr(execute, "TILE", 4096)
    expected = contents(merge(recipe(tmp_path), tmp_path / "out", threads=1))
    for threads, chunk in ((4, 4096), (3, 12288), (2, 2**20)):
        monkeypatch.setattr(execute.Settings, "chunk", chunk)
        assert contents(merge(recipe(tmp_path), tmp_path / f"out-{threads}", threads=threads)) == expected


def test_masks_that_cannot_be_replayed(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True, kind=ConcreteConfig, granularity="rank")
    with pytest.raises(InputError, match=r"directions of low-rank vectors .* `save_task_vector`"):
        make_plan(make_recipe(recipe(tmp_path)))


@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_another_size_and_without_values(packed: bool, tmp_path: Path) -> None:
    learn_dense(tmp_path, "llama", **({"eval_mask": "hard", "save_mask": "hard"} if packed else {}))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith((".logits", ".mask")))
    save_file({**tensors, key: tensors[key].reshape(-1)[:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=re.escape(key.removeprefix("base_model.model.")) + ".* is expected. Save the adapter again"
    ):
        make_plan(make_recipe(recipe(tmp_path)))
    if not packed:
        save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match="not finite"):
            merge(recipe(tmp_path), tmp_path / "out")
