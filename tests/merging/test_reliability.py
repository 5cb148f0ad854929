"""Whatever happens to a merge, there is a clear error and no half result, or the whole result."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, hub
from peft_subspace.cli.app import run as command
from peft_subspace.merging import execute, files, merge, verify
from peft_subspace.merging.journal import Journal
from peft_subspace.merging.methods.registry import Parameter, get, names
from peft_subspace.task_vectors.errors import InputError, OutputError, RecipeError
from peft_subspace.task_vectors.output_folder import OutputFolder
from tests.disks import mounted
from tests.merging import crashes
from tests.merging.tiny import as_module, contents, recipe, trio, write
from tests.pico import MODELS


def test_killed_at_any_point_and_resumed_it_gives_the_same_bytes(tmp_path: Path) -> None:
    found = crashes.run(tmp_path, points=12, seed=int.from_bytes(os.urandom(4), "little"))
    assert found["compared"] == 12
    assert found["killed"] >= 12
    assert found["resumed"] >= 3


def test_resuming_does_not_trust_what_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power, a tensor that the journal has may be full of zeros."""
    trio(tmp_path)
    table = recipe(tmp_path)
    expected = contents(merge(table, tmp_path / "whole"))
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        merge(table, tmp_path / "out", threads=1)
    monkeypatch.undo()
    weights = tmp_path / "out.partial" / "model.safetensors"
    done = (tmp_path / "out.partial.journal").read_text().count("tensor")
    assert done > 3
    size = weights.stat().st_size
    weights.write_bytes(b"\0" * size)
    assert contents(merge(table, tmp_path / "out", resume=True)) == expected


def stop_after(monkeypatch: pytest.MonkeyPatch, tensors: int) -> None:
    """End a merge when so many tensors are in the journal."""
    real, seen = Journal.add, []

    def add(self: Journal, name: str, crc: int) -> None:
        real(self, name, crc)
        seen.append(name)
        if len(seen) == tensors:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add)


def test_resuming_another_merge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio(tmp_path)
    stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(tmp_path), tmp_path / "out", threads=1)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="its recipe differs"):
        merge(recipe(tmp_path, subspace={"seed": 1}), tmp_path / "out", resume=True)
    with pytest.raises(OutputError, match="an unfinished result of `merge` is there"):
        merge(recipe(tmp_path), tmp_path / "out")
    trio(tmp_path / "other")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "other" / "c", tmp_path / "a")
    with pytest.raises(OutputError, match="its inputs differ"):
        merge(recipe(tmp_path), tmp_path / "out", resume=True)
    merge(recipe(tmp_path), tmp_path / "out", overwrite=True)
    assert merge(recipe(tmp_path), tmp_path / "out", resume=True) == tmp_path / "out"  # finished: nothing to do


def test_two_processes_do_not_write_one_result(tmp_path: Path) -> None:
    trio(tmp_path)
    other = OutputFolder(tmp_path / "out", "merge")
    other.begin(["model.safetensors"])
    (tmp_path / "out.partial" / "model.safetensors").write_text("half of it")
    for more in ({"resume": True}, {"overwrite": True}, {}):  # none of them touches what the first one writes
        with pytest.raises(OutputError, match="another process is writing this result"):
            merge(recipe(tmp_path), tmp_path / "out", **more)
        assert (tmp_path / "out.partial" / "model.safetensors").read_text() == "half of it"
    other.leave()
    merge(recipe(tmp_path), tmp_path / "out", resume=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, where the system lets us make one."""
    with mounted(tmp_path / "disk", "128k") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_seen_before_the_work(small_disk: Path, tmp_path: Path) -> None:
    trio(tmp_path, width=96)
    for out in (small_disk / "out", small_disk / "deep" / "deeper" / "out"):
        for more in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match=r"the result has [\d,]+ bytes, and [\d,]+ are free"):
                merge(recipe(tmp_path), out, **more)
            assert not os.listdir(small_disk)


def test_what_an_interrupted_merge_left_on_a_disk_that_is_too_small_now(small_disk: Path, tmp_path: Path) -> None:
    """Its files have their final sizes, but no room yet; what it has done stays for another time."""
    trio(tmp_path, width=32)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe(tmp_path), small_disk / "out", threads=1)
    left = sorted(os.listdir(small_disk))
    fill(small_disk / "ballast")
    with pytest.raises(OutputError, match="are free on this disk"):
        merge(recipe(tmp_path), small_disk / "out", resume=True)
    (small_disk / "ballast").unlink()
    assert sorted(os.listdir(small_disk)) == left
    merge(recipe(tmp_path), small_disk / "out", resume=True)
    assert os.listdir(small_disk) == ["out"]


def test_an_adapter_that_is_saved_on_a_full_disk_leaves_no_card(small_disk: Path) -> None:
    """PEFT's own card stays as it was, and of ours there is nothing, not even an empty file under another name."""
    model: Any = get_peft_model(MODELS["mlp"].model(), FloraConfig(r=2, **MODELS["mlp"].targets))
    model.save_pretrained(small_disk / "whole")
    found, real = sorted(os.listdir(small_disk / "whole")), hub.write_whole
    cards = []

    def full(path: Any, content: bytes) -> None:
        fill(small_disk / "ballast")
        cards.append(Path(path).read_bytes() if os.path.exists(path) else None)
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "write_whole", full)
        with pytest.raises(OSError, match="No space left on device"):
            model.save_pretrained(small_disk / "out")
    card = small_disk / "out" / "README.md"
    assert cards == [card.read_bytes() if card.exists() else None]
    assert {*os.listdir(small_disk / "out"), "README.md"} == {*found}


