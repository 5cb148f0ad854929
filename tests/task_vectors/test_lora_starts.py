"""LoRAs that took a part out of their base when they were initialised: as PEFT merges them, or refused by name."""

from __future__ import annotations

import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_subspace import AtlasConfig, ConcreteConfig
from peft_subspace.cli import app as cli
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.merging.run import merge
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.lora_starts import STARTS, part_taken
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.pico import MODELS, Pico, run

REBUILT = ("pissa", "olora")
AS_IT_WAS = (True, False, "gaussian", "eva", "orthogonal", "mica")
REFUSED = {"corda": "made of data", "lora_ga": "gradients", "loftq": "quantised", "pissa_niter_4": "random approximation"}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled": ("llama", {"lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}),
    "rslora and patterns": (
        "llama",
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
            "target_modules": ["q_proj", "up_proj"],
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "DoRA": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
}


def trained(pico: Pico, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Path, nn.Module]:
    """Base and adapter on disk, and the model that was trained, which is what the adapter means."""
    model: Any = pico.model(dtype)
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, **options})
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter", wrapped.eval()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Its own values, merged."""
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    return {name: value.clone() for name, value in merged.state_dict().items()}


def check(vector: TaskVector, base: Path, after: dict[str, Tensor]) -> None:
    """Base and vector are the merged model."""
    before = load_file(base / "model.safetensors")
    for name, value in before.items():
        found = value + vector[name] if name in vector.shapes else value
        torch.testing.assert_close(found, after[name], rtol=1e-5, atol=2e-6)


