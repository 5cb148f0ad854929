"""Folders of models: what is read, and how what is wrong with them is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_subspace.task_vectors.errors import InputError, RecipeError
from peft_subspace.task_vectors.models import open_source
from peft_subspace.task_vectors.pickles import pickles_allowed
from peft_subspace.task_vectors.reading import read_tensor
from peft_subspace.task_vectors.references import Reference
from peft_subspace.task_vectors.sources import fingerprint, open_checkpoint
from tests.merging.tiny import random_tensors, write

INDEX = "model.safetensors.index.json"


def test_one_file_and_shards_are_the_same_model(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    for files in (1, 4):
        found = open_checkpoint(write(tmp_path / str(files), tensors, files=files))
        assert found.kind == "model"
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(read_tensor(found.tensors[name]), tensor) for name, tensor in tensors.items())
    alone = open_checkpoint(tmp_path / "1" / "model.safetensors")
    assert alone.tensors.keys() == tensors.keys()


def _change(folder: Path, change: dict[str, str], drop: str | None = None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(change)
    if drop:
        del index["weight_map"][drop]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "a\\b.safetensors"]
)
def test_an_index_does_not_lead_out_of_its_folder(file: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = write(tmp_path / "m", random_tensors(0), files=2)
    _change(folder, {"x": file})
    with pytest.raises(InputError, match=r"not a \.safetensors file of its own folder"):
        open_checkpoint(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", random_tensors(0), files=2)
    _change(folder, {"ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(InputError, match=r"'ghost' should be in model-00001.* and is not"):
        open_checkpoint(folder)
    folder = write(tmp_path / "n", random_tensors(0), files=2)
    _change(folder, {}, drop="lm_head.weight")
    with pytest.raises(InputError, match=r"'lm_head\.weight' is in .* where the index does not say it"):
        open_checkpoint(folder)
    folder = write(tmp_path / "o", random_tensors(0), files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"'model-00002-of-00002\.safetensors', which is not there"):
        open_checkpoint(folder)
    (folder / INDEX).write_text('{"weight_map": [1]}')
    with pytest.raises(InputError, match="no weight_map"):
        open_checkpoint(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_checkpoint(folder)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no \.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"only \.safetensors files are read"):
        open_checkpoint(tmp_path / "x.bin")
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"2 \.safetensors files but no index"):
        open_checkpoint(tmp_path)


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "q", random_tensors(0), {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(InputError, match=r"quantised \(bitsandbytes\)"):
        open_checkpoint(folder)
    folder = write(tmp_path / "f8", {"x.weight": torch.zeros(4).to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match="quantised weights"):
        open_checkpoint(folder)


def test_pickles_only_if_asked_for(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    folder = write(tmp_path / "m", {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="Pass --allow-pickle"):
        open_checkpoint(folder)
    with pickles_allowed(True, tmp_path):
        found = open_checkpoint(folder)
        assert all(torch.equal(read_tensor(found.tensors[name]), tensor) for name, tensor in tensors.items())
    assert not list(tmp_path.glob(".pickles*"))


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(Path(__file__).with_name("evil")), "w"))


def test_a_pickle_with_code_is_refused_even_then(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    with pickles_allowed(True, tmp_path), pytest.raises(InputError, match="weights_only"):
        open_checkpoint(folder)
    assert not Path(__file__).with_name("evil").exists()


def test_references(tmp_path: Path) -> None:
    assert Reference.parse("me/model@v1+you/lora@main") == Reference("me/model", "v1", "you/lora", "main")
    assert Reference.parse({"model": {"path": "a", "revision": "r"}, "lora": "b"}) == Reference("a", "r", "b")
    assert str(Reference.parse("me/model@v1+you/lora")) == "me/model@v1+you/lora"
    strange = tmp_path / "a+b@c"
    strange.mkdir()
    assert Reference.parse(str(strange)) == Reference(str(strange))
    for bad in ("", "a+b+c", "a@b@c", "+a", "@x", 3, {"lora": "x"}, None, ["a"]):
        with pytest.raises(RecipeError):
            Reference.parse(bad)
    with pytest.raises(InputError, match="a revision is for models on the Hub"):
        open_source(Reference(str(strange), "main"))
    with pytest.raises(InputError, match="no such folder"):
        open_source("./not/there")


def test_a_fingerprint_sees_a_changed_value_and_not_a_copy(tmp_path: Path) -> None:
    base = open_checkpoint(write(tmp_path / "a", random_tensors(0)))
    copy = open_checkpoint(write(tmp_path / "b", random_tensors(0)))
    other = open_checkpoint(write(tmp_path / "c", random_tensors(1)))
    for whole in (False, True):
        assert fingerprint(base.files[0], whole) == fingerprint(copy.files[0], whole)
        assert fingerprint(base.files[0], whole) != fingerprint(other.files[0], whole)
