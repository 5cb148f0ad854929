"""What `make gpu` measures: the llama-1B-shaped step in bfloat16, 1024 tokens, eager and compiled. Needs a GPU.

    python benchmarks/gpu.py

FLoRA, SVFit, PELA, aTLAS, LoRA, DoRA, full fine-tuning and the floors, by the code of step.py and compiled.py: times by
CUDA events, peak memory, ratios within the run. Results: gpu-step-1b-bf16.json and gpu-compiled-1b-bf16.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import compiled, step
from benchmarks.further import ALL

SHAPE = ["--layers", "16", "--width", "2048", "--length", "1024", "--dtype", "bf16", "--device", "cuda"]


def main() -> None:
    """Run both, or say why not."""
    if not torch.cuda.is_available():
        print("No GPU is visible to torch: nothing was measured and nothing was written.")
        return
    step.PROVIDERS.update(ALL)
    methods = "floor-1,floor-2,flora,svfit-16,svfit-full,pela,atlas-lora,atlas,dora,full"
    step.main([*SHAPE, "--model", "llama", "--methods", methods, "--name", "gpu-step-1b-bf16"])
    compiled.main([*SHAPE, "--name", "gpu-compiled-1b-bf16"])


if __name__ == "__main__":
    main()
