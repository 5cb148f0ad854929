"""The opt-in start-up file, in a virtual environment of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_subspace import FloraConfig
from tests.processes import REPOSITORY

Run = Callable[..., subprocess.CompletedProcess[str]]
STUB_PEFT = {"peft/__init__.py": "print('peft')", "peft/tuners.py": "print('tuners')"}
STUB_PLUGIN = {"peft_subspace/__init__.py": "import peft, sys; print('plugin', 'peft' in sys.modules)"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees this one's packages and the repository through a .pth file."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{REPOSITORY}\n")
    return folder


@pytest.fixture(scope="module")
def run(environment: Path) -> Run:
    def run_there(script: str, *arguments: object, stubs: Path | None = None) -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        variables |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(stubs)} if stubs else {})
        command = [environment / "bin" / "python", "-c", script, *map(str, arguments)]
        result = subprocess.run(command, cwd=environment, env=variables, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        return result

    return run_there


@pytest.fixture(scope="module")
def enabled(environment: Path, run: Run) -> list[Path]:
    """Goes through the commands and leaves the start-up files in place; these are returned."""
    script = """
import sys
from peft_subspace.__main__ import main
for action in ("status", "disable", "enable", "enable", "status", "disable", "status", "enable"):
    main(["autoload", action])
"""
    states = [line.split()[2] for line in run(script).stdout.splitlines()]
    assert states == [
        "disabled", "disabled", "enabled", "enabled", "enabled", "disabled", "disabled", "enabled",
    ]  # fmt: skip
    added = sorted(path for path in environment.glob("lib/python*/site-packages/*") if "autoload" in path.name)
    assert [path.name for path in added] == ["_peft_subspace_autoload.py", "peft_subspace_autoload.pth"]
    return added


def make_stubs(folder: Path, *files: dict[str, str]) -> Path:
    for name, text in {key: text for part in files for key, text in part.items()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_nothing_heavy_is_imported_at_start(run: Run, enabled: list[Path]) -> None:
    script = "import sys; print([m for m in ('torch', 'peft', 'transformers', 'peft_subspace') if m in sys.modules])"
    assert run(script).stdout.strip() == "[]"


PLUGIN_FOLLOWS_PEFT = {
    "peft first": "import peft",
    "a submodule first": "import peft.tuners",
    "the plugin first": "import peft_subspace",
    "after a look whether peft exists": "import importlib.util as u; assert u.find_spec('peft'); import peft",
    "twice": "import peft, importlib; importlib.reload(peft)",
    "peft found by a finder of its own": """
import importlib.machinery, sys

class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "peft":
            return importlib.machinery.PathFinder.find_spec(name, [sys.argv[1] + "/elsewhere"])

sys.meta_path.append(Editable)
import peft
""",
}


@pytest.mark.parametrize("way", PLUGIN_FOLLOWS_PEFT)
def test_the_plugin_is_imported_after_peft(way: str, run: Run, enabled: list[Path], tmp_path: Path) -> None:
    peft = STUB_PEFT
    if "finder" in way:
        peft = {f"elsewhere/{name}": text for name, text in STUB_PEFT.items()}
    stubs = make_stubs(tmp_path, peft, STUB_PLUGIN)
    # the real one must not be found when the stub is elsewhere
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    printed = run(hide + PLUGIN_FOLLOWS_PEFT[way], tmp_path, stubs=stubs).stdout.split("\n")
    assert printed[:2] == ["peft", "plugin True"]
    assert printed.count("plugin True") == 1


BROKEN = {
    "uninstalled": ({}, "ModuleNotFoundError: No module named 'peft_subspace'"),
    "does not import": ({"peft_subspace/__init__.py": "import nothing_of_that_name"}, "No module named 'nothing_of_that_name'"),
    "clashes": ({"peft_subspace/__init__.py": "raise RuntimeError('FLORA exists')"}, "RuntimeError: FLORA exists"),
    "syntax": ({"peft_subspace/__init__.py": "def"}, "SyntaxError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_does_not_break_peft(kind: str, run: Run, enabled: list[Path], tmp_path: Path) -> None:
    plugin, message = BROKEN[kind]
    hide = f"import sys; sys.path.remove({str(REPOSITORY)!r}); import peft; print('goes on')"
    result = run(hide, stubs=make_stubs(tmp_path, STUB_PEFT, plugin))
    assert result.stdout.split() == ["peft", "goes", "on"]
    assert "peft_subspace autoload: " in result.stderr
    assert message in result.stderr


BARE_PICKLE = """
import pickle, sys
member = pickle.loads(open(sys.argv[1], "rb").read())
assert repr(member) == "<PeftType.FLORA: 'FLORA'>"
import peft
config = peft.PeftConfig.from_pretrained(sys.argv[2])
assert type(config) is peft.get_peft_config({"peft_type": "FLORA"}).__class__ is sys.modules["peft_subspace"].FloraConfig
print("known")
"""
TRANSFORMERS_ONLY = """
import sys
from transformers import AutoModelForCausalLM
assert "peft" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("peft_subspace.")
print("known")
"""


def test_real_processes_that_never_import_the_plugin(run: Run, enabled: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
                                         num_attention_heads=2))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")  # what the adapter notes as its base
    get_peft_model(model, FloraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "bare").write_bytes(pickle.dumps(PeftType.FLORA))
    assert run(BARE_PICKLE, tmp_path / "bare", tmp_path / "adapter").stdout.strip() == "known"
    assert run(TRANSFORMERS_ONLY, tmp_path / "adapter").stdout.strip() == "known"


def test_disabling_removes_the_files_and_the_effect(run: Run, enabled: list[Path]) -> None:
    run(f"import runpy; runpy.run_path({str(REPOSITORY / 'peft_subspace' / 'autoload.py')!r})['disable']()")
    assert not any(path.exists() for path in enabled)
    finders = run("import sys; print([type(f).__module__ for f in sys.meta_path])").stdout
    assert "_peft_subspace_autoload" not in finders
