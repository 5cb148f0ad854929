"""Peak memory of putting an adapter on a large random model: what it takes beyond the base itself.

    python benchmarks/large.py --layers 16
    python benchmarks/large.py --methods flora,svfit,pela --late 2 --targets q_proj,v_proj

The widths are those of a model with a billion parameters (2048, 8192 in the MLP, 16 layers), bfloat16, with a small vocabulary.
Every method runs in a process of its own and reports the growth of the resident set from the base to the adapted model, and
after one forward. Pools have two vectors, written before the measurement. With `--late N` the model has the shape of seven
billion parameters (4096, 11008, 32 layers), gets its adapter on the meta device, and then the weights of N blocks, one after
the other; each block is called once, at which SVFit and PELA decompose. See docs/scaling.md for the bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/, not inside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import peft
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import measure
from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, PelaConfig, SvfitConfig
from peft_subspace.functional.composition import Dense, LowRank

BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
VECTORS, RANK = 2, 16

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda targets, pool: peft.LoraConfig(r=16, target_modules=targets),
    "flora": lambda targets, pool: FloraConfig(r=16, target_modules=targets),
    "svfit": lambda targets, pool: SvfitConfig(r=16, target_modules=targets),
    "pela": lambda targets, pool: PelaConfig(compression=2.0, target_modules=targets),
    "atlas-lora": lambda targets, pool: AtlasConfig(pool=pool, target_modules=targets),
    "atlas": lambda targets, pool: AtlasConfig(pool=pool, target_modules=targets, vector_dtype="bfloat16"),
    "concrete-rank": lambda targets, pool: ConcreteConfig(pool=pool, target_modules=targets, granularity="rank"),
    "concrete": lambda targets, pool: ConcreteConfig(pool=pool, target_modules=targets),
}
POOLS = {"atlas-lora": RANK, "concrete-rank": RANK, "atlas": None, "concrete": None}  # method -> rank of its vectors


def write_pool(model: nn.Module, targets: list[str], rank: int | None, folder: Path) -> dict[str, str]:
    """Random task vectors of the targets, in bfloat16, of a rank or dense."""
    pool = {}
    for t in range(VECTORS):
        generator, tensors = torch.Generator().manual_seed(t), dict[str, Tensor]()
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] not in targets:
                continue
            shapes = {"": tuple(parameter.shape)}
            if rank is not None:
                shapes = {"::A": (rank, parameter.shape[1]), "::B": (parameter.shape[0], rank)}
            for end, shape in shapes.items():
                tensors[name + end] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 1e-3, generator=generator)
        pool[f"v{t}"] = str(folder / f"v{t}.safetensors")
        save_file(tensors, pool[f"v{t}"], metadata={"format": "pt", "peft_subspace": "task_vector"})
    return pool


def held(adapted: Any, method: str) -> int:
    """Bytes of an adapter in memory: its tensors, and the task vectors that its layers look at, each once."""
    tensors = [t for key, t in adapted.state_dict().items() if f".{method.partition('-')[0]}_" in key]
    vectors = {id(v): v for m in adapted.modules() for v in getattr(m, "vectors", None) or ()}
    for vector in vectors.values():
        tensors += [vector.values] if isinstance(vector, Dense) else []
        tensors += [vector.left, vector.right] if isinstance(vector, LowRank) else []
    return sum(t.nbytes for t in tensors)


def base(shape: dict[str, int], layers: int) -> Any:
    """A random llama-like model in bfloat16, made layer by layer in its own dtype, on the device that is torch's default."""
    config = tf.LlamaConfig(vocab_size=1024, num_hidden_layers=layers, dtype="bfloat16", **shape)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return tf.LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def one(method: str, layers: int, targets: list[str], folder: Path) -> dict[str, Any]:
    """Measure one method in this process."""
    model, kept = base(BILLION, layers), {}
    pool = write_pool(model, targets, POOLS[method], folder) if method in POOLS else {}
    start = time.process_time()

    def adapt() -> None:
        kept["model"] = peft.get_peft_model(model, CONFIGS[method](targets, pool))

    growth = measure.resident_growth(adapt)
    seconds = time.process_time() - start
    adapted = kept["model"].eval()
    with torch.no_grad():
        forward = measure.resident_growth(lambda: adapted(input_ids=torch.ones(1, 64, dtype=torch.long)))
    return {
        "base_bytes": sum(p.nbytes for name, p in adapted.named_parameters() if "_delta" not in name and "lora_" not in name),
        "adapter_bytes": held(adapted, method),
        "pool_bytes": sum(Path(path).stat().st_size for path in pool.values()),
        "growth_bytes": growth,
        "forward_growth_bytes": forward,
        "cpu_seconds": seconds,
    }


@torch.no_grad()
def one_late(method: str, count: int, targets: list[str], folder: Path) -> dict[str, Any]:
    """Seven billion parameters on meta, and then the weights of some blocks, each of which is called when it has them."""
    with torch.device("meta"):
        model = base(SEVEN, 32)
    rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config)
    pool = write_pool(model, targets, POOLS[method], folder) if method in POOLS else {}
    start, kept = time.process_time(), {}

    def adapt() -> None:
        kept["model"] = peft.get_peft_model(model, CONFIGS[method](targets, pool)).eval()

    growth, steps, made = measure.resident_growth(adapt), [], 0
    x = torch.randn(1, 16, SEVEN["hidden_size"], dtype=torch.bfloat16)
    angles = rotary(x, torch.arange(16)[None])

    def arrive(block: nn.Module) -> None:
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 0.02)
                    module._parameters[name] = nn.Parameter(values, requires_grad=False)
        kept["out"] = block(x, position_embeddings=angles)

    for block in model.model.layers[:count]:
        made += sum(p.nbytes for p in block.parameters() if p.is_meta)
        steps.append(measure.resident_growth(lambda block=block: arrive(block)))  # type: ignore[misc]
        assert torch.isfinite(kept["out"]).all()
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.is_meta) + made // 2,
        "weights_bytes": made,
        "adapter_bytes": held(kept["model"], method),
        "growth_on_meta_bytes": growth,
        "growth_by_block_bytes": steps,
        "cpu_seconds": time.process_time() - start,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run every method in a process of its own, print and write."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--late", type=int, metavar="N", help="7B on meta; the weights of N blocks arrive later")
    parser.add_argument("--name", help="of the JSON file; large-1b-bf16-cpu, or late-7b-bf16-cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            measured, size = (one_late, args.late) if args.late else (one, args.layers)
            print(json.dumps(measured(args.one, size, args.targets.split(","), Path(folder))))
        return {}
    rows = {}
    for method in args.methods.split(","):
        options = ["--layers", str(args.layers), "--targets", args.targets, "--one", method]
        options += ["--late", str(args.late)] if args.late else []
        rows[method] = json.loads(measure.run_alone(__file__, *options))
        print(method, rows[method], flush=True)
    report = {
        **measure.environment(torch.device("cpu")),
        "settings": {"layers": args.layers, "late": args.late, "targets": args.targets},
        "rows": rows,
    }
    name = args.name or ("late-7b-bf16-cpu" if args.late else "large-1b-bf16-cpu")
    print("Written:", measure.write_json(report, name, args.out).name)
    return report


if __name__ == "__main__":
    main()
