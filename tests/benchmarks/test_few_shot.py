"""What the few-shot benchmark computes from runs, and the pieces that its figures depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import few_shot, few_shot_images, few_shot_report
from benchmarks.merge_tasks_models import Rows


def made(task: str, method: str, shots: int, seed: int, accuracy: float, hold_out: bool = False) -> dict[str, Any]:
    return {
        "task": task, "method": method, "shots": shots, "rate": 0.1, "seed": seed, "hold_out": hold_out, "accuracy": accuracy,
        "parameters": 3, "cpu_seconds": 1.0,
    }  # fmt: skip


RUNS = [
    *(made("trec", "probe", 1, seed, 0.5) for seed in (0, 1)),
    made("trec", "atlas", 1, 0, 0.4),
    made("trec", "atlas", 1, 1, 0.6),
    made("trec", "lora", 1, 1, 0.6),
    *(made("trec", method, 16, 0, 0.7) for method in few_shot.AT_TEST_TIME),
    made("trec", "atlas", 1, 100, 0.9, hold_out=True),
]


def test_seeds_are_summed_up_and_runs_for_rates_left_out() -> None:
    (entry,) = [e for e in few_shot_report.summary(RUNS) if e["method"] == "atlas"]
    assert entry["accuracies"] == [0.4, 0.6]
    assert entry["mean"] == pytest.approx(0.5)
    assert entry["deviation"] == pytest.approx(0.02**0.5)


def test_pairs_of_the_same_task_shots_and_seed_are_compared() -> None:
    assert few_shot_report.wins(RUNS, "atlas", "probe") == {"above": 1, "level": 0, "below": 1}
    assert few_shot_report.wins(RUNS, "atlas", "lora") == {"above": 0, "level": 1, "below": 0}


def test_the_report_is_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_shot_report.report(RUNS, tmp_path)
    assert "aTLAS / linear probing: 1 above, 0 level, 1 below" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "few-shot.json").read_text())["entries"]) == 7
    assert (tmp_path / "few-shot.png").read_bytes().startswith(b"\x89PNG")


def test_shots_are_the_first_rows_of_each_class() -> None:
    rows = Rows([[i] for i in range(7)], [0, 1, 0, 0, 1, 2, 0])
    chosen = few_shot.shots(rows, 3, 2)
    assert chosen.ids == [[0], [2], [1], [4], [5]]
    assert chosen.labels == [0, 0, 1, 1, 2]


def test_the_probe_separates_what_can_be_separated() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(20)
    features = 4 * torch.eye(8)[labels] + 0.1 * torch.randn(60, 8)
    head = nn.Linear(8, 3)
    few_shot.probe(head, features, labels)
    assert torch.equal(head(features).argmax(1), labels)


def test_pictures_come_in_batches_as_texts_do() -> None:
    part = {"pixel_values": torch.arange(5.0).view(5, 1, 1, 1), "labels": torch.arange(5)}
    found = few_shot_images.pictures(part, torch.tensor([4, 3, 2, 1, 0]))
    first, second = found.batches(3)
    assert first[0].flatten().tolist() == first[2].tolist() == [4, 3, 2]
    assert second[2].tolist() == [1, 0]
    chosen = few_shot.shots(found, 5, 1)
    (batch,) = chosen.batches(5)
    assert batch[0].flatten().tolist() == batch[2].tolist() == [0, 1, 2, 3, 4]