def with_start(adapter: Path, value: Any) -> None:
    """Write another `init_lora_weights` into the config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": value}))


def starts_of_peft() -> set[str]:
    """Every value that the installed PEFT asks its configs for: in the type of the field, and in the code."""
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = {str(value) for part in typing.get_args(hint) for value in typing.get_args(part)}
    code = inspect.getsource(LoraLayer.update_layer) + inspect.getsource(LoraLayer.reset_lora_parameters)
    pattern = r'init_lora_weights(?:\.lower\(\))?(?: == |\.startswith\()"(\w+)"'
    return {value.replace("[number of iters]", "4") for value in named} | set(re.findall(pattern, code))


def test_every_start_of_peft_is_known() -> None:
    """A new one in a newer PEFT fails here: find out whether it changes the base."""
    known = {*map(str, REBUILT), *(str(value) for value in AS_IT_WAS), *REFUSED}
    assert starts_of_peft() <= known
    assert starts_of_peft() >= {"pissa", "olora", "corda", "loftq", "lora_ga", "mica", "eva", "orthogonal", "gaussian"}
    for value in (*REBUILT, *AS_IT_WAS, None):
        assert part_taken("it", value) == (value if value in REBUILT else None)
    assert {name for name, reason in STARTS.items() if reason} | {"pissa_niter_4"} == set(REFUSED)


@pytest.mark.parametrize("value", [*REFUSED, "pissa_niter_16", "kasa", "pissa_of_tomorrow", 7])
def test_what_cannot_be_made_again_is_refused(value: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained(MODELS["llama"], tmp_path, target_modules=["q_proj"])
    with_start(adapter, value)
    reason = REFUSED.get(value, "random approximation" if value == "pissa_niter_16" else "not known here")
    with pytest.raises(InputError, match=rf"init_lora_weights={value!r} .*{reason}.*merge_and_unload") as error:
        TaskVector.open(adapter, base)
    converts = value in ("corda", "lora_ga", "pissa_niter_4", "pissa_niter_16")
    assert ("path_initial_model_for_weight_conversion" in str(error.value)) == converts
    with pytest.raises(InputError, match="init_lora_weights"):
        TaskVector.open(adapter)
    with pytest.raises(ValueError, match="init_lora_weights"):
        peft.get_peft_model(MODELS["llama"].model(), AtlasConfig(pool={"v": str(adapter)}, base=str(base)))


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:lora with eva", "ignore:Using Rank-Stabilized LoRA")
@pytest.mark.parametrize(
    ("value", "case"),
    [
        (value, case)
        for value in (*REBUILT, *AS_IT_WAS)
        for case in OPTIONS
        if (value, case) != ("mica", "DoRA")  # PEFT has no adapter that is both
    ],
    ids=str,
)
def test_it_is_what_peft_merges(value: Any, case: str, tmp_path: Path) -> None:
    model, options = OPTIONS[case]
    base, adapter, wrapped = trained(MODELS[model], tmp_path, init_lora_weights=value, **options)
    vector = TaskVector.open(adapter, base)
    after = values_of(wrapped)
    check(vector, base, after)
    loaded = peft.PeftModel.from_pretrained(MODELS[model].model(), adapter)  # plain PEFT loads the same
    torch.testing.assert_close(values_of(loaded), after, rtol=1e-5, atol=2e-6)


def test_the_rank_is_that_of_both_parts(tmp_path: Path) -> None:
    base, adapter, _ = trained(MODELS["llama"], tmp_path, init_lora_weights="pissa", target_modules=["q_proj"])
    vector = TaskVector.open(adapter, base)
    assert {vector.rank(name) for name in vector} == {8}
    with pytest.raises(InputError, match="made of the base's own weight: name the base"):
        TaskVector.open(adapter)


def test_a_conv1d_is_stored_the_other_way_round(tmp_path: Path) -> None:
    base, adapter, wrapped = trained(
        MODELS["gpt2"], tmp_path, init_lora_weights="pissa", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    after = {name.removeprefix("transformer."): value for name, value in values_of(wrapped).items()}
    vector = TaskVector.open(adapter, base)
    before = load_file(base / "model.safetensors")
    for name in vector:
        torch.testing.assert_close(before[name] + vector[name], after[name.removeprefix("transformer.")], rtol=1e-5, atol=2e-6)
    assert len(vector)


def test_a_base_in_bfloat16_differs_by_its_rounding(tmp_path: Path) -> None:
    """PEFT rounds the residual and then the sum, so a value may be two roundings away."""
    base, adapter, wrapped = trained(
        MODELS["llama"], tmp_path, torch.bfloat16, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]
    )
    vector, before = TaskVector.open(adapter, base), load_file(base / "model.safetensors")
    after = values_of(wrapped)
    for name in vector:
        found = before[name].float() + vector[name]
        assert float((found - after[name].float()).norm() / found.norm()) < 2**-7


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("value", REBUILT)
def test_peft_s_own_conversion_says_the_same(value: str, tmp_path: Path) -> None:
    model: Any = MODELS["llama"].model()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=value))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = value
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "as it is")
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (TaskVector.open(tmp_path / name, tmp_path / "base") for name in ("as it is", "converted"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("value", "reason"), [("pissa", "singular values 4 and 5 are equal"), ("olora", "not independent")])
def test_a_weight_that_does_not_determine_the_part_is_refused(value: str, reason: str, tmp_path: Path) -> None:
    base, adapter, _ = trained(MODELS["llama"], tmp_path, init_lora_weights=value, target_modules=["q_proj"])
    stored = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name] = torch.eye(*stored[name].shape) if value == "pissa" else torch.ones_like(stored[name])
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"'{name}' that cannot be made again, because its .*{reason}"):
        TaskVector.open(adapter, base).norm()


@pytest.mark.parametrize("value", REBUILT)
def test_every_reader_has_it(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merge script with a model and with an adapter as its result, extract, inspect, task-vector files, pools, bundles."""
    pico = MODELS["llama"]
    base, adapter, wrapped = trained(pico, tmp_path, init_lora_weights=value, target_modules=["q_proj", "down_proj"])
    batch, expected = pico.batch(), run(wrapped, pico.batch())

    def close(model: nn.Module) -> None:
        torch.testing.assert_close(run(model.eval(), batch), expected, rtol=1e-4, atol=1e-5)

    def loaded(folder: Path) -> Any:
        return type(pico.model()).from_pretrained(folder)

    table = {"merge_method": "task_arithmetic", "base_model": str(base)}
    entry = {"model": str(adapter), "parameters": {"weight": 1.0}}
    close(loaded(merge(make_recipe({**table, "models": [entry]}), tmp_path / "merged")))
    close(loaded(merge(make_recipe({**table, "models": [{**entry, "model": f"{base}+{adapter}"}]}), tmp_path / "merged 2")))
    as_adapter = merge(make_recipe({**table, "models": [entry], "subspace": {"output": "adapter"}}), tmp_path / "as adapter")
    close(peft.PeftModel.from_pretrained(pico.model(), as_adapter))
    extract_lora(str(adapter), str(base), tmp_path / "extracted", rank=8)
    close(peft.PeftModel.from_pretrained(pico.model(), tmp_path / "extracted"))
    TaskVector.open(adapter, base).save(tmp_path / "saved.safetensors")
    close(peft.get_peft_model(pico.model(), AtlasConfig(pool={"v": str(tmp_path / "saved.safetensors")}, init=1.0)))
    places = {"v": str(adapter)}
    for config in (
        AtlasConfig(pool=places, base=str(base), init=1.0, bundle_vectors=True),
        ConcreteConfig(pool=places, base=str(base), coefficients=1.0, init=40.0, bundle_vectors=True),
    ):
        model = peft.get_peft_model(pico.model(), config)
        close(model)
        model.save_pretrained(str(tmp_path / config.peft_type))
        adapter.rename(tmp_path / "moved")  # the bundle stands for it
        close(peft.PeftModel.from_pretrained(pico.model(), tmp_path / config.peft_type))
        (tmp_path / "moved").rename(adapter)
    assert cli.run(["inspect", str(adapter), "--base", str(base)]) == 0
    assert "model.layers.0" in capsys.readouterr().out


def test_velora_is_a_plain_lora(tmp_path: Path) -> None:
    """What it keeps of activations is for the backward pass alone."""
    base, adapter, wrapped = trained(
        MODELS["llama"], tmp_path, velora_config=peft.VeloraConfig(num_groups=4, init_type="random"), target_modules=["q_proj"]
    )
    check(TaskVector.open(adapter, base), base, values_of(wrapped))
