"""The merge script beside mergekit and beside the mere copying of the bytes, in one interleaved run.

    python benchmarks/merge.py --rounds 3
    python benchmarks/merge.py --quick

Every row is a process of its own: CPU seconds (user and system) from the system's account of it, wall seconds, and the most
private memory (RssAnon, sampled every 10 ms; mapped files do not count). The floor reads the same inputs and writes one output
with `cat` and `cp`. mergekit is left out where it is not installed (extra `oracles`). See merge.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: look for packages beside benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import measure
from benchmarks.measure import Spread

# Weights of the three models; `density` and the like for all. The first `models` of them are merged.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": 3, "base": False},
    "slerp": {"models": 1, "parameters": {"t": 0.4}},
    "task_arithmetic": {"models": 3},
    "ties": {"models": 3, "parameters": {"density": 0.5}},
    "dare_ties": {"models": 3, "parameters": {"density": 0.5}},
    "della": {"models": 3, "parameters": {"density": 0.5, "epsilon": 0.1}},
}
# Llama-like sizes; 0.5 and 2 GB are bytes of one model in bfloat16.
SIZES = {
    "quick": {"vocabulary": 300, "width": 64, "inner": 176, "layers": 2},
    "0.5": {"vocabulary": 32000, "width": 1024, "inner": 2816, "layers": 15},
    "2": {"vocabulary": 32000, "width": 2048, "inner": 5504, "layers": 17},
}


@dataclass
class Run:
    """What one process took."""

    cpu_s: float
    wall_s: float
    private_mb: float


def make_models(folder: Path, size: dict[str, int]) -> None:
    """A base and three fine-tuned models, in bfloat16."""
    vocabulary, width, inner = size["vocabulary"], size["width"], size["inner"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(size["layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": width // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)
    base = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    for model in ("base", "a", "b", "c"):
        tensors = base
        if model != "base":
            tensors = {n: (t.float() + 0.002 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        (folder / model).mkdir(parents=True)
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(config))


def write_recipe(folder: Path, method: str) -> list[Path]:
    """A recipe for both tools, in the folder; the models that it reads."""
    settings = METHODS[method]
    names = "abc"[: settings["models"]]
    weighted = method != "slerp"
    entries: list[dict[str, Any]] = [
        {"model": str(folder / name), **({"parameters": {"weight": 0.5 - 0.1 * n}} if weighted else {})}
        for n, name in enumerate(names)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    used = [folder / name for name in names]
    if settings.get("base", True):
        recipe["base_model"] = str(folder / "base")
        used.append(folder / "base")
    if method == "slerp":
        recipe["models"] = [{"model": str(folder / "base")}, *entries]
    if "parameters" in settings:
        recipe["parameters"] = settings["parameters"]
    (folder / f"{method}.yaml").write_text(json.dumps(recipe))
    return used


def measured(command: list[str], environment: dict[str, str], nice: int) -> Run:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed.
    """
    peak = [0.0]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        command = ["nice", "-n", str(nice), *command]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode()[-3000:]}")
    return Run(usage.ru_utime + usage.ru_stime, wall, peak[0])


def _watch(process: int, peak: list[float]) -> None:
    try:
        while True:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            found = [line for line in lines if line.startswith("RssAnon:")]
            if not found:  # it has ended
                return
            peak[0] = max(peak[0], int(found[0].split()[1]) * 1024 / 1e6)
            time.sleep(0.01)
    except (OSError, ProcessLookupError):
        return


def commands(folder: Path, method: str, threads: int) -> dict[str, list[str]]:
    """Rows of one method: name -> command line."""
    used = write_recipe(folder, method)
    scripts, recipe = Path(sys.executable).parent, str(folder / f"{method}.yaml")
    files = " ".join(str(model / "model.safetensors") for model in used)
    out = folder / "out"
    floor = (
        f"cat {files} > /dev/null && mkdir {out} && cp {used[0] / 'model.safetensors'} {out} && sync {out}/model.safetensors"
    )
    rows = {
        "floor": ["sh", "-c", floor],
        "ours": [str(scripts / "peft-subspace"), "merge", recipe, str(out), "--quiet", "--threads", str(threads)],
    }
    if find_spec("mergekit"):
        rows["mergekit"] = [str(scripts / "mergekit-yaml"), recipe, str(out), "--quiet", "--no-copy-tokenizer"]
    return rows


def starts(folder: Path) -> dict[str, list[str]]:
    """What it costs to begin."""
    scripts = Path(sys.executable).parent
    rows = {
        "import torch": [sys.executable, "-c", "import torch"],
        "ours --help": [str(scripts / "peft-subspace"), "--help"],
        "ours --dry-run": [str(scripts / "peft-subspace"), "merge", str(folder / "linear.yaml"), "--dry-run"],
    }
    if find_spec("mergekit"):
        rows["mergekit --help"] = [str(scripts / "mergekit-yaml"), "--help"]
    return rows


def place_models(folder: Path, args: argparse.Namespace) -> None:
    """Make the models in the folder, or link it to those of an earlier run."""
    if args.models is None:
        return make_models(folder, SIZES[args.size])
    models = args.models.resolve()
    if not (models / "c" / "config.json").exists():  # the last that is written
        make_models(models, SIZES[args.size])
    for name in ("base", "a", "b", "c"):
        (folder / name).symlink_to(models / name)


