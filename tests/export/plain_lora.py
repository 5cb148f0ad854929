"""Run by `test_plain_peft_computes_the_same`: load every exported LoRA of a folder with PEFT alone; write the outputs."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.modules["peft_subspace"] = None  # type: ignore[assignment]  # an import of it fails from here on


def main(folder: Path) -> None:
    try:
        import peft_subspace  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("peft_subspace is not to be importable here")

    import torch
    from peft import PeftModel
    from safetensors.torch import save_file

    from tests.pico import LAYERS, MODELS, run

    torch.set_num_threads(1)
    # PEFT reads transformers' old name of the property; and warns of missing keys, which must not happen
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
    warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
    outputs = {}
    for adapter in sorted(folder.iterdir()):
        pico = (LAYERS | MODELS)[adapter.name.partition("|")[2]]
        model = PeftModel.from_pretrained(pico.model(), str(adapter)).eval()
        assert model.peft_config["default"].peft_type == "LORA"
        outputs[adapter.name] = run(model, pico.batch()).contiguous()
    assert not any(name.startswith("peft_subspace.") for name in sys.modules)
    save_file(outputs, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
