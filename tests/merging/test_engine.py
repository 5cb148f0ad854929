"""The engine writes what the methods say, in the same bytes however it runs, in files that others read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from peft_subspace.merging import execute, make_plan, merge, verify
from peft_subspace.merging.methods.memory import merge_state_dicts, merge_tensors, spread
from peft_subspace.merging.methods.registry import get, names
from peft_subspace.merging.plan import held_bytes
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError, VerifyError
from peft_subspace.task_vectors.extract import extract_lora
from tests.merging.tiny import contents, near, random_tensors, read, recipe, trio, write

STATISTICS = [name for name in names() if get(name).statistics]
LEARNED = [name for name in names() if get(name).learned]  # by an adapter, see test_learned.py
METHODS = [name for name in names() if name not in STATISTICS + LEARNED]
OPTIONS: dict[str, dict[str, Any]] = {
    name: {
        key: value for key, value in {"density": 0.5, "lambda": 0.7}.items() if any(p.name == key for p in get(name).parameters)
    }
    for name in METHODS
}


def _models(method: str) -> str:
    return "a" if method == "slerp" else "ab" if method == "nuslerp" else "abc"


def _recipe(folder: Path, method: str, **more: Any) -> dict[str, Any]:
    table = recipe(folder, method, _models(method), parameters=OPTIONS[method], **more)
    if not any(parameter.name == "weight" for parameter in get(method).parameters):
        for entry in table["models"]:
            del entry["parameters"]
    return table


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_what_the_method_says(method: str, tmp_path: Path) -> None:
    models = trio(tmp_path, torch.bfloat16)
    merged = read(merge(_recipe(tmp_path, method), tmp_path / "out"))
    found = get(method)
    assert merged.keys() == models["base"].keys()
    for name, tensor in merged.items():
        own = [models[letter][name] for letter in _models(method)]
        per_model = [
            {"weight": 0.5 + 0.1 * n} if any(p.name == "weight" for p in found.parameters) else {} for n in range(len(own))
        ]
        base = None if found.base == "ignored" else models["base"][name]
        options, per_model = spread(found, OPTIONS[method], per_model, len(own))
        expected = merge_tensors(found, base, own, None, options, per_model, name=name)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name


def test_one_threshold_for_the_whole_model(tmp_path: Path) -> None:
    """TIES in the paper's semantics trims by the entries of all tensors together."""
    models = trio(tmp_path)
    table = recipe(tmp_path, "ties", parameters={"density": 0.3}, subspace={"semantics": "paper"})
    merged = read(merge(table, tmp_path / "out", threads=2))
    weights = [0.5, 0.6, 0.7]
    tensors = [models[name] for name in "abc"]
    expected = merge_state_dicts("ties", models["base"], tensors, weights, {"density": 0.3}, semantics="paper")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "slerp", "model_stock", "tsv_m"])
def test_the_same_bytes_for_any_threads_chunks_and_order(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio(tmp_path, torch.bfloat16, width=96)  # tensors of several blocks of 4096
    table = _recipe(tmp_path, method)
    expected = contents(merge(table, tmp_path / "out", threads=1))
    for threads, chunk, reverse in ((4, 4096, False), (3, 12288, True), (2, 2**20, True)):
        monkeypatch.setattr(execute.Settings, "chunk", chunk)
        plan = make_plan(make_recipe(table))
        if reverse:
            object.__setattr__(plan, "tensors", plan.tensors[::-1])
        found = contents(merge(table, tmp_path / f"out{chunk}", threads=threads, plan=plan))
        assert found == expected


def test_a_sharded_result_is_what_hugging_face_reads(tmp_path: Path) -> None:
    trio(tmp_path)
    whole = read(merge(recipe(tmp_path), tmp_path / "one"))
    out = merge(recipe(tmp_path, subspace={"shard_size": 5000}), tmp_path / "many")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as reader:
            found[name] = reader.get_tensor(name)
            assert reader.metadata() == {"format": "pt"}
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    verify(out)


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    from tests.pico import MODELS, run

    pico = MODELS["llama"]
    states = {}
    for seed, name in enumerate(("base", "a", "b")):
        model = pico.model(seed=seed)
        model.save_pretrained(tmp_path / name)
        states[name] = model.state_dict()
    out = merge(recipe(tmp_path, "linear", "ab", parameters={"normalize": False}, dtype="bfloat16"), tmp_path / "out")
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        expected = (0.5 * states["a"][name].double() + 0.6 * states["b"][name].double()).bfloat16()
        torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=0)
    expected_model = pico.model()
    expected_model.load_state_dict({n: t.float() for n, t in loaded.state_dict().items()})
    torch.testing.assert_close(run(loaded.float(), pico.batch()), run(expected_model, pico.batch()))


