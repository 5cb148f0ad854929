"""The files for `accelerate launch` are read by accelerate, which refuses keys that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.processes import REPOSITORY

FOLDER = REPOSITORY / "examples" / "accelerate"
FILES = {
    "one-gpu-bf16.yaml": ("NO", "bf16", 1),
    "ddp.yaml": ("MULTI_GPU", "bf16", 2),
    "fsdp2.yaml": ("FSDP", "bf16", 2),
    "zero3.yaml": ("DEEPSPEED", "bf16", 2),
    "cpu.yaml": ("MULTI_GPU", "no", 2),
}


def test_every_file_is_known_and_in_the_readme() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(FILES)
    text = (FOLDER / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(Path(FOLDER, name)))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == FILES[name]


def test_what_the_adapters_need_of_fsdp_and_zero() -> None:
    fsdp = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert (fsdp["fsdp_version"], fsdp["fsdp_cpu_ram_efficient_loading"]) == (2, False)
    zero = load_config_from_file(str(FOLDER / "zero3.yaml")).deepspeed_config
    assert (zero["zero_stage"], zero["zero3_init_flag"], zero["zero3_save_16bit_model"]) == (3, False, True)
