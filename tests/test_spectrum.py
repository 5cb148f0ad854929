"""The spectrum of a model's weights: the numbers, the table, the picture, the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from peft_subspace import SvfitConfig, draw_spectrum, spectrum_table, weight_spectra
from peft_subspace.cli import run
from tests.pico import MODELS


@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("conv", "all-conv"), ("gpt2", ["c_attn"])])
def test_spectra_are_the_singular_values(name: str, targets: str | list[str]) -> None:
    model = MODELS[name].model()
    spectra = weight_spectra(model, targets, energies=[0.5, 1.0])
    assert len(spectra) == len(SvfitConfig(target_modules=targets).target_modules or []) * 2 or name != "gpt2"
    for one in spectra:
        weight = model.get_parameter(one.name).double()
        if name == "gpt2":
            weight = weight.T
        groups = one.values.shape[0] if one.values.ndim > 1 else 1
        matrix = weight.flatten(1).unflatten(0, (groups, -1)) if groups > 1 else weight.flatten(1)
        torch.testing.assert_close(one.values, torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-7)
        squares = one.values.square().reshape(-1, one.full).sum(0)
        r = one.ranks[0.5]
        assert squares[:r].sum() >= 0.5 * squares.sum()
        assert r == 1 or squares[: r - 1].sum() < 0.5 * squares.sum()
        assert one.ranks[1.0] == one.full


def test_an_adapted_model_has_the_spectra_of_its_base() -> None:
    before = weight_spectra(MODELS["llama"].model())
    model = get_peft_model(MODELS["llama"].model(), SvfitConfig(r=2, init_weights=False, target_modules="all-linear"))
    after = weight_spectra(model.get_base_model())
    assert [one.name for one in after] == [one.name for one in before]
    assert all(torch.equal(a.values, b.values) for a, b in zip(after, before, strict=True))


def test_table_and_picture(tmp_path: Path) -> None:
    spectra = weight_spectra(MODELS["llama"].model())
    console = Console(width=150, record=True)
    console.print(spectrum_table(spectra))
    text = console.export_text()
    assert "r at 99 %" in text
    assert "model.layers.1.mlp.down_proj.weight" in text
    draw_spectrum(spectra, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = str(tmp_path / "model"), tmp_path / "picture.png"
    MODELS["bert"].model().save_pretrained(folder)
    capsys.readouterr()
    assert run(["inspect", folder, "--spectrum", "--plot", str(picture)]) == 0
    assert "r at 90 %" in capsys.readouterr().out
    assert picture.exists()
    assert run(["inspect", folder, "--spectrum", "--plot", "x.nothing"]) == 2
    assert "a picture ends in one of" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "bogus"), "--spectrum"]) == 3


def test_a_config_without_sizes_does_not_build_the_default_of_its_type(tmp_path: Path, capsys: Any) -> None:
    MODELS["llama"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in ("model_type", "architectures")}))
    assert run(["inspect", str(tmp_path), "--spectrum"]) == 3
    assert re.search(r"makes a model of [\d,]+ parameters, and its files have [\d,]+\.", capsys.readouterr().err)
