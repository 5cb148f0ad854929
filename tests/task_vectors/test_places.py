"""A finished folder takes the place of another one whole, or everything stays as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from peft_subspace.task_vectors.errors import OutputError
from peft_subspace.task_vectors.places import put_in_place


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a folder", "a file"])
def test_a_folder_takes_its_place(there: str, tmp_path: Path) -> None:
    made, out = folder(tmp_path / "made", "new"), tmp_path / "out"
    if there == "a file":
        out.write_text("old")
    elif there != "nothing":
        folder(out, "old") if there == "a folder" else out.mkdir()
    mine = folder(tmp_path / "out.replaced", "mine")  # a name that a replacement might be tempted to take
    put_in_place(made, out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]
    assert ((out / "file").read_text(), (mine / "file").read_text()) == ("new", "mine")


def test_what_is_there_comes_back_if_the_new_cannot_take_its_place(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"out: cannot be put in place of .*made: No such file or directory"):
        put_in_place(tmp_path / "made", out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "file").read_text() == "old"


def test_an_interrupt_between_the_renames_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = folder(tmp_path / "made", "new"), folder(tmp_path / "out", "old")
    rename = os.rename
    for number, error in enumerate((OSError("a mount point"), KeyboardInterrupt())):
        calls = iter([*[rename] * number, None])

        def stopped(*places: Path, calls: Any = calls, error: BaseException = error) -> None:
            call = next(calls, rename)
            if call is None:
                raise error
            call(*places)

        monkeypatch.setattr(os, "rename", stopped)
        with pytest.raises((OutputError, KeyboardInterrupt)):
            put_in_place(made, out, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["made", "out"]
        assert ((out / "file").read_text(), (made / "file").read_text()) == ("old", "new")


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    made, out = folder(tmp_path / "made", "new"), folder(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="out: cannot be put in place"):
        put_in_place(made, out, overwrite=False)
    assert ((out / "file").read_text(), (made / "file").read_text()) == ("old", "new")
