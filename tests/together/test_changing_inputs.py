"""A model is replaced, or written into, while it is read: the result is the old one, or there is none.

Nothing that streams values over time may mix two models. The replacement comes at the first, a middle and the last read.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_subspace.merging import merge, verify
from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.pickles import pickles_allowed
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.merging.tiny import contents, recipe, trio, write
from tests.methods import METHODS, Method
from tests.pico import MODELS, run
from tests.pools import vector_of, write_vector

# Everything that reads -----------------------------------------------------------------------------------------------------


def _merge(zoo: Path, out: Path, **more: Any) -> Any:
    return merge(recipe(zoo, **more), out, threads=1)


def _adapter(zoo: Path, out: Path) -> Any:
    table = {**recipe(zoo, models=""), "models": [{"model": str(zoo / "lora")}], "subspace": {"output": "adapter"}}
    return merge(table, out)


def _saved(zoo: Path, out: Path) -> Path:
    (TaskVector.open(zoo / "a", zoo / "base") - 0.5 * TaskVector.open(zoo / "b", zoo / "base")).save(out)
    return out


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": _merge,
    "merge that looks at everything first": lambda zoo, out: _merge(zoo, out, method="ties", subspace={"semantics": "paper"}),
    "merge of matrices": lambda zoo, out: _merge(zoo, out, method="tsv_m"),
    "merge to a task vector": lambda zoo, out: _merge(zoo, out, subspace={"output": "task_vector"}),
    "merge, hashed": lambda zoo, out: merge(recipe(zoo), out, threads=1, hash_inputs=True),
    "merge of adapters": _adapter,
    "extract": lambda zoo, out: extract_lora(str(zoo / "a"), str(zoo / "base"), out, rank=2),
    "TaskVector.save": _saved,
}
READ = {"merge of adapters": ["lora/adapter_model.safetensors"], "extract": ["base/model.safetensors", "a/model.safetensors"]}
SHARD = "b/model-00002-of-00003.safetensors"
CASES = [
    (reader, file) for reader in READERS for file in READ.get(reader, ["base/model.safetensors", "a/model.safetensors", SHARD])
]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    trio(folder)
    extract_lora(str(folder / "a"), str(folder / "base"), folder / "lora", rank=2)
    return folder


def _other(path: Path) -> bytes:
    """What another training would have saved there: the same header, other values."""
    new = path.with_name("new")
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        save_file(tensors, new, metadata=file.metadata())
    found = new.read_bytes()
    new.unlink()
    return found


def by_rename(path: Path, content: bytes) -> None:
    """As a download or a `save_pretrained` does it; size and time of the old file are kept."""
    before, new = path.stat(), path.with_name(f".{path.name}-new")
    new.write_bytes(content)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, path)


def in_place(path: Path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)


class At:
    """Does something before the read of this number; reads are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, point: int = -1, action: Callable[[], None] = lambda: None) -> None:
        self.count, self._point, self._action, self._real = 0, point, action, os.preadv
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:  # the read-ahead asks with flags
            if self.count == self._point:
                self._action()
            self.count += 1
        return self._real(file, buffers, offset, flags)


def _result(out: Path) -> dict[str, bytes]:
    return contents(out) if out.is_dir() else {out.name: out.read_bytes()}


