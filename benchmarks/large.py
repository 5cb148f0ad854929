"""Peak memory of putting an adapter on a large random model: what it takes beyond the base itself.

    python benchmarks/large.py --layers 16 --methods flora,svfit,pela

The widths are those of a model with a billion parameters (2048, 8192 in the MLP, 16 layers), bfloat16, with a small vocabulary.
Every method runs in a process of its own and reports the growth of the resident set from the base to the adapted model, and
after one forward. See docs/scaling.md for the bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import peft
import torch
import transformers as tf

from benchmarks import measure
from peft_subspace import FloraConfig, PelaConfig, SvfitConfig

CONFIGS: dict[str, Any] = {
    "lora": lambda targets: peft.LoraConfig(r=16, target_modules=targets),
    "flora": lambda targets: FloraConfig(r=16, target_modules=targets),
    "svfit": lambda targets: SvfitConfig(r=16, target_modules=targets),
    "pela": lambda targets: PelaConfig(compression=2.0, target_modules=targets),
}


def base(layers: int) -> Any:
    """A random llama-like model in bfloat16, made layer by layer in its own dtype."""
    config = tf.LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return tf.LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def one(method: str, layers: int, targets: list[str]) -> dict[str, Any]:
    """Measure one method in this process."""
    torch.set_num_threads(1)
    model, held = base(layers), {}
    own = sum(p.nbytes for p in model.parameters())
    start = time.process_time()

    def adapt() -> None:
        held["model"] = peft.get_peft_model(model, CONFIGS[method](targets))

    growth = measure.resident_growth(adapt)
    seconds = time.process_time() - start
    adapted = held["model"]
    deltas = [tensor for key, tensor in adapted.state_dict().items() if f".{method}_" in key]
    with torch.no_grad():
        forward = measure.resident_growth(lambda: adapted(input_ids=torch.ones(1, 64, dtype=torch.long)))
    return {
        "base_bytes": own,
        "adapter_bytes": sum(t.nbytes for t in deltas),
        "growth_bytes": growth,
        "forward_growth_bytes": forward,
        "cpu_seconds": seconds,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run every method in a process of its own, print and write."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--name", default="large-1b-bf16-cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one, args.layers, args.targets.split(","))))
        return {}
    rows = {}
    for method in args.methods.split(","):
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--layers",
            str(args.layers),
            "--targets",
            args.targets,
            "--one",
            method,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(method, rows[method])
    report = {
        **measure.environment(torch.device("cpu")),
        "settings": {"layers": args.layers, "targets": args.targets},
        "rows": rows,
    }
    print("Written:", measure.write_json(report, args.name, args.out).name)
    return report


if __name__ == "__main__":
    main()
