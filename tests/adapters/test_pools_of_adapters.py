"""Pools of adapters that bring whole modules: the base that the config names is their base, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_subspace import AtlasConfig, ConcreteConfig, SubspaceConfig
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.pickles import pickles_allowed
from tests.pico import MODELS, run

# One vector whole, and nothing of the others
CONFIGS: dict[str, tuple[type[SubspaceConfig], dict[str, Any]]] = {
    "aTLAS": (AtlasConfig, {"init": {"t0": 1.0}}),
    "Concrete": (ConcreteConfig, {"coefficients": {"t0": 1.0}, "init": 40.0}),
}


def classifiers(folder: Path, **options: Any) -> list[Any]:
    """`base`, and the adapters `t0` and `t1` with heads of their own; the models with them."""
    base: Any = MODELS["bert"].model()
    base.save_pretrained(folder / "base")
    found = []
    for number in range(2):
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", **options)
        model = peft.get_peft_model(MODELS["bert"].model(), config)
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / f"t{number}")
        found.append(model.eval())
    return found


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("own_base", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_of_classifiers_with_the_base_of_the_config(
    method: str, own_base: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    first, _ = classifiers(tmp_path, **options)
    cls, start = CONFIGS[method]
    places: dict[str, Any] = {name: str(tmp_path / name) for name in ("t0", "t1")}
    if own_base:
        places = {name: {"path": place, "base": str(tmp_path / "base")} for name, place in places.items()}
    model = peft.get_peft_model(MODELS["bert"].model(), cls(pool=places, base=str(tmp_path / "base"), **start)).eval()
    expected = run(first, MODELS["bert"].batch())
    torch.testing.assert_close(run(model, MODELS["bert"].batch()), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(MODELS["bert"].model(), tmp_path / "saved").eval()
    torch.testing.assert_close(run(loaded, MODELS["bert"].batch()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_head_that_is_left_out_stays_the_bases(method: str, tmp_path: Path) -> None:
    first, _ = classifiers(tmp_path)
    cls, start = CONFIGS[method]
    places = {name: str(tmp_path / name) for name in ("t0", "t1")}
    config = cls(pool=places, base=str(tmp_path / "base"), exclude_modules=["classifier"], **start)
    model = peft.get_peft_model(MODELS["bert"].model(), config).eval()
    merged = first.merge_and_unload()
    merged.classifier.load_state_dict(MODELS["bert"].model().classifier.state_dict())
    torch.testing.assert_close(run(model, MODELS["bert"].batch()), run(merged, MODELS["bert"].batch()), rtol=1e-5, atol=1e-6)


def test_without_a_base_it_is_asked_for(tmp_path: Path) -> None:
    classifiers(tmp_path)
    with pytest.raises(InputError, match=r"'t0': .* has whole modules \(classifier.*name the base"):
        peft.get_peft_model(MODELS["bert"].model(), AtlasConfig(pool={"t0": str(tmp_path / "t0")}))


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_in_pickles_are_read_where_they_are_allowed(method: str, tmp_path: Path) -> None:
    first, _ = classifiers(tmp_path)
    file = tmp_path / "t0" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    cls, start = CONFIGS[method]
    config = cls(pool={"t0": str(tmp_path / "t0")}, base=str(tmp_path / "base"), **start)
    with pytest.raises(InputError, match=r"has its weights in a pickle \(adapter_model.bin\).*pickles_allowed\(True\)"):
        peft.get_peft_model(MODELS["bert"].model(), config)
    with pickles_allowed(True, tmp_path):
        model = peft.get_peft_model(MODELS["bert"].model(), config).eval()
        expected = run(first, MODELS["bert"].batch())
        torch.testing.assert_close(run(model, MODELS["bert"].batch()), expected, rtol=1e-5, atol=1e-6)
    save_file(load_file(tmp_path / "t1" / "adapter_model.safetensors"), tmp_path / "t1" / "other.safetensors")
    (tmp_path / "t1" / "adapter_model.safetensors").unlink()
    with pickles_allowed(True, tmp_path), pytest.raises(InputError, match=r"has adapter_config\.json but no adapter_model"):
        peft.get_peft_model(MODELS["bert"].model(), cls(pool={"t1": str(tmp_path / "t1")}, base=str(tmp_path / "base")))


@pytest.mark.parametrize("member", ["adapter", "whole model"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_head_that_the_bases_file_lacks_is_named(method: str, member: str, tmp_path: Path) -> None:
    """An encoder as base, as it is on the Hub: the vectors' heads are no differences, and a random head would answer."""
    first, _ = classifiers(tmp_path)
    encoder: Any = MODELS["bert"].model()
    encoder.bert.save_pretrained(tmp_path / "base")
    if member == "whole model":
        first.merge_and_unload().save_pretrained(tmp_path / "t0")
        (tmp_path / "t0" / "adapter_config.json").unlink()
        (tmp_path / "t0" / "adapter_model.safetensors").unlink()
    cls, _ = CONFIGS[method]
    fields: dict[str, Any] = {"pool": {"t0": str(tmp_path / "t0")}, "base": str(tmp_path / "base")}
    with pytest.warns(UserWarning, match=r"The task vectors t0 have classifier\.bias, classifier\.weight, which their base"):
        peft.get_peft_model(MODELS["bert"].model(), cls(**fields))
    for more in ({"exclude_modules": ["classifier"]}, {"modules_to_save": ["classifier"]}):  # decided knowingly
        peft.get_peft_model(MODELS["bert"].model(), cls(**fields, **more))
