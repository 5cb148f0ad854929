"""The local Hub against the real client: what other tests and the quickstart rely on."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from tests.hub.server import BAD_TOKEN, LocalHub
from tests.processes import REPOSITORY, run_python

# The client's own, at every lfs upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hub-test"
REPO = "user/adapter"
SMALL = b'{"r": 4}\n'
LARGE = bytes(range(256)) * 5000  # more than the server reads or writes at once
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
OID = hashlib.sha256(b"content").hexdigest()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of this process reads these when it is imported, which other tests have done offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", {TOKEN, "another"}) as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something to push: regular, lfs, empty and nested files, and a model card, which the client has validated."""
    files = {
        "README.md": b"---\nlibrary_name: peft\n---\n# An adapter\n",
        "adapter_config.json": SMALL,
        "adapter_model.safetensors": LARGE,
        "empty.txt": b"",
        "deep/er/with space ä.txt": "ä\n".encode(),
        "deep/binary": b"\0\1\2",
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(api: HfApi, cache: Path, name: str, revision: str | None = None, repo_id: str = REPO) -> bytes:
    return Path(api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)).read_bytes()


def put(api: HfApi, content: bytes, name: str = "file.json", revision: str | None = None) -> str:
    """Commits one file; the commit."""
    return str(api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, revision=revision).oid)


def test_create(api: HfApi, hub: LocalHub) -> None:
    url = api.create_repo("bare")
    assert (url, url.repo_id) == (f"{hub.endpoint}/user/bare", "user/bare")
    assert api.create_repo("bare", exist_ok=True).repo_id == "user/bare"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("bare")
    assert api.repo_exists("user/bare")
    assert not api.repo_exists("user/none")
    assert api.list_repo_files("user/bare") == [".gitattributes"]
    assert api.whoami()["name"] == "user"


def test_a_folder_comes_back_bit_for_bit(api: HfApi, folder: Path, tmp_path: Path) -> None:
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert snapshot.name == commit.oid
    found = contents(snapshot)
    assert found.pop(".gitattributes")
    assert found == contents(folder)
    assert read(api, tmp_path / "other", "deep/er/with space ä.txt") == "ä\n".encode()

    siblings = {file.rfilename: file for file in api.repo_info(REPO, files_metadata=True).siblings or []}
    assert {name for name, file in siblings.items() if file.lfs} == {"adapter_model.safetensors", "deep/binary"}
    assert siblings["adapter_model.safetensors"].size == len(LARGE)


@pytest.mark.parametrize(
    ("path", "recursive", "expected"),
    [
        ("", False, {".gitattributes", "README.md", *ADAPTER, "deep", "empty.txt"}),
        ("deep", False, {"deep/binary", "deep/er"}),
        ("deep", True, {"deep/binary", "deep/er", "deep/er/with space ä.txt"}),
    ],
)
def test_tree(path: str, recursive: bool, expected: set[str], api: HfApi, folder: Path) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert {entry.path for entry in api.list_repo_tree(REPO, path, recursive=recursive)} == expected


def test_an_unchanged_push_is_no_commit(api: HfApi, folder: Path) -> None:
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert len(api.list_repo_commits(REPO)) == 2
    (folder / "adapter_config.json").write_bytes(b"{}")
    assert api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Second").oid != first.oid
    assert next(commit.title for commit in api.list_repo_commits(REPO)) == "Second"


@pytest.mark.parametrize("name", ["file.json", "file.safetensors"])
def test_old_revisions_keep_their_files(name: str, api: HfApi, tmp_path: Path) -> None:
    first = put(api, b"first", name)
    api.create_branch(REPO, branch="old/branch")
    api.create_tag(REPO, tag="v1")
    second = put(api, b"second", name)
    third = put(api, b"third", name, revision="old/branch")
    expected = {None: b"second", first: b"first", second: b"second", "v1": b"first", "old/branch": b"third"}
    for revision, content in expected.items():
        assert read(api, tmp_path / "cache", name, revision) == content
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old/branch": third}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}


def test_branches(api: HfApi, tmp_path: Path) -> None:
    first = put(api, b"first")
    put(api, b"second")
    api.create_branch(REPO, branch="from-first", revision=first)
    assert read(api, tmp_path, "file.json", "from-first") == b"first"
    api.create_branch(REPO, branch="from-first", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="from-first")
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="new", revision="none")
    api.delete_branch(REPO, branch="from-first")
    with pytest.raises(RevisionNotFoundError):
        put(api, b"", revision="from-first")
    with pytest.raises(HfHubHTTPError, match="Cannot delete"):
        api.delete_branch(REPO, branch="main")


