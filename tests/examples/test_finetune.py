"""The command line of examples/finetune.py, without training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import finetune

from peft_subspace import FloraConfig, PelaConfig, SvfitConfig


@pytest.mark.parametrize(
    ("method", "given", "rate"),
    [
        ("flora", [], FloraConfig.recommended_learning_rate),
        ("svfit", [], SvfitConfig.recommended_learning_rate),
        ("pela", [], PelaConfig.recommended_learning_rate),
        ("lora", [], finetune.LORAS_RATE),
        ("flora", ["--learning_rate", "5e-4"], 5e-4),
        ("flora", ["--learning_rate", "5e-5"], 5e-5),  # also Trainer's own, if that is asked for
    ],
)
def test_the_learning_rate_is_the_method_s_own(
    method: str, given: list[str], rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(finetune, "finetune", lambda arguments, training: found.append(training))
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--method", method, "--output_dir", str(tmp_path), "--use_cpu", *given])
    finetune.main()
    (training,) = found
    assert training.learning_rate == rate > 1e-5
    assert ("as recommended for " + method in capsys.readouterr().out) == (not given)
