"""The whole way once: train, compare, save, push, load in a new process, export, draw. `make quickstart` runs it.

FLoRA and LoRA (at no fewer parameters) are trained on TREC questions with MiniLM, each through `accelerate launch` in a
process of its own, side by side. FLoRA's adapter is pushed to a small Hub on this machine, loaded back from there in a new
process, and its predictions are compared bit for bit; then it becomes plain LoRA, and is compared once more.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = {
    "flora": {"r": [8, 7]},
    "lora": {"r": 8, "lora_alpha": 16},
}
RATES = {"flora": 1.6e-2, "lora": 4e-3}  # each method's best of a grid, chosen on held-out rows: benchmarks/accuracy.py
REPOSITORY = "quickstart/minilm-trec-flora"


def launch_training(method: str, output: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start examples/finetune.py for one method."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "examples/finetune.py")]
    command += ["--method", method, "--config", json.dumps(RUNS[method]), "--output_dir", str(output / method)]
    command += ["--learning_rate", str(RATES[method]), "--num_train_epochs", str(options.epochs), "--warmup_steps", "0.1"]
    command += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64", "--seed", str(options.seed)]
    command += ["--logging_steps", "10", "--save_strategy", "no", "--report_to", "none", "--use_cpu"]
    log = (output / f"{method}.log").open("wb")
    # the progress bar of the first is shown; two of them would write over each other
    shown = None if method == "flora" else log
    return subprocess.Popen(command, stdout=shown, stderr=shown)


def wait_for(processes: dict[str, subprocess.Popen[bytes]], output: Path) -> None:
    """Wait for the trainings and stop with the log of the one that failed."""
    for method, process in processes.items():
        if process.wait() != 0:
            log = (output / f"{method}.log").read_text(errors="replace")[-3000:]
            raise SystemExit(f"Training {method} failed (exit code {process.returncode}).\n{log}")


def comparison(output: Path) -> None:
    """Print accuracy, trained parameters, seconds per step and file size of both."""
    from rich.console import Console
    from rich.table import Table
    from safetensors import safe_open

    table = Table("method", "accuracy", "adapter parameters", "with head", "seconds per step", "file")
    for method in RUNS:
        folder = output / method
        state = json.loads((folder / "trainer_state.json").read_text())
        last = {key: value for row in state["log_history"] for key, value in row.items()}
        with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
            sizes = {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118  # not a dict
        adapter = sum(size for key, size in sizes.items() if f".{method}_" in key)
        seconds = last["train_runtime"] / state["global_step"]
        size = (folder / "adapter_model.safetensors").stat().st_size / 1024
        name = f"{method} {RUNS[method]}"
        row = [f"{last['eval_accuracy']:.3f}", f"{adapter:,}", f"{sum(sizes.values()):,}", f"{seconds:.2f}", f"{size:,.0f} kB"]
        table.add_row(name, *row)
    Console().print(table)


def draw_losses(output: Path) -> Path:
    """Training loss of both methods over steps, as a picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for method in RUNS:
        history = json.loads((output / method / "trainer_state.json").read_text())["log_history"]
        points = [(row["step"], row["loss"]) for row in history if "loss" in row]
        axes.plot(*zip(*points, strict=True), label=f"{method} {RUNS[method]}")
    axes.set(xlabel="step", ylabel="training loss", title="MiniLM on TREC")
    axes.legend()
    path = output / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def share_and_reload(output: Path) -> None:
    """Push to a local Hub, load back in new processes, export to LoRA, compare the predictions."""
    token = secrets.token_hex(8)
    ready = output / "hub.ready"
    ready.unlink(missing_ok=True)
    server = [sys.executable, str(ROOT / "tests/hub/server.py"), str(output / "hub"), "--token", token]
    server += ["--ready-file", str(ready)]
    hub = subprocess.Popen(server, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            if time.monotonic() > deadline or hub.poll() is not None:
                raise SystemExit("The local Hub did not start.")
            time.sleep(0.1)
        endpoint = ready.read_text().strip()
        quiet = {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }
        settings = {
            **quiet,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(output / "hf-home"),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
        }
        steps = Path(__file__).with_name("quickstart_steps.py")
        for step in ("push", "reload", "export", "reload-lora"):
            command = [sys.executable, str(steps), step, str(output), REPOSITORY]
            subprocess.run(command, check=True, env={**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"})
    finally:
        hub.terminate()
        hub.wait()


def main() -> None:
    """Do it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/quickstart")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "examples/assets.py"), "minilm", "trec"], check=True)
    print("Training FLoRA and LoRA side by side; the bar is FLoRA's ...", flush=True)
    wait_for({method: launch_training(method, options.output, options) for method in RUNS}, options.output)
    comparison(options.output)
    share_and_reload(options.output)
    print(f"Loss curves: {draw_losses(options.output)}")
    print(f"Done in {time.monotonic() - start:.0f} s; everything is in {options.output}")


if __name__ == "__main__":
    main()
