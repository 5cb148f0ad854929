"""Run by `test_a_new_process_computes_the_same_bits`: load every adapter of a folder and write what the models compute."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[2]))


def main(folder: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file

    import peft_subspace  # noqa: F401  # registers the types
    from tests.pico import MODELS, output

    torch.set_num_threads(1)
    outputs = {}
    for adapter in sorted(folder.iterdir()):
        name, dtype_name, _ = adapter.name.split("|")
        pico, dtype = MODELS[name], getattr(torch, dtype_name)
        model = PeftModel.from_pretrained(pico.model(dtype), str(adapter))
        with torch.no_grad():
            outputs[adapter.name] = output(model, pico.batch(dtype)).contiguous()
    save_file(outputs, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
