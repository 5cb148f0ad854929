"""The benchmark scripts run and say what they promise. No figure is asserted but the exact ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


def run_quick(script: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    main = importlib.import_module(f"benchmarks.{script}").main
    report: dict[str, Any] = main(["--quick", "--out", str(tmp_path), "--name", "quick", *options])
    assert json.loads((tmp_path / "quick.json").read_text()) == report
    assert {"torch", "peft", "transformers", "peft_subspace"} <= set(report["versions"])
    return report


@pytest.mark.parametrize("model", ["llama", "resnet-34"])
def test_step_prints_a_table_with_an_aa_row(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_quick("step", tmp_path, "--model", model)
    printed = capsys.readouterr().out
    assert "lora-again" in printed
    assert "A/A" in printed
    rows = report["rows"]
    assert {"lora", "lora-again", "floor-1", "floor-2", "flora", "flora-official"} <= set(rows)
    assert ("vera" in report["left_out"]) == (model == "resnet-34") == ("vera" not in rows)
    for row in rows.values():
        assert row["bytes_saved"] > 0
        assert len(row["step_ms"]) == 2
        assert all(ms > 0 for ms in row["step_ms"])
    # exact: the same method keeps the same bytes, and no adapter in the first block keeps less than floor 1
    assert rows["lora"]["bytes_saved"] == rows["lora-again"]["bytes_saved"] > rows["floor-1"]["bytes_saved"]
    assert rows["flora"]["adapter_parameters"] == rows["flora-official"]["adapter_parameters"]
    # every method starts at the base, so all losses of the first step are the same
    starts = {name: row["first_loss"] for name, row in rows.items() if not (name == "oft" and model == "resnet-34")}
    assert starts == pytest.approx(dict.fromkeys(starts, rows["floor-1"]["first_loss"]), rel=1e-3)


@pytest.mark.parametrize("model", ["bert-base", "vit-base"])
def test_step_always_measures_lora_twice_and_floor_2(model: str, tmp_path: Path) -> None:
    report = run_quick("step", tmp_path, "--model", model, "--methods", "flora", "--rounds", "1")
    assert set(report["rows"]) == {"flora", "lora", "lora-again", "floor-2"}


def test_step_names_an_unknown_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bogus.*Accepted: all, lora"):
        run_quick("step", tmp_path, "--methods", "flora,bogus")


def test_official_flora_is_the_same_function_as_ours(tmp_path: Path) -> None:
    """The oracle of the table computes what this package computes, for the same factors."""
    import torch

    from benchmarks.step import OfficialFlora
    from peft_subspace import FloraConfig, FloraDelta
    from peft_subspace.base.geometry import describe

    for layer, x in ((torch.nn.Linear(12, 8), torch.randn(5, 12)), (torch.nn.Conv2d(12, 8, 3, 2, 1), torch.randn(2, 12, 9, 9))):
        official = OfficialFlora(layer, 4, 2, scale=0.5)
        torch.nn.init.normal_(official.core)
        delta = FloraDelta(describe(layer)["weight"], FloraConfig(r=4, r_spatial=2, scale=0.5))
        with torch.no_grad():
            delta.core.copy_(official.core.transpose(0, 1))
            for mode, factor in zip([1, 0, 2, 3], official.factors, strict=False):
                getattr(delta, f"factor_{mode}").copy_(factor)
        y0 = layer(x)
        torch.testing.assert_close(delta(x, y0, y0), official(x))


def test_composition_prints_a_table_with_an_aa_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_quick("composition", tmp_path, "--rounds", "1")
    assert "full-again" in capsys.readouterr().out
    rows = report["rows"]
    assert rows["full"]["bytes_saved"] == rows["full-again"]["bytes_saved"] > rows["base"]["bytes_saved"]
    # exact: what is kept does not grow with the number of vectors, or with where they are
    assert rows["atlas-4"]["bytes_saved"] == rows["atlas-16"]["bytes_saved"] == rows["atlas-16-disk"]["bytes_saved"]
    assert rows["atlas-4"]["bytes_saved"] < rows["functional-4"]["bytes_saved"]
    for row in rows.values():
        assert all(ms > 0 for key in ("step_ms", "eval_ms") for ms in row[key])


def test_io_prints_a_table_with_an_aa_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_quick("io", tmp_path)
    assert "lora-again" in capsys.readouterr().out
    rows = report["rows"]
    assert rows["lora"]["file_bytes"] == rows["lora-again"]["file_bytes"]
    for row in rows.values():
        assert row["file_bytes"] > 0
        assert all(ms > 0 for operation in ("init", "save", "load", "merge") for ms in row[operation]["wall_ms"])


def test_pela_step_prints_a_table_with_an_aa_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("benchmarks.pela_step").main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    assert "base again" in capsys.readouterr().out
    rows = json.loads((tmp_path / "pela-step-llama.json").read_text())["rows"]
    assert rows["base"]["bytes_saved"] == rows["base again"]["bytes_saved"]
    assert rows["PELA c=1.5"]["trained"] > rows["PELA c=2"]["trained"] > rows["PELA c=3"]["trained"]


def test_traffic_is_what_the_formulas_say(tmp_path: Path) -> None:
    """Exact: bytes of the collective operations of two processes, for gradients alone and for sharded weights."""
    rows = run_quick("traffic", tmp_path, "--methods", "flora,atlas")["rows"]
    assert set(rows) == {f"{method}, {way}" for method in ("flora", "atlas") for way in ("ddp", "fsdp2")}
    for name, row in rows.items():
        assert row["sent_bytes"] == pytest.approx(row["formula_bytes"], rel=1e-3), name
        assert (set(row["by_operation"]) == {"c10d::allreduce_"}) == ("ddp" in name), name
    assert rows["atlas, ddp"]["sent_bytes"] < rows["flora, ddp"]["sent_bytes"] < rows["flora, fsdp2"]["sent_bytes"]


def test_the_gpu_benchmark_of_the_kernels_runs() -> None:
    """On the CPU both of its columns are the chunks."""
    import torch

    from benchmarks import gpu

    rows = gpu.kernels(torch.device("cpu"), ((8, 8),), (2,), 2)["rows"]
    assert len(rows) == 4
    assert all(len(row["kernel_ms"]) == len(row["chunks_ms"]) == 2 for row in rows.values())