def forget(folder: Path) -> None:
    """Let the system drop the models from memory, so that the next process reads them from the disk."""
    for path in folder.glob("*/model.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure everything, in an order that rotates; what is known is written after every process."""
    environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    settings = {key: getattr(args, key) for key in ("size", "threads", "rounds", "nice", "cold")}
    report: dict[str, Any] = {**measure.environment(torch.device("cpu")), "settings": settings, "methods": {}, "start": {}}
    if args.add:
        before = measure.read_json(args.name, args.out)
        report |= {key: before[key] for key in ("methods", "start", "difference") if key in before}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        place_models(folder, args)
        write_recipe(folder, "linear")
        report["bytes"] = (folder / "base" / "model.safetensors").stat().st_size
        jobs = {("start", row): command for row, command in starts(folder).items()}
        for method in args.methods:
            jobs |= {(method, row): command for row, command in commands(folder, method, args.threads).items()}
        jobs = {key: command for key, command in jobs.items() if args.mergekit or "mergekit" not in key[1]}
        keys = {" ".join(key): key for key in jobs}
        for number in range(args.rounds):
            for name in measure.rotated(list(keys), number):
                key = keys[name]
                if args.cold:
                    forget(folder)
                last = measured(jobs[key], environment, args.nice)
                console.print(f"{name}: {last.cpu_s:.1f} CPU s, {last.wall_s:.1f} s, {last.private_mb:.0f} MB", highlight=False)
                method, row = key
                place = report["start"] if method == "start" else report["methods"].setdefault(method, {})
                place.setdefault(row, []).append({**asdict(last), "load": os.getloadavg()[0]})
                measure.write_json(report, args.name, args.out)
                if key[1] in ("ours", "mergekit") and (folder / "out").exists() and number == 0:
                    shutil.move(folder / "out" / "model.safetensors", folder / f"{key[0]}-{key[1]}.safetensors")
                shutil.rmtree(folder / "out", ignore_errors=True)
        found = {method: _difference(folder, method) for method in args.methods}
        report["difference"] = {**report.get("difference", {}), **{method: one for method, one in found.items() if one}}
    return report


def _difference(folder: Path, method: str) -> dict[str, float] | None:
    """Largest difference between both tools' results, and the share of values that differ: mergekit computes in bfloat16."""
    paths = [folder / f"{method}-{row}.safetensors" for row in ("ours", "mergekit")]
    if not all(path.exists() for path in paths):
        return None
    ours, theirs = (load_file(path) for path in paths)
    most, differ, count = 0.0, 0, 0
    for name, tensor in ours.items():
        most = max(most, float((tensor.float() - theirs[name].float()).abs().max()))
        differ, count = differ + int((tensor != theirs[name]).sum()), count + tensor.numel()
    return {"largest": most, "share": differ / count}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    size = report["bytes"] / 1e9
    table = Table(title=f"{size:.2f} GB a model, {report['settings']}", title_justify="left")
    for column in ("method", "row", "CPU s", "without start", "wall s", "private MB", "mergekit's CPU / ours"):
        table.add_column(column, justify="left" if column in ("method", "row") else "right")
    start = {row: Spread.of([one["cpu_s"] for one in runs]).median for row, runs in report["start"].items()}
    own_start = {"ours": start["import torch"], "mergekit": start.get("mergekit --help", 0.0), "floor": 0.0}
    for method, rows in report["methods"].items():
        for row, runs in rows.items():
            cpu = Spread.of([one["cpu_s"] for one in runs])
            ratio = ""
            if row == "ours" and "mergekit" in rows:
                theirs = [one["cpu_s"] for one in rows["mergekit"]]
                whole = Spread.of_ratio(theirs, [one["cpu_s"] for one in runs][-len(theirs) :])  # ours may have runs of its own
                work = (Spread.of(theirs).median - own_start["mergekit"]) / max(cpu.median - own_start["ours"], 1e-9)
                ratio = f"{whole.text(1)}; work alone {work:.1f}"
            table.add_row(
                method,
                row,
                cpu.text(1),
                f"{max(cpu.median - own_start[row], 0):.1f}",
                Spread.of([one["wall_s"] for one in runs]).text(1),
                f"{max(one['private_mb'] for one in runs):.0f}",
                ratio,
            )
        table.add_section()
    console.print(table)
    for row, runs in report["start"].items():
        console.print(f"{row}: {Spread.of([one['cpu_s'] for one in runs]).text(2)} CPU s", highlight=False)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.5", help="GB of a model in bfloat16")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, help="3; 1 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="drop the models from the page cache before every process")
    parser.add_argument("--no-mergekit", dest="mergekit", action="store_false")
    parser.add_argument("--folder", type=Path, help="where the models are made")
    parser.add_argument("--models", type=Path, help="make the models in this folder and keep them, or use those that are there")
    parser.add_argument("--add", action="store_true", help="add to the measurements in the JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, two methods")
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; benchmarks/results")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.methods = "quick", args.methods if args.methods != list(METHODS) else ["linear", "ties"]
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.name = args.name or f"merge-engine-{args.size}"
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print and write; returns the report."""
    args = parse(sys.argv[1:] if argv is None else argv)
    console = Console(width=140)
    report = run(args, console)
    path = measure.write_json(report, args.name, args.out)
    show(report, console)
    console.print(f"Written: {path.name}")
    return report


if __name__ == "__main__":
    main()