def test_a_commit_on_an_outdated_parent_is_refused(api: HfApi) -> None:
    first = put(api, b"first")
    put(api, b"second")
    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        api.upload_file(path_or_fileobj=b"third", path_in_repo="file.json", repo_id=REPO, parent_commit=first)


def test_delete(api: HfApi, folder: Path, tmp_path: Path) -> None:
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    api.delete_folder("deep", REPO)
    api.delete_file("empty.txt", REPO)
    assert set(api.list_repo_files(REPO)) == {".gitattributes", "README.md", *ADAPTER}
    assert read(api, tmp_path, "deep/binary", commit.oid) == b"\0\1\2"
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("empty.txt", REPO)
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_concurrent_pushes_all_arrive(api: HfApi) -> None:
    with ThreadPoolExecutor(8) as pool:
        commits = set(pool.map(lambda i: put(api, bytes([i]), f"{i}.bin"), range(32)))
    assert len(commits) == 32
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *(f"{i}.bin" for i in range(32))}


def test_datasets_are_apart_from_models(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    assert api.create_repo("user/data", repo_type="dataset") == f"{hub.endpoint}/datasets/user/data"
    assert not api.repo_exists("user/data")
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="x.parquet", repo_id="user/data", repo_type="dataset")
    path = api.hf_hub_download("user/data", "x.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == LARGE


WRITES: dict[str, Callable[[HfApi], object]] = {
    "create": lambda api: api.create_repo("user/new"),
    "upload": lambda api: put(api, SMALL),
    "lfs": lambda api: put(api, LARGE, "x.safetensors"),
    "delete": lambda api: api.delete_repo(REPO),
    "branch": lambda api: api.create_branch(REPO, branch="new"),
}


@pytest.mark.parametrize("token", ["wrong", False])
@pytest.mark.parametrize("write", WRITES)
def test_writing_needs_a_good_token(write: str, token: str | bool, api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    before = put(api, SMALL)
    stranger = HfApi(endpoint=hub.endpoint, token=token)
    with pytest.raises(HfHubHTTPError, match=BAD_TOKEN) as caught:
        WRITES[write](stranger)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert stranger.repo_info(REPO).sha == before
    assert read(stranger, tmp_path, "file.json") == SMALL


def test_whoami_with_a_bad_token(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="wrong")


def test_without_tokens_everybody_may_write(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo(REPO)
        assert api.repo_info(REPO).sha == api.list_repo_commits(REPO)[0].commit_id


@pytest.mark.parametrize(
    ("repo", "name", "revision", "error"),
    [
        (REPO, "none.json", None, RemoteEntryNotFoundError),
        (REPO, "file.json", "none", RevisionNotFoundError),
        (REPO, "file.json", "0" * 40, RevisionNotFoundError),
        ("user/none", "file.json", None, RepositoryNotFoundError),
        ("bare", "file.json", None, RepositoryNotFoundError),
    ],
)
def test_what_is_missing_has_its_own_exception(
    repo: str, name: str, revision: str | None, error: type[Exception], api: HfApi, tmp_path: Path
) -> None:
    put(api, SMALL)
    with pytest.raises(error):
        read(api, tmp_path, name, revision, repo)
    if error is not RemoteEntryNotFoundError:
        with pytest.raises(error):
            api.repo_info(repo, revision=revision)
        with pytest.raises(error):
            api.snapshot_download(repo, revision=revision, cache_dir=tmp_path)


def test_a_download_is_resumed(api: HfApi, hub: LocalHub) -> None:
    put(api, LARGE, "x.safetensors")
    file = io.BytesIO(LARGE[:1000])
    file.seek(1000)
    http_get(f"{hub.endpoint}/{REPO}/resolve/main/x.safetensors", file, resume_size=1000, expected_size=len(LARGE))
    assert file.getvalue() == LARGE


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", f"/lfs/{OID}", b"content", 403),
        ("PUT", f"/lfs/{OID}?signature=0", b"content", 403),
        ("PUT", f"/lfs/{OID}?signature={{signature}}", b"other content", 400),
        ("POST", f"/api/models/{REPO}/commit/main", b'{"key": "file", "value": {"path": "../x", "content": ""}}', 400),
        ("POST", f"/api/models/{REPO}/commit/main", b"no JSON", 400),
        ("POST", f"/api/models/{REPO}/commit/main?create_pr=1", b"", 400),
        ("DELETE", "/api/repos/delete", b'{"name": "..", "organization": ".."}', 404),
        ("DELETE", "/api/repos/delete", b'{"name": "adapter", "type": "models/../model"}', 404),
        ("GET", "/api/unknown", b"", 404),
    ],
)
def test_bad_requests_are_answered_and_change_nothing(
    method: str, path: str, body: bytes, status: int, api: HfApi, hub: LocalHub
) -> None:
    before = contents(hub.root)
    url = hub.endpoint + path.format(signature=hub.sign(OID))
    request = urllib.request.Request(url, body or None, {"Authorization": f"Bearer {TOKEN}"}, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as answer:
        assert answer.status == status
        assert answer.headers["X-Error-Message"]
    assert contents(hub.root) == before


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    for start in range(2):
        with LocalHub(tmp_path / "hub", {TOKEN}) as hub:
            api = HfApi(endpoint=hub.endpoint, token=TOKEN)
            if start == 0:
                api.create_repo(REPO)
                commit = put(api, LARGE, "x.safetensors")
            assert api.repo_info(REPO).sha == commit
            assert read(api, tmp_path / f"cache{start}", "x.safetensors") == LARGE
    with pytest.raises(urllib.error.URLError):  # nothing listens after the block
        urllib.request.urlopen(hub.endpoint)


@pytest.mark.parametrize("command", [["tests/hub/server.py"], ["-m", "tests.hub.server"]])
def test_by_hand(command: list[str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, *command, str(tmp_path / "hub"), "--token", TOKEN, "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        endpoint = ready.read_text()
        assert HfApi(endpoint=endpoint, token=TOKEN).create_repo("bare").repo_id == "user/bare"
        with pytest.raises(HfHubHTTPError, match=BAD_TOKEN):
            HfApi(endpoint=endpoint, token=False).create_repo("other")
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert printed.splitlines()[0] == endpoint


PEFT = """
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

step, folder = sys.argv[1], Path(sys.argv[2])
ids = torch.arange(12).reshape(2, 6)

if step == "push":
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).push_to_hub("user/base")
    base = AutoModelForCausalLM.from_pretrained("user/base")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    try:
        model.push_to_hub("user/refused", token="wrong")
    except HfHubHTTPError as error:
        print(error)
    logits = []
    for revision in (None, "second"):
        model.push_to_hub("user/lora", revision=revision)
        model.push_to_hub("user/lora", revision=revision)  # unchanged
        with torch.no_grad():
            logits.append(model(ids).logits)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(1.0)
    torch.save(logits, folder / "logits.pt")
else:
    logits = torch.load(folder / "logits.pt")
    assert not torch.equal(*logits)
    for revision, expected in zip((None, "second"), logits):
        base = AutoModelForCausalLM.from_pretrained("user/base")
        with torch.no_grad():
            found = PeftModel.from_pretrained(base, "user/lora", revision=revision)(ids).logits
        assert torch.equal(found, expected), revision
    with torch.no_grad():
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("user/lora")(ids).logits, logits[0])
"""


def test_peft_round_trip_in_fresh_processes(hub: LocalHub, tmp_path: Path) -> None:
    """Pushes a base and two versions of an adapter, then loads them where nothing is cached."""
    (tmp_path / "folder").mkdir()
    printed = run_python(PEFT, "push", tmp_path / "folder", **hub.environment(tmp_path / "home", TOKEN))
    assert BAD_TOKEN in printed
    run_python(PEFT, "load", tmp_path / "folder", **hub.environment(tmp_path / "empty-home"))
    api = HfApi(endpoint=hub.endpoint, token=False)
    assert not api.repo_exists("user/refused")
    assert {"README.md", *ADAPTER} <= set(api.list_repo_files("user/lora"))
    siblings = api.repo_info("user/lora", files_metadata=True).siblings or []
    assert [file.rfilename for file in siblings if file.lfs] == ["adapter_model.safetensors"]
    commits = {revision: len(api.list_repo_commits("user/lora", revision=revision)) for revision in ("main", "second")}
    assert commits == {"main": 2, "second": 3}
