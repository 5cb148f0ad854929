"""The command line: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from peft_subspace.cli.app import run
from tests.merging.tiny import contents, read, recipe, trio, write
from tests.processes import REPOSITORY, run_python

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command line in a folder with `base`, `a`, `b`, `c` and `recipe.yaml`: exit code, stdout, stderr."""
    trio(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe(Path())))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_merge_and_verify(command: Command) -> None:
    code, out, err = command("merge", "recipe.yaml", "out")
    assert (code, err) == (0, "")
    assert out.startswith("out: 15 tensors, 22.2 kB, in ")
    code, out, _ = command("verify", "out")
    assert code == 0
    assert out.startswith("out: 4 files (")
    assert out.endswith(" are as they were written, 6 files of the inputs as they were read.\n")
    assert command("merge", "recipe.yaml", "quiet", "-q") == (0, "", "")
    assert contents(Path("quiet")) == contents(Path("out"))


def test_an_adapter_is_called_one(command: Command) -> None:
    command("extract", "a", "lora", "--base", "base", "--rank", "2", "-q")
    table = {"merge_method": "linear", "base_model": "base", "models": [{"model": "lora"}], "subspace": {"output": "adapter"}}
    Path("adapter.yaml").write_text(yaml.safe_dump(table))
    code, out, _ = command("merge", "adapter.yaml", "out")
    assert code == 0
    assert command("merge", "adapter.yaml", "other", "--device", "cuda")[0] == 2  # not passed over in silence
    assert out.startswith(f"out: a LoRA adapter, {Path('out/adapter_model.safetensors').stat().st_size / 1000:.1f} kB, in ")


def test_exit_codes(command: Command) -> None:
    assert command("merge", "recipe.yaml")[0] == 2
    message = "Error: nothing.yaml: the recipe cannot be read: No such file or directory.\n"
    assert command("merge", "nothing.yaml", "out") == (2, "", message)
    Path("typo.yaml").write_text(Path("recipe.yaml").read_text().replace("merge_method", "merge_methd"))
    code, _, err = command("merge", "typo.yaml", "out")
    assert code == 2
    assert "unknown key 'merge_methd'; did you mean 'merge_method'?" in err
    Path("lost.yaml").write_text(yaml.safe_dump(recipe(Path(), models="ax")))
    code, _, err = command("merge", "lost.yaml", "out")
    assert code == 3
    assert err.startswith(f"Error: 'x': there is no such folder or file in {Path.cwd()}")
    assert command("merge", "recipe.yaml", "a")[0] == 4
    assert command("merge", "recipe.yaml", "out", "-q")[0] == 0
    Path("out/config.json").write_text("{}")
    code, _, err = command("verify", "out")
    assert code == 5
    assert "config.json has" in err
    code, _, err = command("merge", "recipe.yaml", "new", "--device", "cuda:99")
    assert code == 2
    assert "--device cuda:99: torch cannot use it here" in err
    assert command("merge", "recipe.yaml", "new", "--push-to-hub", "bad//name")[0] == 2
    assert not list(Path().glob("new*"))
    for wrong in (
        ["merge"],
        ["mrge"],
        ["merge", "recipe.yaml", "out2", "--threads", "0"],
        ["merge", "recipe.yaml", "out2", "--no"],
    ):
        code, _, err = command(*wrong)
        assert code == 2
        assert "Traceback" not in err
    assert command("--help")[0] == 0
    assert command("--version")[:2] == (0, f"peft_subspace {__import__('peft_subspace').__version__}\n")


def test_ctrl_c_is_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_subspace.merging.execute.execute", interrupted)
    code, _, err = command("merge", "recipe.yaml", "out")
    assert code == 130
    assert "--resume" in err


def test_a_base_without_a_config_is_said_to_give_none(command: Command) -> None:
    Path("base/config.json").unlink()
    for more in (["--dry-run"], []):
        code, _, err = command("merge", "recipe.yaml", "out", *more)
        assert code == 0
        assert "Warning: base has no config.json, so the result has none, and transformers cannot load it by itself." in err
    Path("vector.yaml").write_text(yaml.safe_dump(recipe(Path(), subspace={"output": "task_vector"})))
    assert command("merge", "vector.yaml", "vector")[2] == ""


