"""Merges by a saved adapter: the model that the adapter itself merges into, without data, model or graph."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.functional.groups import groups_from
from peft_subspace.merging import execute, make_plan, merge, verify
from peft_subspace.merging.learned import Learned
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.merging.tiny import contents, read
from tests.pico import MODELS
from tests.pools import vector_of, write_vector

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),  # PEFT, of every tied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned"),  # random vectors are as large as the base
]


def fine_tuned(base: nn.Module, seed: int) -> nn.Module:
    """The base and something small."""
    with torch.no_grad():
        for name, values in vector_of(base, seed, scale=0.05).items():
            base.get_parameter(name).add_(values)
    return base


def learn(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, low_rank: bool = False, kind: Any = AtlasConfig, **fields: Any
) -> nn.Module:
    """A base, a pool of all kinds of vectors (of LoRAs only with `low_rank`) and a saved adapter on disk; the merged model."""
    base: Any = MODELS[name].model(dtype)
    base.save_pretrained(folder / "base")
    pool: dict[str, Any] = {}
    for number in range(2 if low_rank else 1):
        targets = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query"]}.get(name, "all-linear")
        layout = {"fan_in_fan_out": name == "gpt2"}
        lora = LoraConfig(r=2 + number, lora_alpha=3, target_modules=targets, init_lora_weights=False, **layout)
        get_peft_model(MODELS[name].model(dtype), lora).save_pretrained(folder / f"lora{number}")
        pool[f"lora{number}"] = str(folder / f"lora{number}")
    if not low_rank:
        whole: Any = fine_tuned(MODELS[name].model(dtype), 1)
        whole.save_pretrained(folder / "whole")
        small = vector_of(base.float(), 2, rank=2, scale=0.05)
        pool |= {"whole": str(folder / "whole"), "file": write_vector(folder / "file.safetensors", small)}
    base = type(base).from_pretrained(folder / "base", dtype=dtype)
    base.train(False)
    config = kind(pool=pool, base=str(folder / "base"), init_weights=False, **fields)
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload()  # type: ignore[no-any-return, operator]


def recipe(folder: Path, *models: str, **more: Any) -> dict[str, Any]:
    table = {"merge_method": "atlas", "subspace": {"learned": str(folder / "adapter"), **more.pop("subspace", {})}, **more}
    return {**table, "models": [{"model": str(folder / name)} for name in models]} if models else table


def compare(folder: Path, merged: nn.Module, found: dict[str, Tensor]) -> None:
    """All tensors of the base's file, against the model that the adapter merged into."""
    state = merged.state_dict()
    assert found.keys() == read(folder / "base").keys()
    for name, tensor in found.items():
        wanted = state[name]
        assert tensor.dtype == wanted.dtype
        # both sum in float32 in the order of the vectors, one from the base on and one from zero, and round once
        spread = float(torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(tensor, wanted, rtol=2 * spread, atol=4 * spread, msg=lambda text, n=name: f"{n}: {text}")


GRANULARITIES: dict[str, dict[str, Any]] = {
    "block": {},
    "task": {"granularity": "task"},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "partition": {"granularity": "partition", "partition": 7, "partition_seed": 3},
    "nonnegative": {"constraint": "nonnegative"},
    "softmax": {"constraint": "softmax"},
    "softmax of rows": {"constraint": "softmax", "granularity": "row"},
    "tied blocks": {"tie_blocks": [["weight", "bias"]]},
    "fused": {"fused_splits": {"c_attn.weight": 3}},
    "norms only": {"block_types": ["norm", "bias"]},
}


@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES)
def test_a_replay_is_the_adapters_own_merge(fields: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2: Conv1D stores linear weights the other way round."""
    if fields.get("granularity") in ("row", "column", "partition") or "fused_splits" in fields:
        fields = {**fields, "exclude_modules": ["wte", "lm_head"]}  # they are tied, and have one coefficient a vector
    merged = learn(tmp_path, "gpt2", **fields)
    compare(tmp_path, merged, read(merge(recipe(tmp_path), tmp_path / "out")))


@pytest.mark.parametrize("name", ["llama", "llama, tied", "bert", "vit", "resnet", "t5"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Tied tensors, class tokens, convolutions, statistics of BatchNorm, and names that transformers changes on loading."""
    merged = learn(tmp_path, name, strict=name != "resnet")  # weights of BatchNorm are left out
    merge(recipe(tmp_path), tmp_path / "out")
    own = type(merged).from_pretrained(tmp_path / "out").state_dict()  # type: ignore[attr-defined]
    for key, wanted in merged.state_dict().items():
        torch.testing.assert_close(own[key], wanted, rtol=3e-7, atol=5e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    merged = learn(tmp_path, "llama", torch.bfloat16)
    compare(tmp_path, merged, read(merge(recipe(tmp_path), tmp_path / "out")))


def test_modules_that_were_trained_whole_come_along(tmp_path: Path) -> None:
    """A new head is in the adapter's file, and the base's own head is replaced by it."""
    merged = learn(tmp_path, "bert", modules_to_save=["classifier"], exclude_modules=["classifier"])
    key = "base_model.model.classifier.weight"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors[key] = torch.full_like(tensors[key], 0.5)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    found = read(merge(recipe(tmp_path), tmp_path / "out"))
    assert torch.equal(found.pop("classifier.weight"), tensors[key])
    own = merged.state_dict()
    assert all(torch.allclose(tensor, own[name], rtol=0, atol=1e-6) for name, tensor in found.items())
    note = make_plan(make_recipe(recipe(tmp_path, subspace={"output": "task_vector"}))).notes
    assert any("classifier" in text and "not part of the task vector" in text for text in note)


def test_the_same_bytes_for_any_threads_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(tmp_path, "gpt2", granularity="partition", partition=5, exclude_modules=["wte", "lm_head"])
    monkeypatch.setattr(execute, "TILE", 4096)
    expected = contents(merge(recipe(tmp_path), tmp_path / "out", threads=1))
    for threads, chunk in ((4, 4096), (3, 12288), (2, 2**20)):
        monkeypatch.setattr(execute.Settings, "chunk", chunk)
        assert contents(merge(recipe(tmp_path), tmp_path / f"out-{threads}", threads=threads)) == expected


@pytest.mark.parametrize("swapped", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_groups_of_a_range_are_those_of_the_whole(axis: int, swapped: int) -> None:
    """Against the index of every entry in the canonical layout; a swap is within each of `swapped` groups."""
    canonical = (8, 6, 5)
    index = torch.arange(canonical[axis]).view([-1 if a == axis else 1 for a in range(3)]).expand(canonical)
    native = index.unflatten(0, (swapped, -1)).transpose(1, 2).flatten(0, 1) if swapped else index
    spec = {"count": canonical[axis], "axis": axis, "length": 2, "swapped": swapped}
    groups = groups_from(spec, tuple(native.shape))
    device = torch.device("cpu")
    whole = native.reshape(-1) // 2
    assert torch.equal(groups.part(0, whole.numel(), device), whole)
    assert torch.equal(groups.part(37, 101, device), whole[37:101])


def edit(path: Path, **fields: Any) -> None:
    """Change an adapter's config as another version, or a hand, would."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("fields", [{}, {"constraint": "nonnegative"}, {"granularity": "row"}])
def test_vectors_that_a_block_leaves_out_stay_out(fields: dict[str, Any], tmp_path: Path) -> None:
    """A file may have numbers for them, which the adapter does not use."""
    selected = {"model.layers.0.mlp.up_proj.weight": ["whole"], "model.layers.1.self_attn.q_proj.weight": ["lora0", "file"]}
    if "granularity" in fields:
        fields = {**fields, "exclude_modules": ["embed_tokens", "lm_head"]}
    learn(tmp_path, "llama", selected={**selected, "model.norm.weight": []}, **fields)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(values, 0.7) for name, values in load_file(file).items()}, file, metadata={"format": "pt"})
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()  # type: ignore[operator]
    found = read(merge(recipe(tmp_path), tmp_path / "out"))
    compare(tmp_path, merged, found)
    assert torch.equal(found["model.norm.weight"], read(tmp_path / "base")["model.norm.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraint": "bogus"}, r"constraint: 'bogus', which is not known. Accepted: null, 'nonnegative', 'softmax'"),
        ({"nonnegative": True}, r"nonnegative: true, of an older version.* now `constraint: \"nonnegative\"`"),
    ],
)
def test_constraints_that_are_not_known_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    edit(tmp_path / "adapter" / "adapter_config.json", **fields)
    with pytest.raises(InputError, match=message):
        make_plan(make_recipe(recipe(tmp_path)))
    edit(tmp_path / "adapter" / "adapter_config.json", constraint="nonnegative", nonnegative=False)
    assert make_plan(make_recipe(recipe(tmp_path))).learned is not None  # nonnegative: false says nothing


# Outputs -----------------------------------------------------------------------------------------------------------------


def test_a_task_vector_file_is_what_the_adapter_saves(tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    folder = merge(recipe(tmp_path, subspace={"output": "task_vector"}), tmp_path / "out")
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    model: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model.base_model.save_task_vector(tmp_path / "own.safetensors")
    found, own = TaskVector.open(folder / "task_vector.safetensors"), TaskVector.open(tmp_path / "own.safetensors")
    assert found.shapes == own.shapes
    for name in found:
        torch.testing.assert_close(found[name], own[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["cat", "exact", None])
def test_low_rank_vectors_make_an_exact_adapter(method: str | None, tmp_path: Path) -> None:
    """Stacked factors times their coefficients: nothing of the weight's size; rank 2 + 3."""
    merged = learn(tmp_path, "llama", low_rank=True)
    subspace = {"output": "adapter", **({"adapter": {"method": method}} if method else {})}
    folder = merge(recipe(tmp_path, subspace=subspace), tmp_path / "out")
    base = type(MODELS["llama"].model()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    plain: Any = PeftModel.from_pretrained(base, folder).merge_and_unload()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 5
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_parts_of_a_weight_are_no_sum_of_factors(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True, granularity="row")
    table = recipe(tmp_path, subspace={"output": "adapter", "adapter": {"method": "exact"}})
    with pytest.raises(RecipeError, match=r"exact is for weighted sums .* Use `dense` with atlas"):
        merge(table, tmp_path / "out")


# Where things are --------------------------------------------------------------------------------------------------------


def test_a_moved_pool_is_known_by_its_hashes_in_any_order(tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    expected = read(merge(recipe(tmp_path), tmp_path / "out"))
    for name in ("lora0", "whole", "base"):
        shutil.move(tmp_path / name, tmp_path / f"moved-{name}")
    shutil.move(tmp_path / "file.safetensors", tmp_path / "moved.safetensors")
    with pytest.raises(InputError, match=r"'.*base': there is no such folder"):
        make_plan(make_recipe(recipe(tmp_path)))
    table = recipe(tmp_path, "moved.safetensors", "moved-lora0", "moved-whole", base_model=str(tmp_path / "moved-base"))
    plan = make_plan(make_recipe(table))
    assert [Path(name).name for name in plan.names] == ["moved-lora0", "moved-whole", "moved.safetensors"]
    found = read(merge(table, tmp_path / "again"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    verify(tmp_path / "again")
    assert "| Learned | `adapter` |" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("kind", [AtlasConfig, ConcreteConfig])
def test_bundled_vectors_are_merged_without_the_pool(kind: Any, tmp_path: Path) -> None:
    method = kind.method.lower()
    learn(tmp_path, "llama", kind=kind, bundle_vectors=True)
    table = {"merge_method": method, "subspace": {"learned": str(tmp_path / "adapter")}}
    folder = merge(table, tmp_path / "out")
    assert "vectors/whole.safetensors" in (folder / "merge_recipe.yaml").read_text()
    own = {**table, "models": [{"model": str(tmp_path / name)} for name in ("lora0", "whole", "file.safetensors")]}
    expected = read(merge(own, tmp_path / "pool"))
    for name in ("lora0", "whole", "file.safetensors"):
        shutil.move(tmp_path / name, tmp_path / f"moved-{name}")
    found = read(merge(table, tmp_path / "again"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    written = make_recipe(yaml.safe_load((tmp_path / "again" / "merge_recipe.yaml").read_text()))
    found = read(merge(written, tmp_path / "third"))  # it lists the vectors of the bundle
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    path = tmp_path / "adapter" / "vectors" / "whole.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    with pytest.raises(InputError, match=r"'whole': .*whole\.safetensors is not the file that was saved with the adapter"):
        make_plan(make_recipe(table))


def test_other_vectors_and_bases_are_refused_by_name(tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    other: Any = fine_tuned(MODELS["llama"].model(), 5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"the task vector 'whole': .*other is not the one .* learned with \(.*whole\)"):
        make_plan(make_recipe(recipe(tmp_path, "lora0", "other", "file.safetensors")))
    with pytest.raises(InputError, match=r"the task vector 'whole': none of the models is not the one"):
        make_plan(make_recipe(recipe(tmp_path, "lora0", "file.safetensors")))
    with pytest.raises(InputError, match=r"models: .*other is none of the task vectors .* \(lora0, whole, file\)"):
        make_plan(make_recipe(recipe(tmp_path, "lora0", "whole", "file.safetensors", "other")))
    with pytest.raises(InputError, match=r"the task vector 'whole': .* or .*other is not its base \(.*base\)"):
        make_plan(make_recipe(recipe(tmp_path, base_model=str(tmp_path / "other"))))
    write_vector(tmp_path / "file.safetensors", vector_of(MODELS["llama"].model(), 9))
    with pytest.raises(InputError, match=r"the task vector 'file': .*file.safetensors is not the one"):
        make_plan(make_recipe(recipe(tmp_path)))


def test_another_base_of_loras_is_seen_by_its_values(tmp_path: Path) -> None:
    """No hash of the base is kept where no vector needs it; 64 of its values are."""
    learn(tmp_path, "llama", low_rank=True)
    other: Any = fine_tuned(MODELS["llama"].model(), 5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"the base is not the one that .*adapter was learned on: the values of model\."):
        make_plan(make_recipe(recipe(tmp_path, base_model=str(tmp_path / "other"))))
    narrow: Any = MODELS["llama"].model(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    assert make_plan(make_recipe(recipe(tmp_path, base_model=str(tmp_path / "narrow")))).learned is not None


def test_the_result_does_not_take_the_adapters_place(tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    with pytest.raises(OutputError, match=r"is, holds or lies in the model .*adapter"):
        merge(recipe(tmp_path), tmp_path / "adapter", overwrite=True)


# What cannot be replayed -------------------------------------------------------------------------------------------------


def test_recipes_that_do_not_go_together(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"merge_method": "atlas"}, r"'atlas' merges by what was learned: write `subspace: \{learned: ADAPTER\}`"),
        ({**recipe(tmp_path, "lora0"), "merge_method": "linear"}, r"subspace.learned goes with methods that are learned"),
        ({"merge_method": "linear"}, r"the models to merge are missing"),
        (recipe(tmp_path, subspace={"align": "weight_matching"}), r"subspace.align changes the models"),
        (recipe(tmp_path, parameters={"density": 0.5}), r"merge method 'atlas' has no parameter 'density'"),
        (recipe(tmp_path, subspace={"learned": f"{tmp_path / 'base'}+{tmp_path / 'lora0'}"}), r"names two things"),
    ]
    for table, message in cases:
        with pytest.raises(RecipeError, match=message):
            make_plan(make_recipe(table))
    for place, message in (
        ("lora0", r"lora0 is LORA, and a saved ATLAS adapter is expected"),
        ("base", r"is a model,"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan(make_recipe(recipe(tmp_path, subspace={"learned": str(tmp_path / place)})))


def _change(folder: Path, key: str, value: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["provenance"][key] = value
    path.write_text(json.dumps(config))


def test_adapters_that_are_not_whole(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True)
    plan = make_plan(make_recipe(recipe(tmp_path)))
    assert isinstance(plan.learned, Learned)
    blocks = plan.learned.blocks
    name = next(iter(blocks))
    _change(tmp_path, "blocks", {**blocks, name: {"coefficients": "no.such"}})
    with pytest.raises(InputError, match=r"its file has no tensor 'no\.such'\. Save the adapter again"):
        make_plan(make_recipe(recipe(tmp_path)))
    _change(tmp_path, "blocks", {**blocks, name: {**blocks[name], "groups": {"count": 3}}})
    with pytest.raises(InputError, match=re.escape("is [2], and [2, 3] is expected")):
        make_plan(make_recipe(recipe(tmp_path)))
    _change(tmp_path, "blocks", {**blocks, "model.nowhere.weight": blocks[name]})
    with pytest.raises(InputError, match=r"composes model\.nowhere\.weight, which the base.s file does not have"):
        make_plan(make_recipe(recipe(tmp_path)))
    _change(tmp_path, "blocks", None)
    with pytest.raises(InputError, match=r"does not say which task vectors and blocks .* save it again"):
        make_plan(make_recipe(recipe(tmp_path)))


@pytest.mark.parametrize("left_out", ["embed_tokens", "lm_head"])
def test_half_of_a_tied_tensor(left_out: str, tmp_path: Path) -> None:
    """Composing one side alone parts it from the other, and the result has both."""
    merged = learn(tmp_path, "llama, tied", exclude_modules=[left_out])
    found = read(merge(recipe(tmp_path), tmp_path / "out"))
    assert set(found) == {*read(tmp_path / "base"), "lm_head.weight"}
    state = merged.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name], rtol=3e-7, atol=3e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_coefficients_that_are_not_finite(tmp_path: Path) -> None:
    learn(tmp_path, "llama", low_rank=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has coefficients that are not finite"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_a_plan_needs_no_torch(tmp_path: Path) -> None:
    learn(tmp_path, "llama")
    (tmp_path / "recipe.yaml").write_text(f"merge_method: atlas\nsubspace: {{learned: {tmp_path / 'adapter'}}}\n")
    program = (
        "import sys\n"
        "from peft_subspace_cli import main\n"
        f"sys.argv = ['peft-subspace', 'merge', {str(tmp_path / 'recipe.yaml')!r}, '--dry-run']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert re.search(r"Method +atlas \(aTLAS", done.stdout)
    assert re.search(r"Model +\S*whole", done.stdout)
    assert re.search(r"Learned +\S*adapter", done.stdout)
