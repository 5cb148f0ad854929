"""Everything that acts on one adapter acts on the active one unless it is told, and says which it was."""

from __future__ import annotations

import inspect
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner

import peft_subspace
from peft_subspace import (
    FloraConfig,
    SubspaceModel,
    compression_report,
    export_compressed,
    save_as_lora,
    to_lora,
)
from peft_subspace.base.active import OfAdapter, chosen_adapter
from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS, loss, run

PICO = MODELS["mlp"]


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All functions, classes and methods of the package that have a name without an underscore."""
    for module in pkgutil.walk_packages(peft_subspace.__path__, "peft_subspace."):
        if module.name.endswith(("__main__", "triton_kernels")):
            continue
        for name, one in vars(import_module(module.name)).items():
            if name.startswith("_") or getattr(one, "__module__", None) != module.name:
                continue
            if inspect.isfunction(one):
                yield f"{module.name}.{name}", one
            elif inspect.isclass(one):
                for own, method in vars(one).items():
                    if inspect.isfunction(method) and (own == "__init__" or not own.startswith("_")):
                        yield f"{module.name}.{name}.{own}", method


def test_no_function_has_a_name_of_an_adapter_as_default() -> None:
    found = {}
    for name, function in public_functions():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in ("adapter", "adapter_name") and parameter.default is not inspect.Parameter.empty:
                found[name] = parameter.default
    peft = {name for name in found if name.endswith(".supports_lora_conversion")}  # PEFT's own signature
    assert {name: default for name, default in found.items() if name not in peft and default is not None} == {}
    wanted = ("prune", "to_lora", "save_as_lora", "export_compressed", "keep_basis")
    assert all(any(name.endswith(f".{one}") for name in found) for one in wanted)


def two(method: Method, active: Any = "mine") -> Any:
    """Adapters "default" and "mine" of one config, with other values."""
    torch.manual_seed(3)
    model: Any = get_peft_model(PICO.model(), method.make(PICO, **PICO.targets, init_weights=False))
    model.add_adapter("mine", method.make(PICO, **PICO.targets, init_weights=False))
    model.base_model.set_adapter(active)
    return model.eval()


def methods_of(tuner: SubspaceModel) -> dict[str, Any]:
    """What a tuner does with one adapter, by name."""
    found = {}
    for name, function in inspect.getmembers(type(tuner), inspect.isfunction):
        parameters = inspect.signature(function).parameters
        if name.startswith("_") or hasattr(BaseTuner, name) or name == "supports_lora_conversion":
            continue
        if "adapter_name" in parameters and parameters["adapter_name"].default is None:
            found[name] = parameters
    return found


def arguments(parameters: Any, folder: Path) -> dict[str, Any]:
    given = {
        "batches": [PICO.batch()],
        "loss_fn": loss,
        "forward": lambda model, batch: run(model, batch),
        "mode": False,
        "kind": "hard",
        "folder": folder / "folder",
        "path": folder / "file.safetensors",
        "tolerance": 0.5,
    }
    return {name: value for name, value in given.items() if name in parameters}


@each_method
def test_the_active_adapter_is_meant(method: Method, tmp_path: Path) -> None:
    for name in methods_of(two(method).base_model):
        if name == "save_masked_vectors" and method.fields.get("granularity") == "rank":
            continue  # which it refuses
        results = []
        for adapter_name in (None, "mine"):
            model = two(method)
            before = {key: value.clone() for key, value in model.state_dict().items()}
            folder = tmp_path / f"{name}-{adapter_name}"
            folder.mkdir()
            function = getattr(model.base_model, name)
            torch.manual_seed(0)
            result = function(**arguments(inspect.signature(function).parameters, folder), adapter_name=adapter_name)
            after = model.state_dict()
            assert all(torch.equal(after[key], value) for key, value in before.items() if ".default" in key), name
            files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
            config = model.peft_config["mine"].to_dict()
            results.append((after, files, config, result))
            if isinstance(result, dict) and isinstance(result, OfAdapter):
                assert result.adapter_name == "mine"
        (after, files, config, result), (told, told_files, told_config, told_result) = results
        assert files == told_files
        assert config == told_config
        assert after.keys() == told.keys()
        assert all(torch.equal(after[key], told[key]) for key in after)
        if isinstance(result, OfAdapter):
            assert str(result) == str(told_result)
            twin = pickle.loads(pickle.dumps(result))
            assert twin.adapter_name == "mine"


@each_method
def test_of_several_active_ones_one_must_be_named(method: Method, tmp_path: Path) -> None:
    model = two(method, ["default", "mine"])
    calls = {name: getattr(model.base_model, name) for name in methods_of(model.base_model)}
    calls |= {
        "to_lora": lambda **given: to_lora(model),
        "save_as_lora": lambda **given: save_as_lora(model, tmp_path / "lora", overwrite=True),
        "compression_report": lambda **given: compression_report(model),
        "export_compressed": lambda **given: export_compressed(model),
    }
    for name, call in calls.items():
        parameters = inspect.signature(call).parameters
        with pytest.raises(ValueError, match=r"Several adapters are active: \['default', 'mine'\].*adapter_name"):
            call(**arguments(parameters, tmp_path))
        assert name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["PeftModel", "transformers"])
def test_exports_say_which_adapter(by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="peft_subspace")
    pico = MODELS["llama"]
    first, second = (FloraConfig(r=r, init_weights=False, **pico.targets) for r in (2, 3))
    model: Any = pico.model()
    if by == "PeftModel":
        model = get_peft_model(model, first)
        model.add_adapter("mine", second)
        model.set_adapter("mine")
    else:
        model.add_adapter(first, "default")
        with pytest.warns(UserWarning, match="Already found a `peft_config`"):
            model.add_adapter(second, "mine")  # which activates it
    exported = to_lora(model)
    assert (exported.adapter_name, exported.config.r) == ("mine", 3)
    config, tensors = exported
    assert config is exported.config
    assert tensors is exported.tensors
    assert save_as_lora(model, tmp_path) == "mine"
    assert "'mine'" in caplog.text
    assert to_lora(model, "default").config.r == 2
    model.set_adapter("default")
    assert to_lora(model).adapter_name == "default"


def test_a_compressed_model_says_which_adapter_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="peft_subspace")
    model = two(METHODS["PELA"])
    expected = run(model, PICO.batch())
    assert compression_report(model, rounds=1).adapter_name == "mine"
    plain: Any = export_compressed(model)
    assert plain.exported_adapter == "mine"
    assert "'mine'" in caplog.text
    torch.testing.assert_close(run(plain, PICO.batch()), expected)


def test_a_model_without_adapters_is_named() -> None:
    with pytest.raises(ValueError, match=r"No adapter is active, of \[\]"):
        chosen_adapter(MODELS["llama"].model())
    with pytest.raises(ValueError, match=r"There is no adapter 'x', only \[\]"):
        to_lora(MODELS["llama"].model(), "x")
