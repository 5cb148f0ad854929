"""Several threads of one process read, merge and write at the same time, each as it does alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from peft_subspace.merging import merge, verify
from peft_subspace.task_vectors.errors import InputError, OutputError
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.pickles import are_allowed, pickles_allowed
from peft_subspace.task_vectors.remote import headers_only
from peft_subspace.task_vectors.sources import open_checkpoint
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.merging.tiny import contents, recipe, trio

THREADS = 3


def at_once(actions: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, or its exception."""
    barrier = Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return action()
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "tsv_m"])
def test_merges_in_several_threads(method: str, tmp_path: Path) -> None:
    """Into folders of their own; torch's number of threads is put back, also for threads that come later."""
    trio(tmp_path)
    table = recipe(tmp_path, method)
    expected = contents(merge(table, tmp_path / "alone"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            outs = [tmp_path / f"out{number}" for number in range(THREADS)]
            at_once([lambda out=out: merge(table, out, threads=2, overwrite=True) for out in outs])  # type: ignore[misc]
            for out in outs:
                verify(out)
                assert contents(out) == expected
            assert [torch.get_num_threads(), *at_once([torch.get_num_threads])] == [2, 2]
    finally:
        torch.set_num_threads(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "alone", "b", "base", "c", "out0", "out1", "out2"]


def test_extractions_in_several_threads(tmp_path: Path) -> None:
    trio(tmp_path)

    def extracted(number: int) -> dict[str, bytes]:
        extract_lora(str(tmp_path / "a"), str(tmp_path / "base"), tmp_path / f"lora{number}", rank=2)
        return contents(tmp_path / f"lora{number}")

    expected = extracted(THREADS)
    found = at_once([lambda number=number: extracted(number) for number in range(THREADS)])  # type: ignore[misc]
    assert found == THREADS * [expected]


def test_two_threads_do_not_write_one_result(tmp_path: Path) -> None:
    trio(tmp_path)
    for number in range(10):
        out = tmp_path / f"out{number}"
        found = at_once([lambda out=out: merge(recipe(tmp_path), out) for _ in range(THREADS)])  # type: ignore[misc]
        assert out in found
        assert all(one == out or isinstance(one, OutputError) for one in found)
        verify(out)
        assert not list(tmp_path.glob("*.partial*"))


def test_one_task_vector_in_several_threads(tmp_path: Path) -> None:
    trio(tmp_path)
    vector = TaskVector.open(tmp_path / "a", tmp_path / "base") - 0.5 * TaskVector.open(tmp_path / "b", tmp_path / "base")
    expected = {name: vector[name] for name in vector}
    descriptors = len(os.listdir("/proc/self/fd"))
    for found in at_once(10 * [lambda: {name: vector[name] for name in vector}]):
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_what_one_thread_allows_is_refused_in_another(tmp_path: Path) -> None:
    """Pickles, and models of which only the headers are there."""
    models = trio(tmp_path)
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(models["a"], tmp_path / "a" / "pytorch_model.bin")
    together = Barrier(2)

    def allowed() -> Any:
        with pickles_allowed(True, tmp_path), headers_only():
            together.wait()
            found = open_checkpoint(tmp_path / "a").tensors
            together.wait()
            return found.keys()

    def refused() -> Any:
        together.wait()
        try:
            return are_allowed() or open_checkpoint(tmp_path / "a")
        finally:
            together.wait()

    names, error = at_once([allowed, refused])
    assert names == models["a"].keys()
    assert isinstance(error, InputError)
    assert "has its weights in pickles" in str(error)