@pytest.mark.parametrize("change", [by_rename, in_place])
@pytest.mark.parametrize(("reader", "file"), CASES)
def test_an_input_that_changes_while_it_is_read(
    reader: str, file: str, change: Callable[[Path, bytes], None], made_once: Path, tmp_path: Path
) -> None:
    zoo, name = tmp_path / "zoo", "out.safetensors" if reader == "TaskVector.save" else "out"
    shutil.copytree(made_once, zoo)
    with pytest.MonkeyPatch.context() as patch:
        reads = At(patch)
        READERS[reader](zoo, tmp_path / name)
    expected, refused = _result(tmp_path / name), []
    points = (0, reads.count // 2, reads.count - 1)
    for point in points:
        shutil.rmtree(tmp_path)
        shutil.copytree(made_once, zoo)
        content = _other(zoo / file)
        with pytest.MonkeyPatch.context() as patch:
            At(patch, point, lambda content=content: change(zoo / file, content))  # type: ignore[misc]
            try:
                READERS[reader](zoo, tmp_path / name)
                assert _result(tmp_path / name) == expected, point
            except InputError as error:
                assert f"{zoo / file}: was replaced or changed while it was read" in str(error)  # noqa: PT017
                assert os.listdir(tmp_path) == ["zoo"]
                refused.append(point)
        assert (zoo / file).read_bytes() == content
    assert refused[:1] == [0]
    if reader.startswith("merge") and "adapters" not in reader:
        assert refused == sorted(set(points)), "the manifest would name the new model"


# Models elsewhere ----------------------------------------------------------------------------------------------------------


def _as_snapshot(zoo: Path) -> Path:
    """`a` as the cache of the Hub has it: a link to a blob."""
    link = zoo / "a" / "model.safetensors"
    (zoo / "blobs").mkdir()
    for number, content in enumerate((link.read_bytes(), _other(link))):
        (zoo / "blobs" / str(number)).write_bytes(content)
    link.unlink()
    link.symlink_to("../blobs/0")
    return link


def test_a_snapshot_that_gets_another_blob(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under the link counts: a link that is made anew to the same blob changes nothing."""
    zoo = tmp_path / "zoo"
    shutil.copytree(made_once, zoo)
    link = _as_snapshot(zoo)
    expected = contents(_merge(made_once, tmp_path / "expected"))["model.safetensors"]

    def relink(blob: str) -> None:
        (zoo / "a" / "new").symlink_to(blob)
        os.replace(zoo / "a" / "new", link)

    reads = At(monkeypatch, 5, lambda: relink("../blobs/0"))
    assert contents(_merge(zoo, tmp_path / "out"))["model.safetensors"] == expected
    monkeypatch.undo()
    verify(tmp_path / "out")
    At(monkeypatch, reads.count // 2, lambda: relink("../blobs/1"))
    with pytest.raises(InputError, match=r"a/model\.safetensors: was replaced or changed"):
        _merge(zoo, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out", "zoo"]


def test_a_pickle_that_changes_while_it_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = trio(tmp_path)
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(models["a"], tmp_path / "a" / "pytorch_model.bin")
    real = torch.load

    def load(file: Any, **settings: Any) -> Any:
        found = real(file, **settings)
        by_rename(Path(file), Path(file).read_bytes())
        return found

    with pickles_allowed(True, tmp_path):
        merge(recipe(tmp_path), tmp_path / "whole")
        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(InputError, match=r"pytorch_model\.bin: was replaced or changed while it was read"):
            merge(recipe(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


DENSE = {name: method for name, method in METHODS.items() if method.composes and method.vector_rank is None}


@pytest.mark.parametrize("method", DENSE.values(), ids=DENSE)
def test_a_pool_whose_files_change_between_two_forwards(method: Method, tmp_path: Path) -> None:
    """Vectors on the disk are read in each forward; those in memory are what they were."""
    pico = MODELS["mlp"]
    model, batch = pico.model(), pico.batch()
    pool = {f"task{n}": write_vector(tmp_path / f"{n}.safetensors", vector_of(model, n)) for n in range(2)}
    made = {}
    for place in ("disk", "cpu"):
        config = method.make(pico, pool=pool, placement=place, **method.steady)
        made[place] = get_peft_model(pico.model(), config).eval()
    expected = run(made["cpu"], batch)
    torch.testing.assert_close(run(made["disk"], batch), expected)
    path = Path(pool["task1"])
    by_rename(path, _other(path))
    for one in made.values():
        with torch.no_grad():  # so that the effective weights are composed anew
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.0)
    assert torch.equal(run(made["cpu"], batch), expected)
    with pytest.raises(InputError, match=r"1\.safetensors: was replaced or changed while it was read"):
        run(made["disk"], batch)


# What it costs -------------------------------------------------------------------------------------------------------------


def test_hundreds_of_files_are_not_kept_open(tmp_path: Path) -> None:
    models = trio(tmp_path, layers=40)
    write(tmp_path / "a", models["a"], files=160)
    (tmp_path / "a" / "model.safetensors").unlink()
    before, limits = os.listdir("/proc/self/fd"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 40, limits[1]))
    try:
        merge(recipe(tmp_path), tmp_path / "out")
        vector = TaskVector.open(tmp_path / "a", tmp_path / "base")
        vector.norm()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
