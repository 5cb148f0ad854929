"""Pools of networks with BatchNorm: weights are composed, running statistics are the base's until they are estimated."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, SubspaceConfig
from peft_subspace.merging import merge
from peft_subspace.task_vectors.task_vector import TaskVector
from peft_subspace.training import estimate_statistics
from tests.pico import MODELS, output, run
from tests.task_vectors.test_adapters import save_model

CONFIGS: dict[str, tuple[type[SubspaceConfig], dict[str, Any]]] = {
    "aTLAS": (AtlasConfig, {"init": {"t0": 1.0}}),
    "Concrete": (ConcreteConfig, {"coefficients": {"t0": 1.0}, "init": 40.0}),
}
NETS = ["batch norm", "resnet"]
pytestmark = pytest.mark.filterwarnings("ignore:The task vector .* does not look like a fine-tuned")


def tuned(name: str, seed: int) -> nn.Module:
    """A net with other weights and statistics, as training leaves it."""
    model, generator = MODELS[name].model(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
            elif key.endswith("num_batches_tracked"):
                value.fill_(7)
    return model


def pool(name: str, folder: Path) -> dict[str, Any]:
    """Fields of a config: `t0` and `t1`, whole models, and their base."""
    save_model(MODELS[name].model(), folder / "base")
    places = {f"t{seed}": str(save_model(tuned(name, seed + 1), folder / f"t{seed}")) for seed in range(2)}
    return {"pool": places, "base": str(folder / "base")}


def adapted(method: str, name: str, folder: Path, **fields: Any) -> Any:
    cls, start = CONFIGS[method]
    with pytest.warns(UserWarning, match=r"vectors t0, t1 change the running statistics of \d+ .*estimate_statistics"):
        return get_peft_model(MODELS[name].model(), cls(**{**pool(name, folder), **start, **fields})).eval()


def with_statistics_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """The statistics of another net in place of its own."""
    found = {key: value for key, value in other.state_dict().items() if "running_" in key or "num_batches" in key}
    model.load_state_dict(found, strict=False)
    return model


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", CONFIGS)
def test_one_vector_whole_is_its_model_with_the_statistics_of_the_base(method: str, name: str, tmp_path: Path) -> None:
    model, batch = adapted(method, name, tmp_path), MODELS[name].batch()
    expected = run(with_statistics_of(tuned(name, 1), MODELS[name].model()).eval(), batch)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), run(MODELS[name].model(), batch))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", CONFIGS)
def test_estimated_statistics_are_torchs_and_the_adapters_own(method: str, name: str, tmp_path: Path) -> None:
    model, batches = adapted(method, name, tmp_path), [MODELS[name].batch(seed=seed) for seed in range(3)]
    model.train()
    estimate_statistics(model, batches)
    assert all(module.training for module in model.modules())
    model.eval()
    reference = tuned(name, 1)
    call = (batch["pixel_values"] if "pixel_values" in batch else batch["x"] for batch in batches)
    update_bn(call, reference)
    batch = MODELS[name].batch()
    expected = run(reference.eval(), batch)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), run(MODELS[name].model(), batch))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(MODELS[name].model(), str(tmp_path / "adapter")).eval()
    assert torch.equal(run(loaded, batch), run(model, batch))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(run(merged, batch), expected, rtol=1e-3, atol=1e-4)
    assert merged.state_dict().keys() == MODELS[name].model().state_dict().keys()
    replayed = merge(
        {
            "merge_method": "atlas" if method == "aTLAS" else "concrete",
            "base_model": str(tmp_path / "base"),
            "subspace": {"learned": str(tmp_path / "adapter")},
        },
        tmp_path / "merged",
    )
    vector = TaskVector.open(replayed, tmp_path / "base")
    before = MODELS[name].model().state_dict()
    for key, value in merged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(before[key] + vector[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_of_one_net_are_switched_mixed_merged_and_deleted(method: str, tmp_path: Path) -> None:
    name, cls = "batch norm", CONFIGS[method][0]
    model, batch = adapted(method, name, tmp_path), MODELS[name].batch()
    key = "init" if method == "aTLAS" else "coefficients"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = {**CONFIGS[method][1], key: {"t1": 1.0}}
        model.add_adapter("other", cls(**pool(name, tmp_path), **other))
    estimate_statistics(model, [MODELS[name].batch(seed=3)])
    first = run(model.eval(), batch)
    model.set_adapter("other")
    second = run(model, batch)
    assert not torch.allclose(first, second)
    mixed = run(model, batch, adapter_names=["other", "default", "__base__", "other"])
    base = run(MODELS[name].model(), batch)
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1], base[2], second[3]]), rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(run(model, batch), second, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model, batch), second)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model, batch), first)
    assert torch.equal(run(model.unload(), batch), base)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_norms_coefficients_are_trained(method: str, tmp_path: Path) -> None:
    learns = {} if method == "aTLAS" else {"learn_coefficients": "layer", "init": 0.0}
    model = adapted(method, "batch norm", tmp_path, **learns)
    loss: Tensor = output(model.train(), MODELS["batch norm"].batch()).square().sum()
    loss.backward()
    norms = [p for key, p in model.named_parameters() if ".norm." in f".{key}" and p.requires_grad]
    assert norms
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in norms)


def test_where_there_are_no_statistics_it_is_said() -> None:
    model = get_peft_model(MODELS["mlp"].model(), FloraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="no BatchNorm of this model has running statistics of the active adapter"):
        estimate_statistics(model, [MODELS["mlp"].batch()])
    net = get_peft_model(MODELS["batch norm"].model(), FloraConfig(r=2, **MODELS["batch norm"].targets))
    before = run(net.eval(), MODELS["batch norm"].batch())
    with pytest.raises(ValueError, match="No batches were given"):
        estimate_statistics(net, [])
    assert torch.equal(run(net, MODELS["batch norm"].batch()), before)
