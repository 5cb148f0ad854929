"""Shares of tensors: no adapter is made on them, and none is saved of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from tests.methods import METHODS, Method, each_method
from tests.pico import MODELS
from tests.processes import REPOSITORY, run_python

pytestmark = pytest.mark.filterwarnings("ignore:PELA leaves")


def test_bases_that_are_sharded_already_are_refused_by_name(tmp_path: Path) -> None:
    """By `fully_shard`, and by transformers' tensor parallelism; the model stays as it was."""
    script, report = REPOSITORY / "tests/together/sharded.py", tmp_path / "report.json"
    run_python("-m torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, report)
    found = json.loads(report.read_text())
    assert found["fsdp"].keys() == found["tp"].keys() == METHODS.keys()
    for kind, method in METHODS.items():
        for way, words in (("fsdp", ("FSDP2", "`fully_shard` afterwards")), ("tp", ("tensor parallelism", "without tp_plan"))):
            message = found[way][kind]
            assert all(word in message for word in (*words, method.config.title, "weight is sharded")), (kind, way, message)
        message = found["saved"][kind]
        assert all(word in message for word in ("(FSDP2)", "get_model_state_dict", "state_dict=state")), (kind, message)


@each_method
def test_a_share_is_not_saved(method: Method, tmp_path: Path) -> None:
    """Under ZeRO-3 a parameter is empty outside of its module's forward, and knows its whole shape."""
    model = get_peft_model(MODELS["mlp"].model(), method.make(MODELS["mlp"], **MODELS["mlp"].targets))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"delta.*share of it only.*ZeRO-3.*state_dict=.*get_state_dict"):
        model.save_pretrained(str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))
    assert get_peft_model_state_dict(model, state_dict=whole)
    model.save_pretrained(str(tmp_path), state_dict=whole)
