"""FSDP2 in two processes: by torch's `fully_shard`, and by accelerate; the argument is a folder for the reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peft_subspace import to_lora
from tests.distributed.steps import adam, adapted, evaluated, half_of, largest_difference, squares, take_steps, trained
from tests.methods import METHODS, Method
from tests.processes import leave

NAMES = ["bert", "moe"]
SAVED = "bert"  # with a head that is trained whole
WAYS = ["replicated", "bfloat16", "accelerate"]  # of llama


def mean(loss: Tensor) -> Tensor:
    total = loss.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, each of which is one unit."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for found in lists for block in found]


def shard(model: nn.Module, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, **options)
    ignored = options.get("ignored_params", set())
    assert all(isinstance(p, DTensor) != (p in ignored) for p in model.parameters())


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """What is not sharded is nobody's: its gradients are averaged as soon as they are whole."""

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.copy_(mean(parameter.grad))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def compare(model: Any, alone: Any, objective: Any, optimizer: Any, backward: Any = Tensor.backward) -> dict[str, Any]:
    """The same training by two processes on two rows each with sharded weights, and by one on four with whole ones."""
    report: dict[str, Any] = {
        "losses": take_steps(model, objective, optimizer, half_of(dist.get_rank()), mean, backward),
        "expected": take_steps(alone, objective, adam(alone)),
    }
    found, expected = whole(model), alone.state_dict()
    report["difference"] = largest_difference((found[key] for key in expected), expected.values())
    return report


def save_and_resume(model: Any, optimizer: Any, folder: Path) -> dict[str, Any]:
    """The whole adapter by rank 0, shards by all; two runs from those shards."""
    objective, half = squares(SAVED), half_of(dist.get_rank())
    state, result = whole(model), evaluated(model, SAVED)
    model.train()
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=state)
        save_file({"output": result}, folder / "output.safetensors")
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "shards")
    went_on = take_steps(model, objective, optimizer, half, mean)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "shards")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return {"resumed": [take_steps(model, objective, optimizer, half, mean), went_on]}


def by_accelerate(method: Method, folder: Path) -> dict[str, Any]:
    """accelerate 1.15 takes an FSDP configuration for DDP on the CPU, so it is told what it is: its own FSDP2 code runs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, alone = adapted(method, "llama"), adapted(method, "llama")
    model, optimizer = accelerator.prepare(model, adam(model))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    objective, half = squares("llama"), half_of(accelerator.process_index)
    report = compare(model, alone, objective, optimizer, accelerator.backward)
    accelerator.save_state(str(folder))
    went_on = take_steps(model, objective, optimizer, half, mean, accelerator.backward)
    accelerator.load_state(str(folder))
    report["resumed"] = [take_steps(model, objective, optimizer, half, mean, accelerator.backward), went_on]
    accelerator.free_memory()
    return report


def variants(method: Method, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to train one adapter on a llama."""
    model = adapted(method, "llama")
    adapter = trained(model)
    shard(model, ignored_params=set(adapter))
    average_gradients(adapter)
    yield "replicated", compare(model, adapted(method, "llama"), squares("llama"), adam(model))
    half = torch.bfloat16
    model = adapted(method, "llama", half)
    shard(model)
    yield "bfloat16", compare(model, adapted(method, "llama", half), squares("llama", half), adam(model))
    yield "accelerate", by_accelerate(method, folder / "accelerate")


def refusals() -> dict[str, str]:
    """What needs whole tensors where there are shares."""

    def message(call: Any) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    model = adapted(METHODS["FLORA"], "llama")
    shard(model)
    found = {"merge": message(model.merge_adapter), "export": message(lambda: to_lora(model))}
    for kind, fields in (("ATLAS", {"granularity": "task"}), ("CONCRETE", {"learn_coefficients": "task"})):
        tied = adapted(METHODS[kind], "llama", **fields)
        shard(tied)
        found[f"{kind}, coefficients of another unit"] = message(lambda tied=tied: squares("llama")(tied, slice(None)))
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    report: dict[str, Any] = {"world": dist.get_world_size(), "models": {}}
    for kind, method in METHODS.items():
        (folder / kind).mkdir(exist_ok=True)
        for name in NAMES:
            model = adapted(method, name)
            shard(model)
            optimizer = adam(model)
            report["models"][f"{kind}, {name}"] = found = compare(model, adapted(method, name), squares(name), optimizer)
            if name == SAVED:
                found |= save_and_resume(model, optimizer, folder / kind)
        report["models"] |= {f"{kind}, {way}": found for way, found in variants(method, folder / kind)}
    report["refusals"] = refusals()
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
