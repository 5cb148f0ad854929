"""Folders and files of models: which tensors are where. Reads headers and JSON only; needs no torch."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .errors import InputError
from .headers import FLOATS, FileHeader, TensorHeader, opened, read_header, refuse_pointer
from .pickles import rewritten

Kind = Literal["model", "adapter", "task_vector"]
FORMAT_KEY, TASK_VECTOR = "peft_subspace", "task_vector"  # in the metadata of a task-vector file
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"  # of PEFT before 0.7
_PICKLES = (
    ", which can run code when they are opened. Pass --allow-pickle (in Python, open and use them within "
    "`peft_subspace.task_vectors.pickles.pickles_allowed(True)`) to read them with torch's weights_only loader, or save them "
    "again with safetensors."
)
INDEX_SUFFIX = ".safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder or file.

    Attributes:
        name: as the user wrote it, for messages.
        path: the folder or the file.
        kind: a model, an adapter of PEFT (ours too), or a task-vector file.
        tensors: name -> where its values are.
        files: the files that hold them.
        config: config.json or adapter_config.json; empty if there is none.
        metadata: of a task-vector file.
        commit: of the Hub.
    """

    name: str
    path: Path
    kind: Kind
    tensors: dict[str, TensorHeader]
    files: tuple[FileHeader, ...]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are looked for."""
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path: Path, name: str | None = None, commit: str | None = None) -> Checkpoint:
    """Read the headers of a model, of an adapter, or of a task-vector file.

    Args:
        path: a folder with `model.safetensors`, with an index and its shards, or with an adapter; or one file.
        name: what messages call it.
        commit: of the Hub, to be kept in the manifest.

    Raises:
        InputError: no weights, weights in pickles only, an index that does not fit its files or leads out of the
            folder, a damaged file, quantised weights.
    """
    name = name or str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(
                f"{name}: only .safetensors files are read; pickles (.bin, .pt) can run code when they are opened."
            )
        return _of_files(name, path, [path], {}, commit)
    if not path.is_dir():
        raise InputError(f"{name}: there is no such folder or file.")
    if (path / ADAPTER_CONFIG).is_file():
        weights = path / ADAPTER_WEIGHTS
        if not weights.is_file():
            weights = _adapter_pickle(name, path, commit is not None)
        header = read_header(weights)
        return Checkpoint(name, path, "adapter", header.tensors, (header,), read_json(path / ADAPTER_CONFIG), {}, commit)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise InputError(
            f"{name}: its weights are quantised ({method}), and packed values cannot be added. Use the unquantised model, or "
            f"dequantise it first (`model.dequantize().save_pretrained(...)`)."
        )
    whole = path / "model.safetensors"
    index = None if whole.is_file() else _index_file(path, name)
    if index is not None:
        return _sharded(name, path, index, config, commit)
    if whole.is_file():
        _warn_of_other_weights(name, path)
    files = sorted(path.glob("*.safetensors"))
    preferred = [file for file in files if file.name == "model.safetensors"] or files
    if len(preferred) == 1:
        return _of_files(name, path, preferred, config, commit)
    if not preferred and (pickle := rewritten(path)) is not None:
        return _of_files(name, path, [pickle], config, commit)
    raise InputError(f"{name}: {_why_nothing(path, preferred, commit is not None)}")


def _adapter_pickle(name: str, path: Path, from_hub: bool) -> Path:
    if (file := rewritten(path, ADAPTER_PICKLE)) is not None:
        return file
    if (path / ADAPTER_PICKLE).is_file():
        raise InputError(f"{name}: has its weights in a pickle ({ADAPTER_PICKLE}){_PICKLES}")
    hint = " If it has a pickle, pass --allow-pickle to download and read it." if from_hub else " Save the adapter again."
    raise InputError(f"{name}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}.{hint}")


def _warn_of_other_weights(name: str, path: Path) -> None:
    """A folder that was saved twice has two sets of weights, of which transformers loads the one file."""
    index = path / f"model{INDEX_SUFFIX}"
    if not index.is_file():
        return
    files = sorted(set(map(str, (read_json(index).get("weight_map") or {}).values())) - {"model.safetensors"})
    if files:
        warnings.warn(
            f"{name}: has two sets of weights, model.safetensors and those of {index.name} ({shortened(files, 2)}). The first "
            f"is read, as transformers does. Remove what is left of the other saving.",
            stacklevel=2,
        )


def _index_file(path: Path, name: str) -> Path | None:
    found = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    preferred = [file for file in found if file.name == f"model{INDEX_SUFFIX}"] or found
    if len(preferred) > 1:
        raise InputError(f"{name}: has several indices: {', '.join(file.name for file in preferred)}. Leave one.")
    return preferred[0] if preferred else None


def _why_nothing(path: Path, files: list[Path], from_hub: bool) -> str:
    if files:
        return (
            f"has {len(files)} .safetensors files but no index ({', '.join(f.name for f in files[:3])}, ...). Name one of them."
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return f"has its weights in pickles (.bin, .pt){_PICKLES}"
    if from_hub:  # other files were not downloaded
        return "has no .safetensors file. If it has pickles (.bin), pass --allow-pickle to download and read them."
    return "has no .safetensors file."


def _of_files(name: str, path: Path, files: list[Path], config: dict[str, Any], commit: str | None) -> Checkpoint:
    headers = [read_header(file) for file in files]
    tensors = {key: tensor for header in headers for key, tensor in header.tensors.items()}
    metadata = headers[0].metadata
    kind: Kind = "task_vector" if metadata.get(FORMAT_KEY) == TASK_VECTOR else "model"
    _check_dtypes(name, tensors.values())
    return Checkpoint(name, path, kind, tensors, tuple(headers), config, metadata, commit)


def _sharded(name: str, path: Path, index: Path, config: dict[str, Any], commit: str | None) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index}: has no weight_map of names to files.")
    headers: dict[str, FileHeader] = {}
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: names the file {file!r}, which is not a .safetensors file of its own folder.")
        if not (path / file).is_file():
            raise InputError(f"{index}: names the file {file!r}, which is not there. Download or save the model again.")
        headers[file] = read_header(path / file)
    tensors: dict[str, TensorHeader] = {}
    wrong = []
    for key, file in weight_map.items():
        if key in headers[file].tensors:
            tensors[key] = headers[file].tensors[key]
        else:
            wrong.append(f"{key!r} should be in {file} and is not")
    for file, header in headers.items():
        wrong += [
            f"{key!r} is in {file}, where the index does not say it" for key in header.tensors if weight_map.get(key) != file
        ]
    if wrong:
        raise InputError(f"{index} does not fit its files: {shortened(wrong)}. Download or save the model again.")
    _check_dtypes(name, tensors.values())
    return Checkpoint(name, path, "model", tensors, tuple(headers.values()), config, {}, commit)


def _check_dtypes(name: str, tensors: Iterable[TensorHeader]) -> None:
    packed = [
        t.name
        for t in tensors
        if t.dtype.startswith("F8") or t.name.endswith((".qweight", ".absmax", ".SCB", ".weight_packed"))
    ]
    if packed:
        raise InputError(
            f"{name}: has quantised weights ({shortened(packed)}), which cannot be added. Use the unquantised model."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with a table in it.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        refuse_pointer(path)
        value = json.loads(path.read_bytes())
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a table is expected, not {type(value).__name__}.")
    return value


def shortened(items: list[str], most: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def counted(number: int, one: str, many: str) -> str:
    """A number and the words that follow it: "1 tensor has", "2 tensors have"."""
    return f"{number} {one if number == 1 else many}"


def fingerprint(header: FileHeader, whole: bool = False) -> dict[str, Any]:
    """What a file is known by: its size, and the SHA-256 of its header and 256 evenly spaced blocks of 4 KiB.

    A fine-tuned model differs from any other nearly everywhere, so a megabyte out of it is enough to tell them apart, and
    a 100 GB model is checked in milliseconds. The time of the last change is left out: a copy is the same model.

    Args:
        header: of the file.
        whole: hash every byte instead, at about 2 GB/s.

    Raises:
        InputError: the file is another one than when its header was read.
    """
    with opened(header) as number, open(number, "rb", closefd=False) as file:
        if whole:
            return {"bytes": header.size, "sha256": sha256_of(number)}
        start = min((tensor.offset for tensor in header.tensors.values()), default=header.size)
        digest = hashlib.sha256(file.read(start))
        for sample in range(SAMPLES):
            file.seek(start + (header.size - start) * sample // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(start, header.size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": header.size, "sampled_sha256": digest.hexdigest()}


def sha256_of(path: Path | int) -> str:
    """SHA-256 of a whole file; one that is open already, at its beginning, stays open."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0, closefd=not isinstance(path, int)) as file:
        while data := file.read(2**22):
            digest.update(data)
    return digest.hexdigest()


def is_float(tensor: TensorHeader) -> bool:
    """Whether the values of a tensor can be merged; others (counters, masks) must be equal and are copied."""
    return tensor.dtype in FLOATS
