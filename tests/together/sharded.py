"""Bases that are sharded before an adapter is put on them, in two processes; the argument is the file for the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.methods import METHODS, Method
from tests.pico import MODELS
from tests.processes import leave


def refusal(model: nn.Module, method: Method) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        get_peft_model(model, method.make(MODELS["llama"], **MODELS["llama"].targets))
    except ValueError as error:
        assert {name: type(module) for name, module in model.named_modules()} == before
        return str(error)
    return ""


def bare_save(method: Method, folder: Path) -> str:
    """What a bare save of an adapter says that FSDP2 has sharded with its base."""
    model = get_peft_model(MODELS["llama"].model(), method.make(MODELS["llama"], **MODELS["llama"].targets))
    mesh = init_device_mesh("cpu", (2,))
    for module in [*model.get_base_model().model.layers, model]:  # type: ignore[union-attr, list-item]
        fully_shard(module, mesh=mesh)
    try:
        model.save_pretrained(str(folder))
    except ValueError as error:
        return str(error)
    return ""


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    report: dict[str, Any] = {"fsdp": {}, "tp": {}, "saved": {}}
    sharded = MODELS["llama"].model()
    for module in [*sharded.model.layers, sharded]:  # type: ignore[union-attr, list-item]
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    folder = path.with_suffix("")
    MODELS["llama"].model().save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    parallel = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    for kind, method in METHODS.items():
        report["fsdp"][kind] = refusal(sharded, method)
        report["tp"][kind] = refusal(parallel, method)
        report["saved"][kind] = bare_save(method, path.with_name(f"bare {dist.get_rank()}"))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
