"""Headers of safetensors files: as the library reads them, and nothing that a hostile file can say does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_subspace.task_vectors.errors import InputError
from peft_subspace.task_vectors.headers import encode_header, read_header
from peft_subspace.task_vectors.reading import DTYPES, read_tensor


def _file(folder: Path, header: Any, values: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + values)
    return path


def _entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "f32": torch.randn(3, 4),
        "bf16": torch.randn(5).bfloat16(),
        "f16": torch.randn(2, 1, 3).half(),
        "f64": torch.randn(2).double(),
        "i64": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"a": "b"}
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(header.tensors[name]), tensor)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    values = torch.randn(3, 2)
    header, offsets = encode_header({"ä": ("F32", (3, 2)), "b": ("I64", (1,))}, {"format": "pt"})
    assert len(header) % 8 == 0
    assert offsets == {"ä": len(header), "b": len(header) + 24}
    (tmp_path / "x").write_bytes(header + values.numpy().tobytes() + (7).to_bytes(8, "little"))
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("ä"), values)
        assert file.get_tensor("b").item() == 7
        assert file.metadata() == {"format": "pt"}


HOSTILE = {
    "no bytes": (b"", b"", None, "not a whole"),
    "a length beyond the file": (b"{}", b"", 2**40, "1,099,511,627,776"),
    "a length of all ones": (b"{}", b"", 2**64 - 1, "not a whole"),
    "no JSON": (b"{", b"", None, "cannot be read"),
    "not UTF-8": (b"\xff\xfe", b"", None, "cannot be read"),
    "a list": (b"[]", b"", None, "not a table"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", None, "cannot be read"),
    "the same name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 1)).encode(),) * 2), b"xx", None, "twice"),
    "overlapping": ({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456", None, "'b' starts at byte"),
    "a hole": ({"a": _entry(0, 2), "b": _entry(4, 6)}, b"123456", None, "'b' starts at byte"),
    "not from the start": ({"a": _entry(2, 4)}, b"1234", None, "'a' starts at byte"),
    "beyond the end": ({"a": _entry(0, 9)}, b"1234", None, "tensors end at byte"),
    "bytes after the end": ({"a": _entry(0, 2)}, b"1234", None, "tensors end at byte"),
    "a shape that does not fit": ({"a": _entry(0, 4, [5])}, b"1234", None, "does not fit its data_offsets"),
    "backwards": ({"a": _entry(4, 0, [4])}, b"1234", None, "does not fit"),
    "negative": ({"a": _entry(-4, 0)}, b"1234", None, "data_offsets [-4, 0]"),
    "a negative size": ({"a": _entry(0, 4, [-2, -2])}, b"1234", None, "shape [-2, -2]"),
    "a huge shape": ({"a": _entry(0, 4, [2**62, 2**62])}, b"1234", None, "does not fit"),
    "numbers beyond 64 bits": ({"a": _entry(0, 2**70)}, b"1234", None, "not a whole"),
    "true as a number": ({"a": {**_entry(0, 1), "shape": [True]}}, b"1", None, "shape [True]"),
    "fractions": ({"a": {**_entry(0, 1), "data_offsets": [0, 1.0]}}, b"1", None, "data_offsets [0, 1.0]"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1", None, "lacks dtype"),
    "an unknown dtype": ({"a": _entry(0, 4, None, "F4")}, b"1234", None, "dtype 'F4'"),
    "a dtype that is a list": ({"a": {**_entry(0, 1), "dtype": []}}, b"1", None, "dtype []"),
    "metadata that is a number": ({"__metadata__": 3}, b"", None, "__metadata__"),
    "metadata that is nested": ({"__metadata__": {"a": {}}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_a_clear_error(case: str, tmp_path: Path) -> None:
    header, values, length, message = HOSTILE[case]
    path = _file(tmp_path, header, values, length)
    with pytest.raises(InputError) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in (0, 5, 8, 30, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"x\.safetensors is not a whole safetensors file"):
            read_header(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_header(tmp_path / "nothing.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 80))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + raw)
    try:
        read_header(path)
    except InputError:
        return
    with safe_open(path, framework="pt"):  # what we accept, the library accepts
        pass


_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "X"]),
        "shape": st.lists(st.integers(0, 3), max_size=3),
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), _ENTRY, max_size=3), st.binary(max_size=24))
def test_we_never_accept_what_the_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], values: bytes
) -> None:
    path = _file(tmp_path_factory.getbasetemp(), header, values)
    try:
        read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise AssertionError(f"accepted {header}") from error
