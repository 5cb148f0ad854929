"""What lies on people's disks: folders saved twice, files that were not fetched, wrong paths, models of other kinds."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_subspace
from peft_subspace import AtlasConfig
from peft_subspace.merging import make_plan, merge
from peft_subspace.merging.learning import learn
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.errors import InputError, OutputError
from peft_subspace.task_vectors.pickles import pickles_allowed
from peft_subspace.task_vectors.references import locate
from peft_subspace.task_vectors.sources import open_checkpoint
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.merging import learn_cases
from tests.merging.tiny import near, read, recipe, trio
from tests.pico import MODELS, run

pytestmark = pytest.mark.filterwarnings("ignore:.*does not look like a fine-tuned")


def llama(seed: int = 0, scale: float = 1.0, **options: Any) -> Any:
    """A Llama with some noise."""
    model: Any = MODELS["llama"].model()
    if seed:
        model.load_state_dict(near(model.state_dict(), seed, 0.02 * scale))
    return model


def one(folder: Path, model: str = "model", base: str = "base", **more: Any) -> dict[str, Any]:
    """A recipe that puts one model onto the base as it is."""
    entry = {"model": str(folder / model), "parameters": {"weight": 1.0}}
    return {"merge_method": "task_arithmetic", "base_model": str(folder / base), "models": [entry], **more}


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB")])
def test_a_folder_that_was_saved_twice_is_what_transformers_loads(sizes: tuple[str, str], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    for seed, size in enumerate(sizes, 1):
        llama(seed).save_pretrained(tmp_path / "model", max_shard_size=size)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    with pytest.warns(UserWarning, match=r"two sets of weights, model.safetensors and those of model.*index.json \(mod"):
        out = merge(one(tmp_path), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in read(out).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


def test_an_index_of_the_one_file_is_no_second_set(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "m")
    names = dict.fromkeys(load_file(tmp_path / "m" / "model.safetensors"), "model.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(tmp_path / "m").tensors.keys() == names.keys()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_one(file: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "model")):
        llama(seed).save_pretrained(tmp_path / name, max_shard_size="20KB" if "index" in file else "5GB")
        (tmp_path / name / file).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{file} is a git-lfs pointer, .* a file of 123,456 bytes.*git lfs pull"):
        merge(one(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_a_git_lfs_pointer_in_an_adapter(file: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "model")
    if file.endswith("bin"):
        (tmp_path / "model" / "adapter_model.safetensors").unlink()
    (tmp_path / "model" / file).write_text(POINTER)
    with pickles_allowed(True, tmp_path), pytest.raises(InputError, match=rf"{file} is a git-lfs pointer"):
        TaskVector.open(tmp_path / "model", tmp_path / "base")


def test_a_wrong_path_names_where_it_was_looked_for_and_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fine-tuned", "models/llama-math", "models/other"):
        Path(name).mkdir(parents=True)
    cases = {
        "finetuned": f"'finetuned': there is no such folder or file in {tmp_path} (but 'fine-tuned'), and it is not in",
        "models/lama-math": "there is no such folder or file: models has no 'lama-math' (but 'llama-math'), and it is not in",
        "model/llama-math": f"there is no such folder or file in {tmp_path} (but 'models'), and it is not in the Hub's cache",
        f"{tmp_path}/models/othr/x": f"file: {tmp_path}/models has no 'othr' (but 'other'), and it is not a Hub id",
        "zzz": f"there is no such folder or file in {tmp_path}, and it is not in the Hub's cache",
    }
    for name, expected in cases.items():
        with pytest.raises(InputError) as error:
            locate(name, None)
        assert expected in str(error.value)
        assert len(str(error.value).replace(str(tmp_path), "")) < 220


def test_a_model_of_another_architecture_is_called_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    bert: Any = MODELS["bert"].model()
    bert.save_pretrained(tmp_path / "model")
    expected = r"model \(a BertForSequenceClassification\) has 0 of the 21 tensors of .*base \(a LlamaForCausalLM\): it is"
    for policy in ("error", "base", "skip"):
        with pytest.raises(InputError, match=expected):
            make_plan(make_recipe(one(tmp_path, subspace={"on_missing": policy})))
    with pytest.raises(InputError, match=expected):
        TaskVector.open(tmp_path / "model", tmp_path / "base")
    with pytest.raises(InputError, match=expected):
        peft.get_peft_model(llama(), AtlasConfig(pool={"v": str(tmp_path / "model")}, base=str(tmp_path / "base")))


VOCABULARIES: dict[str, dict[str, Any]] = {
    "embeddings trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings stored": {"target_modules": ["q_proj", "embed_tokens"]},
    "a LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`", "ignore:Could not find a config file")
@pytest.mark.parametrize("case", VOCABULARIES)
def test_an_adapter_with_a_larger_vocabulary_says_what_to_do(case: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    larger = llama()
    rows = larger.config.vocab_size + 4
    larger.resize_token_embeddings(rows)
    larger.save_pretrained(tmp_path / "larger")
    model = peft.get_peft_model(larger, peft.LoraConfig(r=2, init_lora_weights=False, **VOCABULARIES[case]))
    expected = run(model.eval(), MODELS["llama"].batch())
    model.save_pretrained(tmp_path / "model", save_embedding_layers=case != "a LoRA on the head")
    with pytest.raises(InputError, match=rf"has {rows} rows and the base's has {rows - 4}.*resize_token_embeddings\({rows}\)"):
        make_plan(make_recipe(one(tmp_path)))
    out = merge(one(tmp_path, base="larger"), tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(run(found.eval(), MODELS["llama"].batch()), expected, rtol=1e-4, atol=1e-5)
    if case == "embeddings trained whole":
        cut = read(merge(one(tmp_path, subspace={"embeddings": "truncate"}), tmp_path / "cut"))
        assert torch.equal(cut["model.embed_tokens.weight"], read(out)["model.embed_tokens.weight"][:-4])


@pytest.mark.filterwarnings("ignore:You have set bias='all'", "ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize("kind", ["LoRA", "SVFit"])
def test_all_biases_with_a_head_leave_no_other_tensors(kind: str, tmp_path: Path) -> None:
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    base: Any = MODELS["bert"].model()
    base.save_pretrained(tmp_path / "base")
    if kind == "LoRA":
        config: Any = peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    else:
        config = peft_subspace.SvfitConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    model = peft.get_peft_model(load(tmp_path / "base"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = run(model.eval(), MODELS["bert"].batch())
    model.save_pretrained(tmp_path / "model")
    found, info = load(merge(one(tmp_path), tmp_path / "out"), output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    torch.testing.assert_close(run(found.eval(), MODELS["bert"].batch()), expected, rtol=1e-4, atol=1e-5)


def test_a_learned_folder_that_is_none_is_not_replaced_and_says_so(tmp_path: Path) -> None:
    learn_cases.classifiers(tmp_path)
    folder = tmp_path / "out.learned"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError) as error:
            learn(make_recipe(learn_cases.recipe(tmp_path)), tmp_path / "out", overwrite=overwrite)
        assert "already exists and holds mine.txt, which peft_subspace did not write" in str(error.value)
        assert "--overwrite" not in str(error.value)
    assert (folder / "mine.txt").is_file()


def test_pickles_in_two_sets_are_what_transformers_loads(tmp_path: Path) -> None:
    trio(tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "p")
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "p" / "pytorch_model.bin")
    other = {name: value + 1 for name, value in tensors.items()}
    torch.save(other, tmp_path / "p" / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "p" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pickles_allowed(True, tmp_path):
        found = read(merge(recipe(tmp_path, models="p"), tmp_path / "out"))
    expected = read(merge(recipe(tmp_path, models="a"), tmp_path / "out2"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    save_file(tensors, tmp_path / "p" / "model.safetensors")


def test_a_head_that_an_adapter_brings_to_an_encoder_is_said_with_the_way_to_load_it(tmp_path: Path) -> None:
    model = peft.get_peft_model(MODELS["bert"].model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = run(model.eval(), MODELS["bert"].batch())
    model.save_pretrained(tmp_path / "model")
    encoder: Any = MODELS["bert"].model()
    encoder.bert.save_pretrained(tmp_path / "base")
    labels = expected.shape[1]
    plan = make_plan(make_recipe(one(tmp_path)))
    assert any(f"from_pretrained(OUT, num_labels={labels})" in note for note in plan.notes)
    out = merge(one(tmp_path), tmp_path / "out")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(out, num_labels=labels)
    torch.testing.assert_close(run(found.eval(), MODELS["bert"].batch()), expected, rtol=1e-4, atol=1e-5)