def test_dry_run_says_what_each_value_is_used_for(command: Command) -> None:
    table = recipe(Path(), "ties", "ab", parameters={"density": [0.2, 0.8]})
    table["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]
    Path("filters.yaml").write_text(yaml.safe_dump(table))
    code, out, _ = command("merge", "filters.yaml", "--dry-run")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("Value")] == [
        "Value    weight of a: 'mlp': 0, 1 from the first layer to the last, 6 tensors",
        "Value    weight of a: 0.5, 9 tensors",
        "Value    weight of b: 0.6, 15 tensors",
        "Value    density of a: 0.2, 0.8 from the first layer to the last, 15 tensors",
        "Value    density of b: 0.2, 0.8 from the first layer to the last, 15 tensors",
    ]
    table["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 1.0}]
    Path("filters.yaml").write_text(yaml.safe_dump(table))
    for more in ([], ["--dry-run"]):
        code, _, err = command("merge", "filters.yaml", "out", *more)
        assert code == 2
        assert "parameters for 'lm_head.weight': no filter" in err
    table["models"][0]["parameters"]["weight"] = [{"filter": "mpl", "value": 1.0}, {"value": 1.0}]
    Path("filters.yaml").write_text(yaml.safe_dump(table))
    for more in ([], ["--dry-run"]):
        code, _, err = command("merge", "filters.yaml", "out", *more)
        assert (code, Path("out").exists()) == (2, False)
        assert "models[0].parameters: weight: the filter 'mpl' is in no tensor's name; did you mean 'mlp'?" in err


def test_dry_run(command: Command) -> None:
    code, out, _ = command("merge", "recipe.yaml", "--dry-run")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("Model"))
    assert lines["Tensors"] == "15 (15 merged), 5,184 values, F32"
    assert lines["Writes"].startswith("model.safetensors, 15 tensors, ")
    assert not Path("out").exists()
    command("merge", "recipe.yaml", "out", "-q")
    assert f"{Path('out/model.safetensors').stat().st_size:,} bytes" in lines["Writes"]
    code, out, _ = command("merge", "recipe.yaml", "--dry-run", "--shard-size", "5KB")
    assert "model-00002-of-" in out
    for wrong in ("many", "0"):
        assert command("merge", "recipe.yaml", "--dry-run", "--shard-size", wrong)[0] == 2


START = """
import os, sys
os.chdir(sys.argv[1])
import peft_subspace_cli
peft_subspace_cli.install()
from peft_subspace.cli import run
code = run(sys.argv[2:])
heavy = ("torch", "peft", "transformers", "huggingface_hub", "numpy", "matplotlib", "rich")
print("code", code, "imported", [name for name in heavy if name in sys.modules])
import peft_subspace
print(peft_subspace.FloraConfig.__name__, "peft" in sys.modules)
"""


def test_a_dry_run_imports_nothing_heavy_and_the_package_is_whole_when_it_is_used(command: Command, tmp_path: Path) -> None:
    printed = run_python(START, tmp_path, "merge", "recipe.yaml", "--dry-run").splitlines()
    assert printed[-2:] == ["code 0 imported []", "FloraConfig True"]


def test_a_dry_run_of_adapters_imports_nothing_heavy_either(command: Command, tmp_path: Path) -> None:
    command("extract", "a", "lora", "--base", "base", "--rank", "2", "-q")
    table = {"merge_method": "linear", "base_model": "base", "models": [{"model": "lora"}], "subspace": {"output": "adapter"}}
    Path("adapter.yaml").write_text(yaml.safe_dump(table))
    printed = run_python(START, tmp_path, "merge", "adapter.yaml", "--dry-run").splitlines()
    assert printed[-2:] == ["code 0 imported []", "FloraConfig True"]