def test_dtypes(tmp_path: Path) -> None:
    trio(tmp_path)
    assert {t.dtype for t in read(merge(recipe(tmp_path), tmp_path / "1")).values()} == {torch.float32}
    assert {t.dtype for t in read(merge(recipe(tmp_path, dtype="float16"), tmp_path / "2")).values()} == {torch.float16}
    both = read(merge(recipe(tmp_path, dtype="float32", out_dtype="bfloat16"), tmp_path / "3"))
    assert {t.dtype for t in both.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "3" / "config.json").read_text()).get("dtype") is None  # the base's config had none
    write(tmp_path / "base", random_tensors(0), {"torch_dtype": "float32"})
    merge(recipe(tmp_path, out_dtype="bfloat16"), tmp_path / "4")
    assert json.loads((tmp_path / "4" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_sums_in_float64_if_asked(tmp_path: Path) -> None:
    models = trio(tmp_path)
    table = recipe(tmp_path, dtype="float64", subspace={"compute_dtype": "float64"})
    merged = read(merge(table, tmp_path / "out"))
    for name, tensor in merged.items():
        base = models["base"][name].double()
        expected = base + sum((0.5 + 0.1 * n) * (models[k][name].double() - base) for n, k in enumerate("abc"))
        torch.testing.assert_close(tensor, expected, rtol=1e-14, atol=1e-15)


# Models that do not quite fit ---------------------------------------------------------------------------------------------


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    models = trio(tmp_path)
    less = {name: tensor for name, tensor in models["a"].items() if "layers.1." not in name}
    write(tmp_path / "a", {**less, "score.weight": torch.zeros(2, 16)})
    with pytest.raises(InputError) as error:
        merge(recipe(tmp_path), tmp_path / "out")
    assert "lacks 4 tensors of the base (model.layers.1.input_layernorm.weight" in str(error.value)
    assert "has 1 that the base lacks (score.weight)" in str(error.value)
    assert "on_missing: base" in str(error.value)
    assert not (tmp_path / "out").exists()

    table = recipe(tmp_path, subspace={"on_missing": "base"})
    merged = read(merge(table, tmp_path / "base_out"))
    assert merged.keys() == models["base"].keys()
    name = "model.layers.1.mlp.up_proj.weight"
    base = models["base"][name]
    expected = base + 0.6 * (models["b"][name] - base) + 0.7 * (models["c"][name] - base)
    torch.testing.assert_close(merged[name], expected)
    skipped = read(merge(recipe(tmp_path, subspace={"on_missing": "skip"}), tmp_path / "skip_out"))
    assert skipped.keys() == less.keys()


def test_names_are_matched_by_prefix_never_by_position(tmp_path: Path) -> None:
    models = trio(tmp_path)
    bare = {name.removeprefix("model."): tensor for name, tensor in models["a"].items()}
    write(tmp_path / "a", dict(reversed(bare.items())))
    renamed = read(merge(recipe(tmp_path), tmp_path / "out"))
    write(tmp_path / "a", models["a"])
    assert all(torch.equal(renamed[n], t) for n, t in read(merge(recipe(tmp_path), tmp_path / "out2")).items())


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    trio(tmp_path)
    write(tmp_path / "a", random_tensors(1, width=24))
    with pytest.raises(InputError, match=r"15 tensors have other shapes than in the base: .*'model.layers.0.*and 10 more"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_vocabularies_of_other_sizes(tmp_path: Path) -> None:
    models = trio(tmp_path)
    longer = {**models["a"], "lm_head.weight": torch.cat([models["a"]["lm_head.weight"], torch.ones(3, 16)])}
    write(tmp_path / "a", longer)
    with pytest.raises(InputError, match=r"'lm_head.weight' has 43 rows and the base's has 40.*embeddings: truncate"):
        merge(recipe(tmp_path), tmp_path / "out")
    cut = read(merge(recipe(tmp_path, subspace={"embeddings": "truncate"}), tmp_path / "cut"))
    write(tmp_path / "a", models["a"])
    plain = read(merge(recipe(tmp_path), tmp_path / "plain"))
    assert torch.equal(cut["lm_head.weight"], plain["lm_head.weight"])

    write(tmp_path / "a", {**models["a"], "lm_head.weight": models["a"]["lm_head.weight"][:30]})
    with pytest.raises(InputError, match=r"30 rows and the base's has 40.*embeddings: pad_from_base"):
        merge(recipe(tmp_path, subspace={"embeddings": "truncate"}), tmp_path / "out")
    padded = read(merge(recipe(tmp_path, subspace={"embeddings": "pad_from_base"}), tmp_path / "pad"))["lm_head.weight"]
    base, b, c = (models[name]["lm_head.weight"] for name in ("base", "b", "c"))
    assert torch.equal(padded[:30], plain["lm_head.weight"][:30])
    torch.testing.assert_close(padded[30:], (base + 0.6 * (b - base) + 0.7 * (c - base))[30:])
    mean = read(merge(recipe(tmp_path, "linear", subspace={"embeddings": "pad_from_base"}), tmp_path / "mean"))[
        "lm_head.weight"
    ]
    torch.testing.assert_close(mean[30:], ((0.5 * base + 0.6 * b + 0.7 * c) / 1.8)[30:])


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_tied_weights(tmp_path: Path) -> None:
    models = trio(tmp_path)
    tie = {"tie_word_embeddings": True}
    write(tmp_path / "base", _tied(models["base"]), tie)
    write(tmp_path / "b", _tied(models["b"]), tie)
    write(tmp_path / "c", _tied(models["c"]), tie)
    (tmp_path / "b" / "model.safetensors.index.json").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "b")
    write(tmp_path / "b", _tied(models["b"]), tie)
    write(tmp_path / "a", {**models["a"], "lm_head.weight": models["a"]["model.embed_tokens.weight"].clone()})
    merged = read(merge(recipe(tmp_path), tmp_path / "out"))  # `a` stores the same matrix twice: fine
    assert "lm_head.weight" not in merged
    write(tmp_path / "a", models["a"])
    with pytest.raises(InputError, match=r"its 'lm_head.weight' is not its 'model.embed_tokens.weight'"):
        merge(recipe(tmp_path), tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_a_tied_head_that_is_stored_draws_like_its_embedding(method: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        tensors = near(random_tensors(0), seed) if seed else random_tensors(0)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write(tmp_path / name, tensors, {"tie_word_embeddings": True})
    merged = read(merge(_recipe(tmp_path, method), tmp_path / "out"))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_tensors_that_are_no_floats_are_copied_if_equal(tmp_path: Path) -> None:
    models = trio(tmp_path)
    for name in ("base", "a", "b", "c"):
        shutil.rmtree(tmp_path / name)
        write(tmp_path / name, {**models[name], "table": torch.arange(5), "flag": torch.tensor([True, False])})
    merged = read(merge(recipe(tmp_path, dtype="float16"), tmp_path / "out"))
    assert torch.equal(merged["table"], torch.arange(5))
    assert merged["flag"].tolist() == [True, False]
    write(tmp_path / "a", {**models["a"], "table": torch.arange(1, 6), "flag": torch.tensor([True, False])})
    with pytest.raises(InputError, match=r"a: 'table' \(I64\) is no floating-point tensor, and it differs"):
        merge(recipe(tmp_path), tmp_path / "out2")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "b"])
@pytest.mark.parametrize("method", ["ties", "della"])
def test_nan_in_a_model_ends_the_merge(method: str, where: str, value: float, tmp_path: Path) -> None:
    models = trio(tmp_path, torch.bfloat16)
    models[where]["model.layers.2.mlp.up_proj.weight"][3, 3] = value
    shutil.rmtree(tmp_path / where)
    write(tmp_path / where, models[where])
    owner = "the base" if where == "base" else str(tmp_path / "b")
    with pytest.raises(InputError) as error:
        merge(_recipe(tmp_path, method), tmp_path / "out")
    assert str(error.value).startswith(f"{owner}: 'model.layers.2.mlp.up_proj.weight' has values that are NaN or infinite.")
    assert not list(tmp_path.glob("out*"))


def test_a_result_that_does_not_fit_its_dtype(tmp_path: Path) -> None:
    base = {name: tensor * 60000 for name, tensor in random_tensors(0).items()}
    for seed, name in enumerate(("base", "a", "b", "c")):
        write(tmp_path / name, near(base, seed))
    with pytest.raises(RecipeError, match=r"do not fit F16.*wider out_dtype"):
        merge(recipe(tmp_path, out_dtype="float16"), tmp_path / "out")
    allowed = recipe(tmp_path, out_dtype="float16", subspace={"non_finite": "allow"})
    assert any(tensor.isinf().any() for tensor in read(merge(allowed, tmp_path / "out")).values())


def test_large_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c"):
        write(tmp_path / name, {"x.weight": torch.full((300, 300), 3e38)})
    merged = read(merge(recipe(tmp_path), tmp_path / "out"))["x.weight"]
    assert torch.equal(merged, torch.full((300, 300), 3e38))


def test_a_model_of_another_base_is_seen(tmp_path: Path) -> None:
    trio(tmp_path)
    write(tmp_path / "a", random_tensors(77))
    with pytest.warns(UserWarning, match=r"a: does not look like a fine-tuned .*base: the difference is 1\.\d+ times"):
        merge(recipe(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match=r"worst: .*Check base_model, or write `subspace: \{base_check: off\}`"):
        merge(recipe(tmp_path, subspace={"base_check": "error"}), tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))
    merge(recipe(tmp_path, subspace={"base_check": "off"}), tmp_path / "out3")


def test_an_adapter_with_a_trained_head_is_not_taken_for_another_model(tmp_path: Path) -> None:
    """Its head is the only whole tensor that it brings, and may have moved as far as it likes."""
    import peft

    from tests.pico import MODELS

    model = MODELS["bert"].model()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(MODELS["bert"].model(), config)
    with torch.no_grad():
        adapted.get_base_model().classifier.modules_to_save["default"].weight.add_(5.0)
    adapted.save_pretrained(str(tmp_path / "a"))
    merge(recipe(tmp_path, models="a", subspace={"base_check": "error"}), tmp_path / "out")


def test_models_are_aligned_before_they_are_merged(tmp_path: Path) -> None:
    """A model whose neurons are in another order merges as if they were not, and the manifest names the model itself."""
    from tests.pico import MODELS

    model = MODELS["llama"].model()
    model.save_pretrained(tmp_path / "base")
    state = near({name: tensor.clone() for name, tensor in model.state_dict().items()}, 1, 0.02)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "a")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for name in state:
        if "gate_proj" in name or "up_proj" in name:
            state[name] = state[name][order]
        if "down_proj" in name:
            state[name] = state[name][:, order]
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "b")
    expected = read(merge(recipe(tmp_path, models="a"), tmp_path / "plain"))
    table = recipe(tmp_path, models="b", subspace={"align": "weight_matching", "base_check": "off"})
    found = read(merge(table, tmp_path / "aligned"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert verify(tmp_path / "aligned").inputs == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "aligned", "b", "base", "plain"]
    write(tmp_path / "x", {"w": torch.zeros(3, 3)})
    simple = {"model": str(tmp_path / "x")}
    table = {"merge_method": "linear", "models": [simple, simple], "subspace": {"align": "weight_matching"}}
    with pytest.raises(RecipeError, match="cannot be aligned"):
        merge(table, tmp_path / "no")


# Tokenizers and config -----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, tokens: list[str], template: str | None = None) -> None:
    table = {"model": {"type": "WordLevel", "vocab": {token: n for n, token in enumerate(tokens)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))


def test_tokenizers(tmp_path: Path) -> None:
    trio(tmp_path)
    for name in ("base", "a", "b"):
        _tokenizer(tmp_path / name, ["x", "y"], None if name == "base" else "{{ chat }}")
    merge(recipe(tmp_path), tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    _tokenizer(tmp_path / "b", ["y", "x"])
    with pytest.raises(InputError, match=r"b: its tokenizer has other tokens than that of base \(such as 'x', 'y'\)"):
        merge(recipe(tmp_path), tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
    merge(recipe(tmp_path, tokenizer_source=str(tmp_path / "b"), chat_template="auto"), tmp_path / "chosen")
    assert (tmp_path / "chosen" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert (tmp_path / "chosen" / "chat_template.jinja").read_text() == "{{ chat }}"
    with pytest.raises(RecipeError, match="union is not supported"):
        merge(recipe(tmp_path, tokenizer_source="union"), tmp_path / "union")


def test_the_card_and_the_recipe_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    trio(tmp_path)
    out = merge(recipe(tmp_path), tmp_path / "out")
    card = (out / "README.md").read_text().split("```yaml")[0]
    assert str(tmp_path) not in card
    assert "task_arithmetic" in card


# Folders -------------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_by_mistake(tmp_path: Path) -> None:
    trio(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="already exists and holds precious, which peft_subspace did not write"):
            merge(recipe(tmp_path), tmp_path / "out", overwrite=overwrite)
        assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "out" / "precious").unlink()
    merge(recipe(tmp_path), tmp_path / "out")
    with pytest.raises(OutputError, match=r"already exists \(a result of `peft-subspace merge` with 5 files\)"):
        merge(recipe(tmp_path), tmp_path / "out")
    merge(recipe(tmp_path), tmp_path / "out", overwrite=True)
    assert not list(tmp_path.glob("out.*"))
    (tmp_path / "empty").mkdir()
    merge(recipe(tmp_path), tmp_path / "empty")
    assert read(tmp_path / "empty").keys() == read(tmp_path / "out").keys()


@pytest.mark.parametrize("out", ["a", "a/merged", ".", "link"])
def test_a_result_does_not_take_the_place_of_a_model(out: str, tmp_path: Path) -> None:
    trio(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    before = contents(tmp_path / "a"), contents(tmp_path / "base")
    with pytest.raises(OutputError, match="is, holds or lies in the model"):
        merge(recipe(tmp_path), tmp_path / out, overwrite=True)
    assert (contents(tmp_path / "a"), contents(tmp_path / "base")) == before


LORA = {"subspace": {"output": "adapter"}}
SHARDS = {"subspace": {"shard_size": 6000}}


VECTOR = {"subspace": {"output": "task_vector"}}


@pytest.mark.parametrize("table", [{}, SHARDS, VECTOR, LORA], ids=["model", "shards", "vector", "lora"])
def test_verify_fails_without_the_weights(table: dict[str, Any], tmp_path: Path) -> None:
    """Also if the manifest does not name them, or not all that the index names."""
    trio(tmp_path)
    extract_lora(str(tmp_path / "a"), str(tmp_path / "base"), tmp_path / "lora", rank=2)
    models = {"models": [{"model": str(tmp_path / "lora")}]} if table is LORA else {}
    out = merge({**recipe(tmp_path), **table, **models}, tmp_path / "out")
    verify(out)
    weights = sorted(out.glob("*.safetensors"))
    assert len(weights) > 1 or table is not SHARDS
    manifest = json.loads((out / "merge_manifest.json").read_text())
    for file in weights:
        file.unlink()
    with pytest.raises(VerifyError, match=rf"{weights[-1].name} is missing"):
        verify(out)
    del manifest["outputs"][weights[-1].name]
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match=r"names no file of weights|which model.safetensors.index.json names, is not in the"):
        verify(out)


def test_verify_sees_every_change(tmp_path: Path) -> None:
    models = trio(tmp_path)
    out = merge(recipe(tmp_path), tmp_path / "out")
    found = verify(out)
    assert (found.files, found.inputs, found.not_found) == (4, 6, [])
    weights = out / "model.safetensors"
    good = weights.read_bytes()
    for change, message in (
        (good[:-1] + bytes([good[-1] ^ 1]), "model.safetensors has other content"),
        (good[:-1], "model.safetensors has"),
    ):
        weights.write_bytes(change)
        with pytest.raises(VerifyError, match=message):
            verify(out)
    weights.write_bytes(good)
    (out / "more.safetensors").write_bytes(good)
    with pytest.raises(VerifyError, match=r"more.safetensors is not in the manifest"):
        verify(out)
    (out / "more.safetensors").unlink()
    (out / "config.json").unlink()
    with pytest.raises(VerifyError, match=r"config.json is missing"):
        verify(out)
    shutil.rmtree(out)
    merge(recipe(tmp_path), out)
    write(tmp_path / "a", near(models["a"], 9))
    with pytest.raises(VerifyError, match=r"the input .*a \(model.safetensors\) has changed"):
        verify(out)
    verify(out, inputs=False)
    shutil.rmtree(tmp_path / "a")
    assert len(verify(out).not_found) == 1
    (out / "merge_manifest.json").write_text("{}")
    with pytest.raises(VerifyError, match="is not a manifest"):
        verify(out)
    with pytest.raises(VerifyError, match="so it is no result"):
        verify(tmp_path / "base")


def test_whole_inputs_are_hashed_if_asked(tmp_path: Path) -> None:
    trio(tmp_path)
    out = merge(recipe(tmp_path), tmp_path / "out", hash_inputs=True)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert all(len(entry["sha256"]) == 64 for entry in manifest["inputs"])
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerifyError, match="has changed"):
        verify(out)


def test_statistics_of_fisher_and_regmean(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = trio(tmp_path)
    fishers, grams = {}, {}
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        fishers[name] = {key: torch.rand(tensor.shape) for key, tensor in models[name].items()}
        grams[name] = {
            key: (x := torch.randn(50, tensor.shape[1])).t() @ x for key, tensor in models[name].items() if "proj" in key
        }
        save_file(fishers[name], tmp_path / f"fisher-{name}.safetensors")
        save_file(grams[name], tmp_path / f"gram-{name}.safetensors")
    for method, files, statistics in (("fisher", "fisher", fishers), ("regmean", "gram", grams)):
        table = recipe(tmp_path, method)
        with pytest.raises(RecipeError, match=f"'{method}' needs .*statistics: FILE"):
            merge(table, tmp_path / "out")
        for name, entry in zip("abc", table["models"], strict=True):
            entry["parameters"]["statistics"] = str(tmp_path / f"{files}-{name}.safetensors")
        merged = read(merge(table, tmp_path / method))
        for key, tensor in merged.items():
            given = [statistics[name][key] for name in "abc"] if key in statistics["a"] else None
            weights = [{"weight": 0.5 + 0.1 * n, "statistics": "x"} for n in range(3)]
            found = get(method)
            job: Any = {"per_model": weights, "statistics": given, "name": key}
            if given is None:
                continue
            expected = merge_tensors(found, None, [models[name][key] for name in "abc"], **job)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_statistics_that_do_not_belong_to_the_tensors_are_refused(tmp_path: Path) -> None:
    """On the headers: a dry run says so, too."""
    from safetensors.torch import save_file

    models = trio(tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    rows, columns = models["a"][key].shape

    def plan(method: str, first: dict[str, tuple[int, ...]], second: dict[str, tuple[int, ...]]) -> None:
        table = recipe(tmp_path, method, "ab")
        for entry, shapes in zip(table["models"], (first, second), strict=True):
            path = entry["parameters"]["statistics"] = f"{entry['model']}-statistics.safetensors"
            save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
        make_plan(make_recipe(table))

    gram, diagonal = {key: (columns, columns)}, {key: (rows, columns)}
    plan("regmean", gram, gram)
    plan("fisher", diagonal, diagonal)
    cases: list[tuple[str, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], str]] = [
        ("regmean", gram, {"up_proj": (columns, columns)}, r"b-statistics\S+: up_proj: neither \S+b nor its base has such"),
        ("regmean", gram, diagonal, rf"b-statistics\S+: '{key}' is \[{rows}, {columns}\], \[{columns}, {columns}\] exp"),
        (
            "regmean",
            {"model.norm.weight": (1,)},
            gram,
            r"'model\.norm\.weight' is \[1\], none expected: regmean takes the Gram",
        ),
        ("fisher", {key: (3, 3)}, diagonal, rf"a-statistics\S+: '{key}' is \[3, 3\], \[{rows}, {columns}\] expected"),
        ("fisher", diagonal, {}, rf"{key}: \S+b has no statistics of it, and another model has"),
    ]
    for method, first, second, message in cases:
        with pytest.raises(InputError, match=message):
            plan(method, first, second)
    with pytest.raises(RecipeError, match="align changes the order of neurons, and statistics belong to the models"):
        make_recipe(recipe(tmp_path, "fisher", "ab", subspace={"align": "weight_matching"}))


def test_statistics_are_found_as_the_models_tensors_are(tmp_path: Path) -> None:
    """Under another prefix, of a head that is tied or left out, and of rows that the merge truncates."""
    from safetensors.torch import save_file

    def merged(case: str, base: dict[str, Tensor], own: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
        folder = tmp_path / case
        settings = {"tie_word_embeddings": case == "tied"}
        write(folder / "base", base, settings)
        table = recipe(folder, "fisher", "ab", **fields)
        for seed, (name, entry) in enumerate(zip("ab", table["models"], strict=True), 1):
            write(folder / name, {key: value + seed for key, value in own.items()}, settings)
            files = {key: (value + seed).square() for key, value in own.items()}
            files |= {"lm_head.weight": torch.rand(40, 8)} if case == "tied" else {}
            entry["parameters"]["statistics"] = str(folder / f"{name}.safetensors")
            save_file(files, folder / f"{name}.safetensors")
        return read(merge(table, folder / "out"))

    whole = random_tensors(0)
    expected = merged("same", whole, whole)
    body = {key: value for key, value in whole.items() if key != "lm_head.weight"}
    bare = {key.removeprefix("model."): value for key, value in body.items()}
    longer = {k: torch.cat([v, v[:3]]) if "embed" in k or "lm_head" in k else v for k, v in whole.items()}
    cases: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]] = {
        "tied": (body, body, {}),
        "prefix": (bare, body, {}),
        "left out": (body, whole, {"on_missing": "base"}),
        "truncated": (whole, longer, {"embeddings": "truncate"}),
    }
    for case, (base, own, subspace) in cases.items():
        found = merged(case, base, own, subspace=subspace)
        assert found.keys() == base.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key if key in expected else f"model.{key}"]), (case, key)


def test_fewer_workers_keep_more_of_a_tensor() -> None:
    room = [held_bytes(threads) for threads in range(1, 65)]
    assert room == sorted(room, reverse=True)
    assert room[0] > 4 * 2 * 2048 * 5504
    assert room[1] > 2 * (2 * 2 * 2048 * 5504)  # each of two workers has both ends of a slerp
    assert room[-1] > 0


def test_threads_leave_torch_as_it_was(tmp_path: Path) -> None:
    trio(tmp_path)
    before = torch.get_num_threads()
    merge(recipe(tmp_path), tmp_path / "out", threads=2)
    assert torch.get_num_threads() == before
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
