"""Merges by a saved Concrete adapter: the very bits that it merges into by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.merging import execute, make_plan, merge, verify
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError, RecipeError
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


# A mask before other methods ---------------------------------------------------------------------------------------------


def masked(folder: Path, method: str, models: Any, mask: bool, **more: Any) -> dict[str, Any]:
    subspace = {"mask": str(folder / "adapter")} if mask else {}
    return {
        "merge_method": method, "base_model": str(folder / "base"), "models": [{"model": str(path)} for path in models],
        "subspace": {**subspace, **more.pop("subspace", {})}, **more,
    }  # fmt: skip


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic": ("task_arithmetic", {}),
    "TIES, rows": ("ties", {"parameters": {"density": 0.4}}),
    "TIES, the whole model": ("ties", {"parameters": {"density": 0.4}, "subspace": {"semantics": "paper"}}),
    "DARE": ("dare_linear", {"parameters": {"density": 0.5}}),
    "DELLA": ("della", {"parameters": {"density": 0.5}}),
    "matrices": ("tsv_m", {}),
    "wide sums": ("task_arithmetic", {"subspace": {"compute_dtype": "float64"}}),
}


@pytest.mark.parametrize(("method", "more"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("fields", ["mean", "sample", "packed", "row", "some parameters left out"])
def test_a_mask_before_a_method_is_that_method_on_masked_vectors(
    method: str, more: dict[str, Any], fields: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "TILE", 4096)
    monkeypatch.setattr(execute.Settings, "chunk", 4096)
    given = FIELDS[fields] | ({"exclude_modules": ["wte", "lm_head"]} if fields == "row" else {})
    learn_dense(tmp_path, "gpt2", **given)
    plain = [tmp_path / f"v{k}.safetensors" for k in range(3)]
    base = type(MODELS["gpt2"].model()).from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    written = list(model.base_model.save_masked_vectors(tmp_path / "masked").values())
    for path, own in zip(plain, written, strict=True):  # what is not masked stays as it is, and is not in the files
        tensors = load_file(own)
        write_vector(path, {name: value for name, value in load_file(path).items() if name in tensors})
    found = read(merge(masked(tmp_path, method, plain, True, **more), tmp_path / "out"))
    wanted = read(merge(masked(tmp_path, method, written, False, **more), tmp_path / "wanted"))
    assert found.keys() == wanted.keys()
    # sums in float64 see the masked difference before the file rounds it to float32
    tolerance = (
        {"rtol": 2.0**-22, "atol": 2.0**-22} if more.get("subspace", {}).get("compute_dtype") else {"rtol": 0, "atol": 0}
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], **tolerance)
    unmasked = read(merge(masked(tmp_path, method, plain, False, **more), tmp_path / "unmasked"))
    assert any(not torch.equal(tensor, unmasked[name]) for name, tensor in found.items())
    verify(tmp_path / "out")


def test_a_mask_before_learned_coefficients(tmp_path: Path) -> None:
    learn_dense(tmp_path, "llama")
    (tmp_path / "adapter").rename(tmp_path / "mask")
    pool = {f"v{k}": str(tmp_path / f"v{k}.safetensors") for k in range(3)}
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")
    mask = PeftModel.from_pretrained(base, tmp_path / "mask").base_model
    paths = mask.save_masked_vectors(tmp_path / "masked")
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")
    start = dict(zip(pool, (0.2, 0.5, -0.3), strict=True))
    model = get_peft_model(base, AtlasConfig(pool=pool, base=str(tmp_path / "base"), init=start))
    model.save_pretrained(tmp_path / "adapter")
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")
    wanted = get_peft_model(base, AtlasConfig(pool=paths, base=str(tmp_path / "base"), init=start)).merge_and_unload()
    asked = {"merge_method": "atlas", "subspace": {"learned": str(tmp_path / "adapter"), "mask": str(tmp_path / "mask")}}
    state = wanted.state_dict()
    for name, tensor in read(merge(asked, tmp_path / "out")).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "linear"}, "differences from a base_model, and merge_method 'linear' averages whole weights"),
        ({"subspace": {"align": "weight_matching"}}, "a mask belongs to them as they are"),
        ({"merge_method": "concrete", "subspace": {"learned": "x"}}, "has the mask of subspace.learned"),
        (
            {
                "merge_method": "atlas",
                "subspace": {"learn": {"loss": "entropy", "tasks": [{"name": "t", "data": "rows.csv", "text": "text"}]}},
            },
            "write masked ones with save_masked_vectors",
        ),
    ],
)
def test_a_mask_that_does_not_go_with_a_recipe(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    asked = masked(tmp_path, "ties", ["a", "b"], True)
    asked = {**asked, **change, "subspace": {**asked["subspace"], **change.get("subspace", {})}}
    with pytest.raises(RecipeError, match=re.escape(message)):
        make_recipe(asked)


def test_a_mask_that_is_none(tmp_path: Path) -> None:
    learn_dense(tmp_path, "llama")
    asked = masked(tmp_path, "ties", [tmp_path / f"v{k}.safetensors" for k in range(3)], True)
    asked["subspace"]["mask"] = str(tmp_path / "v0.safetensors")
    with pytest.raises(InputError, match=r"subspace\.mask: .* is a task vector, and a saved CONCRETE adapter is expected"):
        make_plan(make_recipe(asked))


def test_a_mask_of_another_base_is_refused(tmp_path: Path) -> None:
    learn_dense(tmp_path, "llama")
    asked = masked(tmp_path, "ties", [tmp_path / f"v{k}.safetensors" for k in range(3)], True)
    other: Any = MODELS["llama"].model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"the base is not the one that .* was learned on"):
        make_plan(make_recipe({**asked, "base_model": str(tmp_path / "other")}))


def test_a_mask_of_directions_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True, kind=ConcreteConfig, granularity="rank")
    with pytest.raises(InputError, match="directions of low-rank vectors"):
        make_plan(make_recipe(masked(tmp_path, "task_arithmetic", [tmp_path / "lora0"], True)))


def test_a_masked_task_vector_is_verified_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    """The mask is an input like the models: its files are in the manifest, and a journal belongs to them."""
    learn_dense(tmp_path, "llama")
    models = [tmp_path / f"v{k}.safetensors" for k in range(3)]
    asked = masked(tmp_path, "ties", models, True, subspace={"output": "task_vector"})
    merge(asked, tmp_path / "out")
    verify(tmp_path / "out")
    inputs = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["inputs"]
    assert (str(tmp_path / "adapter"), "adapter_model.safetensors") in [(entry["model"], entry["file"]) for entry in inputs]

    class Killed(BaseException):
        pass

    def kill(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        merge(asked, tmp_path / "again", progress=kill)
    merge(asked, tmp_path / "again", resume=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_masked_adapter_is_written_by_its_leading_directions(tmp_path: Path) -> None:
    """A mask of entries leaves no factors: an exact sum of factors would leave the mask out."""
    learn(tmp_path, "llama", low_rank=True, kind=ConcreteConfig)
    models = [tmp_path / f"lora{k}" for k in range(2)]
    asked = masked(tmp_path, "task_arithmetic", models, True, subspace={"output": "adapter", "adapter": {"method": "exact"}})
    with pytest.raises(RecipeError, match="is dense \\(masked"):
        merge(asked, tmp_path / "out")
    asked["subspace"]["adapter"] = {"rank": 64}
    merge(asked, tmp_path / "out")
    whole = read(merge({**asked, "subspace": {"mask": asked["subspace"]["mask"]}}, tmp_path / "model"))
    base: Any = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")
    own = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-5)
