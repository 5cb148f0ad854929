"""What a merged folder is made of and from, with hashes; and the check that it still is. Needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..task_vectors.errors import InputError, VerifyError
from ..task_vectors.headers import read_header
from ..task_vectors.places import MANIFEST
from ..task_vectors.references import Reference, locate
from ..task_vectors.sources import INDEX_SUFFIX, fingerprint, read_json, sha256_of
from .methods.registry import get
from .plan import Plan


def make_manifest(plan: Plan, weights: dict[str, str], folder: Path, whole: bool = False) -> dict[str, Any]:
    """The manifest of a folder whose files are all written. It has no time and no machine: the same merge gives the same bytes.

    Args:
        plan: the merge.
        weights: SHA-256 of the files of weights, which were hashed as they were written.
        folder: where they are.
        whole: hash all bytes of the inputs, not a sample.
    """
    recipe = plan.recipe
    inputs = []
    for part in plan.checkpoints:
        for header in part.files:
            entry = {"model": part.name, "file": header.path.name, **fingerprint(header, whole)}
            inputs.append(entry if part.commit is None else {**entry, "commit": part.commit})
    unique = {json.dumps(entry, sort_keys=True): entry for entry in inputs}
    outputs = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            outputs[path.name] = {"bytes": path.stat().st_size, "sha256": weights.get(path.name) or sha256_of(path)}
    return {
        "format": 1,
        "recipe": recipe.to_yaml(),
        "method": {"name": recipe.merge_method, "reference": get(recipe.merge_method).reference},
        "semantics": recipe.subspace.semantics,
        "seed": recipe.subspace.seed,
        "versions": {"peft_subspace": __version__, "torch": version("torch")},
        "notes": list(plan.notes),
        "inputs": list(unique.values()),
        "outputs": outputs,
    }


@dataclass
class Verification:
    """What `verify` found."""

    files: int = 0
    bytes: int = 0
    inputs: int = 0
    not_found: list[str] = field(default_factory=list)


def verify(folder: str | os.PathLike[str], inputs: bool = True) -> Verification:
    """Compare a merged folder and the models that it was made from with its manifest.

    Args:
        folder: a result of `merge`.
        inputs: look at the models too; those that are not there any more are only listed.

    Raises:
        VerifyError: a file is missing, has other bytes, or is not in the manifest; a model has changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise VerifyError(f"{folder}: has no {MANIFEST}, so it is no result of `peft-subspace merge`, or no whole one.")
    manifest = read_json(path)
    found, wrong = Verification(), []
    try:
        if not any(name.endswith(".safetensors") for name in manifest["outputs"]):
            wrong.append("the manifest names no file of weights")
        for name, expected in manifest["outputs"].items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                wrong.append(f"{name} is missing")
            elif file.stat().st_size != expected["bytes"]:
                wrong.append(f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}")
            elif sha256_of(file) != expected["sha256"]:
                wrong.append(f"{name} has other content")
            elif name.endswith(INDEX_SUFFIX):
                named = set(read_json(file)["weight_map"].values()) - set(manifest["outputs"])
                wrong += [f"{lost}, which {name} names, is not in the manifest" for lost in sorted(named)]
            found.files += 1
            found.bytes += expected["bytes"]
        wrong += [
            f"{file.name} is not in the manifest"
            for file in sorted(folder.glob("*.safetensors"))
            if file.name not in manifest["outputs"]
        ]
        for entry in manifest["inputs"] if inputs else ():
            _verify_input(entry, found, wrong)
    except (KeyError, TypeError, AttributeError) as error:
        raise VerifyError(f"{path}: is not a manifest of this tool: {error!r}.") from error
    if wrong:
        raise VerifyError(f"{folder} is not as it was merged: " + "; ".join(wrong) + ".")
    return found


def _verify_input(entry: dict[str, Any], found: Verification, wrong: list[str]) -> None:
    label = f"{entry['model']} ({entry['file']})"
    try:
        reference = Reference.parse(entry["model"])
        path, _ = locate(reference.model, entry.get("commit") or reference.revision)
        header = read_header(path / entry["file"] if path.is_dir() else path)
    except ValueError as error:
        if isinstance(error, InputError) and "is not a whole" in str(error):
            wrong.append(f"the input {label} is damaged")
        else:
            found.not_found.append(label)
        return
    now = fingerprint(header, "sha256" in entry)
    if any(now[key] != entry[key] for key in now):
        wrong.append(f"the input {label} has changed")
    found.inputs += 1