@pytest.mark.parametrize(
    ("change", "arguments", "code", "message"),
    [
        ({"tokenizer_source": "union"}, [], 2, "tokenizer_source: union is not supported"),
        ({"tokenizer_source": "nobody/at all"}, [], 3, "'nobody/at all': there is no such folder"),
        ({"chat_template": "foo"}, [], 2, "chat_template: 'foo' is not known. Accepted: auto, chatml, or a Jinja template"),
        ({"models": [{"model": "other"}]}, [], 3, "other: its tokenizer has other tokens than that of base (such as 'x', 'y')"),
        ({"subspace": {"output": "adapter"}}, [], 2, "subspace.output is adapter, and a is a whole model"),
        ({"models": [{"model": "lora"}], "subspace": {"output": "adapter"}}, ["--device", "cuda"], 2, "merged on the CPU"),
        (
            {"models": [{"model": "lora"}], "subspace": {"output": "adapter", "adapter": {"method": "knots"}}}, [], 2,
            "method: knots goes with merge_method: knots",
        ),
        (
            {"models": [{"model": "tv.safetensors"}], "subspace": {"output": "adapter"}}, [], 2,
            "the update of 'lm_head.weight' is dense, so that it has no rank of its own",
        ),
        (
            {"models": [{"model": "tv.safetensors"}], "subspace": {"output": "adapter", "adapter": {"rank": 2}}}, [], 3,
            "'model.layers.0.input_layernorm.weight' [16] is changed, and LoRA has no layer for it",
        ),
        ({"models": [{"model": "head"}], "subspace": {"output": "adapter"}}, [], 3, "none of the models changes a weight"),
        ({}, ["--device", "foo"], 2, "--device foo: torch cannot use it here"),
        ({}, ["--device", "meta"], 2, "--device meta: torch cannot use it here"),
        ({}, ["a/out"], 4, "is, holds or lies in the model a"),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_merge_refuses(
    command: Command, change: dict[str, Any], arguments: list[str], code: int, message: str
) -> None:
    write(Path("other"), read(Path("a")))
    for name, tokens in (("base", {"y": 0}), ("other", {"x": 0})):
        Path(name, "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    assert command("extract", "a", "lora", "--base", "base", "--rank", "2", "-q")[0] == 0
    assert command("extract", "a", "tv.safetensors", "--base", "base", "--task-vector", "-q")[0] == 0
    Path("head").mkdir()
    save_file({"base_model.model.lm_head.weight": read(Path("a"))["lm_head.weight"]}, "head/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["x"], "modules_to_save": ["lm_head"]}
    Path("head/adapter_config.json").write_text(json.dumps(config))
    table = {"merge_method": "linear", "base_model": "base", "models": [{"model": "a"}], **change}
    Path("recipe.yaml").write_text(yaml.safe_dump(table))
    where = arguments if arguments == ["a/out"] else ["out", *arguments]
    before = _everything()
    for more in ([], ["--dry-run"]):
        found, _, err = command("merge", "recipe.yaml", *where, *more)
        assert (found, err.count("Error: ")) == (code, 1), err
        assert message in err
    assert _everything() == before


def test_a_merge_imports_neither_peft_nor_transformers(command: Command, tmp_path: Path) -> None:
    printed = run_python(START, tmp_path, "merge", "recipe.yaml", "out", "-q").splitlines()
    assert printed[0] == "code 0 imported ['torch', 'numpy']"


def test_the_installed_command(command: Command, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("peft-subspace")
    found = subprocess.run([script, "merge", "recipe.yaml", "out"], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    module = [sys.executable, "-m", "peft_subspace_cli", "merge", "x.yaml", "y"]
    broken = subprocess.run(module, capture_output=True, text=True, cwd=REPOSITORY)
    assert (broken.returncode, broken.stderr.count("Traceback")) == (2, 0)


def test_extract_and_inspect(command: Command) -> None:
    code, out, _ = command("extract", "a", "lora", "--base", "base", "--rank", "4")
    assert code == 0
    assert out.startswith("lora: 11 weights, rank 4, ")
    assert "Relative error of the whole difference: 0." in out
    code, out, _ = command("extract", "b", "tv.safetensors", "--base", "base", "--task-vector")
    assert (code, out.split(",")[0]) == (0, "tv.safetensors: 15 tensors")
    assert command("extract", "b", "tv.safetensors", "--base", "base", "--task-vector")[0] == 4
    assert command("extract", "b", "tv", "--base", "base", "--task-vector")[0] == 2
    assert command("extract", "b", "x", "--base", "base")[0] == 2
    code, out, _ = command("inspect", "a", "tv.safetensors", "lora", "--base", "base", "--spectrum", "--plot", "x.png")
    assert code == 0
    assert "Signs differ at" in out
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert command("inspect", "lora")[0] == 0
    code, _, err = command("inspect", "a")
    assert code == 3
    assert "name the base" in err
    for wrong, code, message in (("x.nothing", 2, "a picture ends in one of"), ("no/x.png", 4, "there is no folder no")):
        found = command("inspect", "lora", "--plot", wrong)
        assert (found[0], found[1]) == (code, "")  # said before the models are read
        assert message in found[2]


def test_what_is_not_a_number_has_no_spectrum(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.pico import MODELS

    model: Any = MODELS["llama"].model()
    model.save_pretrained("whole")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained("nan")
    for more in (["--base", "whole"], []):
        code, out, err = command("inspect", "nan", "--spectrum", *more)
        assert (code, out) == (3, "")
        assert "up_proj.weight' has values that are NaN or infinite, and so no singular values" in err

    def fails(*_: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("peft_subspace.task_vectors.compare._singular_values", fails)
    code, _, err = command("inspect", "a", "--base", "base", "--spectrum")
    assert (code, err) == (
        3,
        "Error: a matrix cannot be decomposed; a model has values that are NaN, infinite or too large: did not converge\n",
    )


def _everything() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("model", "out", "more", "message"),
    [
        ("a", "a", ["--rank", "2"], "a: (already exists and holds|is a file)"),
        ("a", "base", ["--rank", "2"], "base: (already exists and holds|is a file)"),
        ("a", "a/lora", ["--rank", "2"], "a/lora: is, holds or lies in the model a"),
        ("all/a", "all", ["--rank", "2"], "all: (already exists and holds|is a file)"),
        ("base+lora", "lora", ["--rank", "2"], "lora: is, holds or lies in the model lora"),
        ("lora", "link", ["--rank", "2"], "link: is, holds or lies in the model lora"),
        ("a", "notes", ["--rank", "2"], "notes: (already exists and holds|is a file)"),
        ("a", "recipe.yaml", ["--rank", "2"], "recipe.yaml: (already exists and holds|is a file)"),
        ("c", "c/model.safetensors", ["--task-vector"], "is a file, and no task-vector file"),
        ("c", "base/new.safetensors", ["--task-vector"], "is, holds or lies in the model base"),
        ("tv.safetensors", "tv.safetensors", ["--task-vector"], "is, holds or lies in the model tv.safetensors"),
    ],
)
def test_extract_never_replaces_its_inputs(command: Command, model: str, out: str, more: list[str], message: str) -> None:
    assert command("extract", "a", "lora", "--base", "base", "--rank", "2", "-q")[0] == 0
    assert command("extract", "a", "tv.safetensors", "--base", "base", "--task-vector", "-q")[0] == 0
    write(Path("all/a"), read(Path("a")))
    Path("all/thesis.tex").write_text("x")
    Path("notes").mkdir()
    Path("notes/diary").write_text("x")
    Path("link").symlink_to("lora")
    before = _everything()
    code, _, err = command("extract", model, out, "--base", "base", "--overwrite", *more)
    assert code == 4
    assert re.search(message, err), err
    assert _everything() == before


def test_extract_replaces_an_adapter(command: Command) -> None:
    for rank in ("2", "3"):
        assert command("extract", "a", "lora", "--base", "base", "--rank", rank, "--overwrite", "-q") == (0, "", "")
        assert json.loads(Path("lora/adapter_config.json").read_text())["r"] == int(rank)
    assert not [path.name for path in Path().glob("*lora*") if path.name != "lora"]


def test_export_never_replaces_its_inputs(command: Command) -> None:
    import peft

    import peft_subspace
    from tests.pico import MODELS

    pico = MODELS["llama"]
    pico.model().save_pretrained("llama")
    wrapped = peft.get_peft_model(pico.model(), peft_subspace.FloraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained("flora")
    wrapped.save_pretrained("all/flora")
    Path("all/adapter_config.json").write_text("{}")
    before = _everything()
    for adapter, out in (("flora", "flora"), ("flora", "llama"), ("all/flora", "all"), ("flora", "flora/lora")):
        code, _, err = command("export", adapter, out, "--base", "llama", "--overwrite")
        assert code == 4
        assert "is, holds or lies in the model" in err or "Nothing of others is ever replaced" in err
        assert _everything() == before
    assert command("export", "flora", "lora", "--base", "llama")[0] == 0
    assert command("export", "flora", "lora", "--base", "llama", "--overwrite")[0] == 0
    Path("flora/adapter_config.json").write_text(
        json.dumps({**json.loads(Path("flora/adapter_config.json").read_text()), "pool": {"x": "lora"}})
    )
    code, _, err = command("export", "flora", "lora", "--base", "llama", "--overwrite")
    assert (code, "lora: is, holds or lies in the model lora" in err) == (4, True)


def test_export(command: Command, tmp_path: Path) -> None:
    import peft

    import peft_subspace
    from tests.pico import MODELS
    from tests.pico import run as output

    pico = MODELS["llama"]
    pico.model().save_pretrained("llama")
    wrapped = peft.get_peft_model(pico.model(), peft_subspace.FloraConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    wrapped.peft_config["default"].task_type = "CAUSAL_LM"
    wrapped.save_pretrained("flora")
    code, _, err = command("export", "flora", "lora")
    assert code == 3
    assert "give it with --base" in err
    assert command("export", "flora", "lora", "--base", "llama")[0] == 0
    loaded = peft.PeftModel.from_pretrained(pico.model(), "lora")
    torch.testing.assert_close(output(loaded, pico.batch()), output(wrapped, pico.batch()))
    assert command("export", "lora", "again", "--base", "llama")[0] == 3
    assert command("export", "flora", "lora", "--base", "llama")[0] == 4


@pytest.mark.parametrize("method", ["FloraConfig", "SvfitConfig"])
def test_export_from_a_shell(command: Command, method: str) -> None:
    """Through the installed command, where nothing has imported the package before; and without a task type, PEFT's default."""
    import peft

    import peft_subspace
    from tests.pico import MODELS
    from tests.pico import run as output
    from tests.processes import run_python

    pico = MODELS["llama"]
    pico.model().save_pretrained("llama")
    config = getattr(peft_subspace, method)(r=2, init_weights=False, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(pico.model(), config)
    wrapped.save_pretrained("adapter")
    here = Path.cwd()
    run_python("-m peft_subspace_cli", "export", here / "adapter", here / "as-lora", "--base", here / "llama")
    loaded = peft.PeftModel.from_pretrained(pico.model(), "as-lora")
    torch.testing.assert_close(output(loaded, pico.batch()), output(wrapped, pico.batch()))


def test_export_of_what_lora_cannot_express(command: Command) -> None:
    import peft

    import peft_subspace
    from tests.pico import MODELS

    pico = MODELS["moe"]
    pico.model().save_pretrained("moe")
    config = peft_subspace.FloraConfig(r=2, target_modules=["router"], init_weights=False)
    peft.get_peft_model(pico.model(), config).save_pretrained("adapter")
    code, _, err = command("export", "adapter", "as-lora", "--base", "moe")
    assert (code, "forward of its own" in err) == (3, True), err
    assert not Path("as-lora").exists()


def test_pickles_through_the_command_line(command: Command) -> None:
    tensors = read(Path("a"))
    Path("a/model.safetensors").unlink()
    torch.save(tensors, "a/pytorch_model.bin")
    code, _, err = command("merge", "recipe.yaml", "out")
    assert (code, "--allow-pickle" in err) == (3, True)
    assert command("merge", "recipe.yaml", "out", "--allow-pickle")[0] == 0
    write(Path("a"), tensors)
    command("merge", "recipe.yaml", "out2", "-q")
    assert Path("out/model.safetensors").read_bytes() == Path("out2/model.safetensors").read_bytes()


def test_adapters_in_pickles_through_the_command_line(command: Command) -> None:
    """What PEFT before 0.7 wrote: every command that reads an adapter reads it, if it may."""
    command("extract", "a", "lora", "--base", "base", "--rank", "4", "-q")
    table = {"merge_method": "linear", "base_model": "base", "models": [{"model": "lora"}]}
    Path("lora.yaml").write_text(yaml.safe_dump(table))
    assert command("merge", "lora.yaml", "before", "-q")[0] == 0
    torch.save(load_file("lora/adapter_model.safetensors"), "lora/adapter_model.bin")
    Path("lora/adapter_model.safetensors").unlink()
    calls = [
        ("merge", "lora.yaml", "out"),
        ("merge", "lora.yaml", "--dry-run"),
        ("inspect", "lora"),
        ("inspect", "lora", "--base", "base"),
        ("extract", "base+lora", "again", "--base", "base", "--rank", "4"),
    ]
    for call in calls:
        code, _, err = command(*call)
        assert code == 3
        assert "lora: has its weights in a pickle (adapter_model.bin), which can run code" in err
        assert "Pass --allow-pickle" in err
        assert command(*call, "--allow-pickle")[0] == 0
    assert Path("out/model.safetensors").read_bytes() == Path("before/model.safetensors").read_bytes()


HUB = """
import json, os, sys
from pathlib import Path
from huggingface_hub import HfApi
from peft_subspace.cli.app import run
from peft_subspace.merging.planner import make_plan
from peft_subspace.merging.recipe import make_recipe
from peft_subspace.task_vectors.remote import headers_only
from tests.merging.tiny import contents, near, random_tensors, recipe, trio, write
folder = Path(sys.argv[1])
models = trio(folder)
api = HfApi()
for name in ("base", "a"):
    api.create_repo(f"user/{name}")
    api.upload_folder(repo_id=f"user/{name}", folder_path=folder / name)
api.create_tag("user/a", tag="v1")
write(folder / "a2", near(models["base"], 99))
api.upload_folder(repo_id="user/a", folder_path=folder / "a2")
table = {"merge_method": "task_arithmetic", "base_model": "user/base", "models": [{"model": "user/a@v1"}]}
(folder / "recipe.json").write_text(json.dumps(table))
assert run(["merge", str(folder / "recipe.json"), "--dry-run"]) == 0
cache = Path(os.environ["HF_HUB_CACHE"])
assert not list(cache.rglob("*.safetensors")), "a dry run downloads no weights"
assert len(list(cache.rglob("config.json"))) == 2
with headers_only():
    planned = make_plan(make_recipe(table))
stored = planned.files["user/a@v1: model.safetensors"].tensors
assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: ("F32", tuple(x.shape)) for n, x in models["a"].items()}
assert run(["merge", str(folder / "recipe.json"), str(folder / "out"), "--push-to-hub", "user/merged"]) == 0
assert run(["verify", str(folder / "out")]) == 0
manifest = json.loads((folder / "out/merge_manifest.json").read_text())
assert len(manifest["inputs"][0]["commit"]) == 40
local = {**table, "base_model": str(folder / "base"), "models": [{"model": str(folder / "a")}]}
(folder / "local.json").write_text(json.dumps(local))
assert run(["merge", str(folder / "local.json"), str(folder / "here")]) == 0
assert (folder / "out/model.safetensors").read_bytes() == (folder / "here/model.safetensors").read_bytes()
down = api.snapshot_download("user/merged")
names = {path.name for path in Path(down).iterdir()}
ours = {"README.md", "config.json", "merge_manifest.json", "merge_recipe.yaml", "model.safetensors"}
assert names == {".gitattributes", *ours}, names
assert "base_model:\\n- \\"user/base\\"\\n- \\"user/a\\"" in (Path(down) / "README.md").read_text()
def push(out, *more):
    return run(["merge", str(folder / "local.json"), str(folder / out), "-q", "--push-to-hub", *more])
before = contents(folder / "out")
assert push("again", "user/merged") == 4, "it holds a result already"
assert push("again", "user/a", "--overwrite") == 4, "no merge wrote it"
assert not (folder / "again").exists(), "asked before anything is computed"
assert push("sharded", "user/merged", "--overwrite", "--shard-size", "3kB") == 0
assert not api.file_exists("user/merged", "model.safetensors"), "a file of the old result would be loaded in place of the new"
assert set(api.list_repo_files("user/merged")) == {".gitattributes", *os.listdir(folder / "sharded")}
assert contents(folder / "out") == before
assert push("sharded", "user/merged", "--resume", "--shard-size", "3kB") == 0, "the upload is done again"
import torch
(folder / "pickled").mkdir()
(folder / "pickled/config.json").write_text((folder / "a/config.json").read_text())
torch.save(models["a"], folder / "pickled/pytorch_model.bin")
(folder / "adapter").mkdir()
(folder / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
torch.save({f"{key}A.weight": torch.ones(2, 16), f"{key}B.weight": torch.ones(16, 2)}, folder / "adapter/adapter_model.bin")
for name in ("pickled", "adapter"):
    api.create_repo(f"user/{name}")
    api.upload_folder(repo_id=f"user/{name}", folder_path=folder / name)
    table["models"] = [{"model": f"user/{name}"}]
    (folder / "recipe.json").write_text(json.dumps(table))
    for more in (["--dry-run"], []):
        assert run(["merge", str(folder / "recipe.json"), str(folder / f"out {name}"), *more]) == 3
    for more in (["--dry-run"], []):
        assert run(["merge", str(folder / "recipe.json"), str(folder / f"out {name}"), "--allow-pickle", *more]) == 0
table["models"] = [{"model": "user/nothing"}]
(folder / "recipe.json").write_text(json.dumps(table))
assert run(["merge", str(folder / "recipe.json"), str(folder / "no")]) == 3
assert run(["merge", str(folder / "recipe.json"), "--dry-run"]) == 3
print("done")
"""


def test_models_from_and_to_the_hub(tmp_path: Path) -> None:
    from tests.hub.server import LocalHub

    with LocalHub(tmp_path / "hub", {"merge-test"}) as hub:
        environment = hub.environment(tmp_path / "home", "merge-test")
        assert run_python(HUB, tmp_path / "work", **environment).endswith("done\n")


def test_progress_on_a_terminal_and_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_subspace.cli import console

    monkeypatch.setattr(console, "EVERY", 0.0)
    with console.progress("Merging", 2_000_000) as advance:
        advance(1_500_000)
    err = capsys.readouterr().err
    assert err.startswith("Merging: 1.5 MB of 2.0 MB, ")
    assert err.rstrip().endswith("left")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.progress("Merging", 100) as advance:
        advance(100)
    assert "Merging" in capsys.readouterr().err
    with console.progress("Merging", 100, quiet=True) as advance:
        advance(100)
    assert capsys.readouterr().err == ""
    assert [console.size(n) for n in (5, 1500, 2.5e9, 3e15)] == ["5 B", "1.5 kB", "2.5 GB", "3000.0 TB"]
    assert [console.duration(s) for s in (0.2, 61, 7300)] == ["1 s", "1 min 1 s", "2 h 1 min"]


def test_recipes_may_be_json(command: Command) -> None:
    Path("recipe.json").write_text(json.dumps(recipe(Path())))
    assert command("merge", "recipe.json", "out", "-q")[0] == 0


def test_a_quiet_dry_run_prints_nothing(command: Command) -> None:
    assert command("merge", "recipe.yaml", "--dry-run", "-q") == (0, "", "")
    assert command("merge", "lost.yaml", "--dry-run", "-q")[0] != 0


def test_resume_says_when_there_is_nothing_to_resume(command: Command) -> None:
    code, out, _ = command("merge", "recipe.yaml", "out", "--resume")
    assert code == 0
    assert "Nothing to resume: there is no out.partial; starting anew." in out
    code, out, _ = command("merge", "recipe.yaml", "out", "--resume")
    assert code == 0
    assert "Nothing to resume: out already exists." in out
    other = yaml.safe_load(Path("recipe.yaml").read_text())
    other["base_model"] = str(Path("base").resolve())  # the same, said otherwise
    Path("same.yaml").write_text(yaml.safe_dump(dict(reversed(other.items()))))
    assert command("merge", "same.yaml", "out", "--resume")[0] == 0
    other["models"][0]["parameters"]["weight"] = 0.9
    Path("other.yaml").write_text(yaml.safe_dump(other))
    code, _, err = command("merge", "other.yaml", "out", "--resume")
    assert code == 4
    assert "out: already exists, and merge_recipe.yaml in it is another recipe" in err