def fill(path: Path) -> None:
    """Write until the disk is full."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(file, bytes(1024))
    os.close(file)


def test_a_disk_that_fills_up(small_disk: Path, tmp_path: Path) -> None:
    models = trio(tmp_path, torch.bfloat16, width=32)
    ballast = small_disk / "ballast"
    real = files.OutputFiles.write

    def fills(self: Any, name: str, offset: int, data: Any) -> None:  # somebody else writes at the same time
        if not ballast.exists():
            fill(ballast)
        real(self, name, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.OutputFiles, "write", fills)
        with pytest.raises(OutputError, match=r"the disk is full. Free some space, then go on with --resume"):
            merge(recipe(tmp_path), small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    out = merge(recipe(tmp_path), small_disk / "out", resume=True)
    whole = merge(recipe(tmp_path), tmp_path / "whole")
    assert contents(out) == contents(whole)
    assert len(models) == 4


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(patch: pytest.MonkeyPatch, call: str, times: int) -> None:
    """The system's call fails from then on, as it does on a full disk; the last one before writes a part."""
    real, left = getattr(os, call), [times]

    def limited(file: int, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise no_space()
        if left[0] == 0 and arguments:
            data, *more = arguments
            return real(file, data[: len(data) // 2], *more)
        return real(file, *arguments)

    patch.setattr(os, call, limited)


@pytest.mark.parametrize(
    ("call", "times"), [("pwrite", 1), ("pwrite", 6), ("write", 2), ("write", 5), ("fsync", 0), ("fsync", 2)]
)
def test_a_merge_on_a_full_disk_is_said_and_goes_on(call: str, times: int, tmp_path: Path) -> None:
    """Tensors are written with pwrite, the journal with write; fsync is where some file systems say it."""
    trio(tmp_path)
    expected = contents(merge(recipe(tmp_path), tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        full_after(patch, call, times)
        with pytest.raises(OutputError, match=r"out\.partial.*: the disk is full\. Free some space, then go on with --resume"):
            merge(recipe(tmp_path), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.partial", "out.partial.journal"]
    assert contents(merge(recipe(tmp_path), tmp_path / "out", resume=True)) == expected
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


class Narrow:
    """A file that takes so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.file.write(view[: self.room])
        self.room -= len(view)
        if self.room < 0:
            raise no_space()
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Narrow:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 1000])
@pytest.mark.parametrize("command", ["model", "adapter", "task vector", "lora"])
def test_small_files_on_a_full_disk(command: str, room: int, zoo: Path, tmp_path: Path) -> None:
    """What is written in one go leaves nothing; the merge of a model can go on."""
    from peft_subspace import whole_files
    from peft_subspace.task_vectors import extract
    from peft_subspace.task_vectors.task_vector import TaskVector

    def narrow(path: Path, *more: Any, **options: Any) -> Any:
        file = open(path, *more, **options)  # noqa: SIM115 - it is closed as the real one is
        return Narrow(file, room) if "w" in "".join(more) else file

    def write_bytes(path: Path, data: bytes) -> None:
        with narrow(path, "wb") as file:
            file.write(data)

    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: merge(recipe(zoo), tmp_path / "out"),
        "adapter": lambda: merge({**recipe(zoo, models=""), **lora}, tmp_path / "out"),
        "task vector": lambda: TaskVector.open(zoo / "a", zoo / "base").save(tmp_path / "out.safetensors"),
        "lora": lambda: extract.extract_lora(str(zoo / "a"), str(zoo / "base"), tmp_path / "out", rank=2),
    }
    lora = {"models": [{"model": str(zoo / "lora")}], "subspace": {"output": "adapter"}}
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, whole_files):
            patch.setattr(module, "open", narrow, raising=False)
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(OutputError, match=r"the disk is full|No space left on device"):
            calls[command]()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"out.partial", "out.partial.journal"} if command == "model" else set())
    if command == "model":
        merge(recipe(zoo), tmp_path / "out", resume=True)
        verify(tmp_path / "out")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    trio(tmp_path, width=64)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"the system allows no file of this size \(ulimit -f\)"):
            merge(recipe(tmp_path), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


def test_a_model_that_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio(tmp_path)
    real = execute.execute

    def cut(*args: Any) -> None:
        os.truncate(tmp_path / "a" / "model.safetensors", 3000)
        real(*args)

    monkeypatch.setattr(execute, "execute", cut)
    with pytest.raises(InputError, match=r"a/model.safetensors: became shorter while it was read, at tensor"):
        merge(recipe(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_truncated_model(tmp_path: Path) -> None:
    trio(tmp_path)
    file = tmp_path / "a" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        merge(recipe(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    trio(tmp_path)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path(), Path("..")):
        with pytest.raises(OutputError):
            merge(recipe(tmp_path), out)


def test_a_kernel_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    """Some things are seen only when a tensor is merged."""
    from peft_subspace.task_vectors.lora_files import safetensors_bytes

    models = trio(tmp_path)
    grams = {name: torch.zeros(t.shape[1], t.shape[1]) for name, t in models["a"].items() if "q_proj" in name}
    (tmp_path / "gram.safetensors").write_bytes(safetensors_bytes(grams, {}))
    table = recipe(tmp_path, "regmean", "a")
    table["models"][0]["parameters"] = {"weight": 0.0, "statistics": str(tmp_path / "gram.safetensors")}
    with pytest.raises(ValueError, match="has no statistics, and the weights sum to 0"):
        merge(table, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_leaves_something_to_resume(tmp_path: Path) -> None:
    trio(tmp_path)
    expected = contents(merge(recipe(tmp_path), tmp_path / "whole"))
    seen = []

    def interrupt(count: int) -> None:
        seen.append(count)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe(tmp_path), tmp_path / "out", threads=1, progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert contents(merge(recipe(tmp_path), tmp_path / "out", resume=True)) == expected


# Recipes of all kinds, with real models: an exit code and a line of text, never a traceback ---------------------------------

_WAYS = ["cat", "exact", "dense", "knots"]
_STRANGE: list[Any] = [float("nan"), float("inf"), -1e38, 1e38, 0, -2, "1e-3", "x", True, None, []]
_SUBSPACE = st.fixed_dictionaries(
    {},
    optional={
        "semantics": st.sampled_from(["mergekit", "peft", "paper"]),
        "seed": st.sampled_from([0, 1, -1]),
        "output": st.sampled_from(["model", "adapter", "task_vector"]),
        "on_missing": st.sampled_from(["error", "base", "skip"]),
        "embeddings": st.sampled_from(["truncate", "pad_from_base"]),
        "base_check": st.sampled_from(["warn", "error", "off"]),
        "non_finite": st.sampled_from(["error", "allow"]),
        "shard_size": st.sampled_from(["1KB", "3kb", 10, 0]),
        "compute_dtype": st.sampled_from(["float32", "float64"]),
        "align": st.sampled_from([None, "weight_matching"]),
        "adapter": st.fixed_dictionaries({}, optional={"rank": st.integers(1, 9), "method": st.sampled_from(_WAYS)}),
        "learned": st.sampled_from([None, None, None, "atlas", "x"]),
        "mask": st.sampled_from([None, "concrete", "concrete", "atlas", "x"]),
    },
)
_GOOD, _BAD = ["a", "b", "c", "base+lora", "lora", "tv.safetensors"], ["base", "lost", "short", "broken", "nan", "a+lora", "x"]


def _value(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Mostly what a parameter accepts, as a number, a gradient, or by filter."""
    good: st.SearchStrategy[Any] = st.booleans()
    if parameter.choices:
        good = st.sampled_from(parameter.choices)
    elif isinstance(parameter.default, float):
        good = st.floats(-2.0 if parameter.minimum is None else parameter.minimum, 2.0 if parameter.maximum is None else 1.0)
    elif isinstance(parameter.default, int) and not isinstance(parameter.default, bool):
        good = st.integers(1, 4)
    gradient = st.lists(good, min_size=1, max_size=3)
    condition = st.fixed_dictionaries({"value": good}, optional={"filter": st.sampled_from(["mlp", "*", "norm"])})
    by_filter = st.lists(condition, min_size=1, max_size=2)
    return st.one_of(good, good, good, gradient, by_filter, st.sampled_from(_STRANGE))


@st.composite
def _recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe that is right about as often as not; models are named by their folders."""
    method = get(draw(st.sampled_from(names())))
    scopes = {scope: [p for p in method.parameters if p.scope == scope] for scope in ("global", "model")}

    def some(parameters: list[Parameter]) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(parameters), max_size=2)) if parameters else []
        return {parameter.name: draw(_value(parameter)) for parameter in chosen}

    most = method.maximum or 3
    count = draw(st.integers(min(method.minimum, most), most))
    entries = []
    for _ in range(count):
        model = draw(st.sampled_from(_GOOD + _BAD))
        own = some(scopes["model"])
        if method.statistics:
            own["statistics"] = draw(st.sampled_from(["statistics.safetensors"] * 5 + ["broken/model.safetensors", "x"]))
        entries.append({"model": model, "parameters": own})
    table: dict[str, Any] = {"merge_method": method.name, "models": entries, "parameters": some(scopes["global"])}
    table["base_model"] = draw(st.sampled_from(["base"] * 8 + ["a", "lora", "lost", None]))
    table["subspace"] = draw(st.one_of(st.just({}), _SUBSPACE))
    if method.learned:
        table["subspace"]["learned"] = draw(st.sampled_from([method.name] * 6 + [f"{method.name}-nan", "lora", "x"]))
        listed = st.sampled_from([[], [], [{"model": name} for name in ("a", "tv.safetensors", "lora")], entries])
        table["models"] = draw(listed)
    if draw(st.booleans()):
        table["out_dtype"] = draw(st.sampled_from(["float16", "bfloat16", "float32", "int8"]))
    return {key: value for key, value in table.items() if value is not None}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good, incomplete and broken models, an adapter, a task vector."""
    from peft_subspace.task_vectors.lora_files import json_bytes, safetensors_bytes
    from peft_subspace.task_vectors.task_vector import TaskVector

    folder = tmp_path_factory.mktemp("zoo")
    models = trio(folder, torch.bfloat16)
    write(folder / "lost", {name: tensor for name, tensor in models["a"].items() if "norm" not in name})
    write(folder / "short", {**models["a"], "lm_head.weight": models["a"]["lm_head.weight"][:30]})
    write(folder / "broken", models["a"])
    os.truncate(folder / "broken" / "model.safetensors", 999)
    TaskVector.open(folder / "c", folder / "base").save(folder / "tv.safetensors")
    (folder / "lora").mkdir()
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    factors = {f"{prefix}.lora_A.weight": torch.randn(2, 16), f"{prefix}.lora_B.weight": torch.randn(32, 2)}
    (folder / "lora" / "adapter_model.safetensors").write_bytes(safetensors_bytes(factors, {}))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    damaged = {name: tensor.clone() for name, tensor in models["a"].items()}
    damaged["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    write(folder / "nan", damaged)
    statistics = {name: torch.rand(tensor.shape) for name, tensor in models["a"].items() if "norm" in name}
    statistics |= {name: torch.eye(t.shape[1]) for name, t in models["a"].items() if "q_proj" in name}
    (folder / "statistics.safetensors").write_bytes(safetensors_bytes(statistics, {}))
    (folder / "lora" / "adapter_config.json").write_bytes(json_bytes(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the recipes are
        learned_adapters(models["base"])
    return folder


def learned_adapters(base: dict[str, torch.Tensor]) -> None:
    """Adapters with coefficients, and with a mask, of three vectors that the zoo has; and damaged ones."""
    pool = {"a": "a", "tv": "tv.safetensors", "lora": "lora"}
    for name, config in {
        "atlas": AtlasConfig(pool=pool, base="base", init=0.3),
        "concrete": ConcreteConfig(pool=pool, base="base", coefficients=0.3, target_modules=["q_proj", "down_proj"]),
    }.items():
        adapted = get_peft_model(as_module(base), config)
        adapted.save_pretrained(name)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.reshape(-1)[0] = float("nan")
        adapted.save_pretrained(f"{name}-nan")


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "knots", "nuslerp"])
@pytest.mark.parametrize("policy", ["error", "allow"])
def test_matrix_methods_refuse_what_is_not_a_number(method: str, policy: str, tmp_path: Path) -> None:
    models = trio(tmp_path)
    models["a"]["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    write(tmp_path / "a", models["a"])
    table = recipe(tmp_path, method, "ab", subspace={"non_finite": policy})
    if method == "nuslerp":
        table["parameters"] = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    message = (
        rf"/a: 'model\.layers\.0\.mlp\.up_proj\.weight' has values that are NaN .* {method} works on whole .* such as ties"
    )
    with pytest.raises(InputError, match=message.replace("such as ties", "such as task_arithmetic or ties")):
        merge(table, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    table = {**recipe(tmp_path, "task_arithmetic", "ab"), "subspace": {"non_finite": "allow"}}
    assert merge(table, tmp_path / "out").is_dir()  # the way out


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "knots"])
def test_what_cannot_be_decomposed_is_named(method: str, tmp_path: Path) -> None:
    """Finite values whose weighted differences are not."""
    models = trio(tmp_path)
    write(tmp_path / "a", {key: 1e10 * tensor for key, tensor in models["a"].items()})
    table = recipe(tmp_path, method, "ab", subspace={"base_check": "off"})
    table["models"][0]["parameters"] = {"weight": 1e38}
    with pytest.raises(ValueError, match=r"'\S+': (" + method + " cannot decompose it|the merged values do not fit)"):
        merge(table, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("adapter", [{"rank": 2}, {}, {"method": "cat"}, {"method": "exact", "energy": 0.9}])
@pytest.mark.parametrize("method", ["linear", "knots", "ties"])
def test_an_adapter_of_what_is_not_a_number(method: str, adapter: dict[str, Any], zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "lora", tmp_path / "lora")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    factors = load_file(file)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, file)
    table = recipe(zoo, method, "", subspace={"output": "adapter", "adapter": adapter, "non_finite": "allow"})
    table["models"] = [{"model": str(tmp_path / "lora")}, {"model": str(zoo / "lora")}]
    with pytest.raises((InputError, RecipeError), match=r"up_proj.* NaN or infinite|adapter\.method"):
        merge(table, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_no_recipe_ends_in_a_traceback(zoo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = Counter[int]()

    @settings(max_examples=100, deadline=None)
    @given(_recipes())
    def check(table: dict[str, Any]) -> None:
        for left in zoo.glob("*out*"):  # of an example that failed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (zoo / "recipe.yaml").write_text(yaml.safe_dump(table))
        dry = command(["merge", "recipe.yaml", "out", "--quiet", "--dry-run"])
        capfd.readouterr()
        code = command(["merge", "recipe.yaml", "out", "--quiet"])
        printed = capfd.readouterr()
        assert dry in (0, code), printed.err  # values may be refused that no header tells
        codes[code] += 1
        assert code in (0, 2, 3), (code, printed.err)
        assert printed.err.count("Error: ") == (code != 0)
        assert Path("out").exists() == (code == 0)
        assert not [path.name for path in zoo.iterdir() if "out." in path.name]
        if code == 0:
            assert command(["verify", "out", "--quiet"]) == 0
            shutil.rmtree("out")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(zoo)
        check()
    assert min(codes[0], codes[2], codes[3]) >= 10, codes  # all of it was seen
