"""A small Hugging Face Hub on disk, over real HTTP: the `huggingface_hub` client pushes to it and loads from it.

It has repositories, commits, branches, tags, both ways to upload (inside the commit, or "lfs": each file to a URL of
its own), and the errors that the client tells apart. It has no pull requests, no private repositories and no Xet
storage, so clients must set HF_HUB_DISABLE_XET=1 and, like all their settings, before `huggingface_hub` is imported:
`LocalHub.environment` has what a client process needs.

By hand, `python tests/hub/server.py FOLDER --token TOKEN` prints the endpoint and serves until Ctrl-C. On disk:

    blobs/<oid>                                  the content of files, under git's SHA-1, or SHA-256 for lfs
    <type>s/<owner>/<name>/commits/<oid>.json    parent, message, date, and every file's path -> oid and size
    <type>s/<owner>/<name>/refs.json             branches and tags -> commit
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

Json: TypeAlias = dict[str, Any]

KINDS = ("models", "datasets", "spaces")
OWNER = "user"  # of every token, and of a repository created under a bare name
BAD_TOKEN = "Invalid username or password."  # what the real Hub says
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".npz", ".parquet")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """An answer that is an error; the client picks its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def lfs_details(file: Json) -> Json:
    """What listings add for a file that was uploaded by lfs: it is known by its SHA-256, any other by git's SHA-1."""
    oid, size = file["oid"], file["size"]
    return {"lfs": {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}} if len(oid) == 64 else {}


def write_atomically(path: Path, content: bytes) -> None:
    """No reader in another thread ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


class Repository:
    """The commits, branches and tags of one repository; `blobs` is shared by all of them."""

    def __init__(self, folder: Path, blobs: Path) -> None:
        self.folder, self.blobs = folder, blobs

    @property
    def refs(self) -> dict[str, dict[str, str]]:
        """`{"branches": {name: commit}, "tags": {name: commit}}`."""
        try:
            return json.loads((self.folder / "refs.json").read_bytes())
        except FileNotFoundError:  # a repository that is only now created
            return {"branches": {}, "tags": {}}

    def set_ref(self, kind: str, name: str, commit: str | None) -> None:
        """Points a branch or tag to a commit, or deletes it."""
        refs = self.refs
        if commit is None:
            refs[kind].pop(name)
        else:
            refs[kind][name] = commit
        write_atomically(self.folder / "refs.json", json.dumps(refs).encode())

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit id stands for."""
        refs = self.refs
        if known := refs["branches"].get(revision) or refs["tags"].get(revision):
            return known
        if re.fullmatch("[0-9a-f]{40}", revision) and (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        raise HubError(404, f"Invalid rev id: {revision!a}", "RevisionNotFound")

    def commit(self, oid: str) -> Json:
        """What is stored about a commit."""
        return json.loads((self.folder / "commits" / f"{oid}.json").read_bytes())

    def history(self, oid: str | None) -> Iterator[tuple[str, Json]]:
        """A commit and all before it, newest first."""
        while oid:
            commit = self.commit(oid)
            yield oid, commit
            oid = commit["parent"]

    def add_commit(self, branch: str, changes: Iterable[Json]) -> str:
        """Applies the lines of a commit request to the tip of a branch; returns the new tip."""
        parent = self.refs["branches"].get(branch)
        files: dict[str, Json] = dict(self.commit(parent)["files"]) if parent else {}
        header: Json = {}
        for change in changes:
            value = change["value"]
            if change["key"] == "header":
                header = value
                if header.get("parentCommit", parent) != parent:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                continue
            path = value["path"].rstrip("/")
            if not path or any(part in ("", ".", "..") for part in path.split("/")):
                raise HubError(400, f"Invalid path: {path!a}")  # it would leave the folder of who downloads it
            if change["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                write_atomically(self.blobs / oid, content)
                files[path] = {"oid": oid, "size": len(content)}
            elif change["key"] == "lfsFile":
                blob = self.blobs / value["oid"]
                if not re.fullmatch("[0-9a-f]{64}", value["oid"]) or not blob.exists():
                    raise HubError(400, f"The lfs object of {path!a} was not uploaded")
                files[path] = {"oid": value["oid"], "size": blob.stat().st_size}
            elif change["key"] in ("deletedFile", "deletedFolder"):
                folder = change["key"] == "deletedFolder"
                gone = [p for p in files if (p.startswith(path + "/") if folder else p == path)]
                if not gone:
                    raise HubError(404, f"Nothing to delete at {path!a}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown operation: {change['key']!a}")
        commit = {
            "parent": parent,
            "title": header.get("summary", ""),
            "message": header.get("description", ""),
            "date": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "files": files,
        }
        content = json.dumps(commit, sort_keys=True).encode()
        oid = hashlib.sha1(content).hexdigest()
        write_atomically(self.folder / "commits" / f"{oid}.json", content)
        self.set_ref("branches", branch, oid)
        return oid


class LocalHub:
    """A Hub that listens on a port of this machine inside a `with` block.

    Args:
        root: The folder of everything stored; one that an earlier hub has filled is served again.
        tokens: The tokens that may write. `None`: everybody may, without a token.
        port: 0 picks a free one.
    """

    def __init__(self, root: Path, tokens: set[str] | None = None, port: int = 0) -> None:
        self.root, self.tokens, self.port = Path(root), tokens, port
        self.blobs = self.root / "blobs"
        self.lock = threading.Lock()  # one writer at a time
        self._secret = secrets.token_bytes(16)
        self._server: _Server | None = None

    def __enter__(self) -> LocalHub:
        self.blobs.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", self.port), _Handler)  # from here on, connections wait in the queue
        self._server.hub = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """What clients take as HF_ENDPOINT or `HfApi(endpoint=...)`."""
        return f"http://127.0.0.1:{self.port}"

    def page(self, kind: str, name: str) -> str:
        """The address of a repository."""
        folder = "" if kind == "models" else f"{kind}/"
        return f"{self.endpoint}/{folder}{name}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables of a client process that talks to this hub only, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": token or "",  # an empty one counts as none, and hides the one of the caller
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def repository(self, kind: str, name: str, must_exist: bool = True) -> Repository:
        """The repository `name` ("owner/name") of a kind: "models", "datasets" or "spaces"."""
        # Both become a path, so neither may lead out of the root.
        if kind not in KINDS or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            raise HubError(404, f"No such repository here: {name!a} in {kind!a}", "RepoNotFound")
        repository = Repository(self.root / kind / name, self.blobs)
        if must_exist and not repository.refs["branches"]:
            raise HubError(404, f"Repository not found: {name!a}", "RepoNotFound")
        return repository

    def sign(self, oid: str) -> str:
        """What makes an upload URL valid: the client sends no token along with the content."""
        return hmac.new(self._secret, oid.encode(), "sha256").hexdigest()


class _Server(socketserver.ThreadingTCPServer):
    """`http.server.HTTPServer` would look up the name of the machine first, which can take seconds."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    hub: LocalHub


Route: TypeAlias = Callable[["_Handler", dict[str, str]], Any]
ROUTES: list[tuple[str, re.Pattern[str], bool, Route]] = []
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
REPO_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+?)?)"
REV = r"/(?P<rev>[^/]+)"  # the slash of a branch such as "a/b" is quoted


def route(methods: str, pattern: str, write: bool = False) -> Callable[[Route], Route]:
    """Has requests answered by a method, which returns the JSON of the answer or `None` if it has answered itself."""

    def register(function: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), write, function) for method in methods.split())
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Answers one request. HTTP/1.0, the default, closes the connection after it, so none outlives the hub."""

    server: _Server
    body: bytes

    def handle_request(self) -> None:
        """Finds the route of the request, checks its token, and turns errors into answers."""
        self.hub = self.server.hub
        size = int(self.headers.get("Content-Length") or 0)
        # Read even what will be refused: a client still sending would see a broken connection, not the answer.
        self.body = b"" if self.command == "PUT" else self.rfile.read(size)
        path = urlsplit(self.path).path
        self.query = {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}
        try:
            for method, pattern, write, function in ROUTES:
                if method == self.command and (match := pattern.fullmatch(path)):
                    if write:
                        self.check_token()
                    # Unquoted only now: a quoted slash is part of a name
                    result = function(self, {key: unquote(value) for key, value in match.groupdict().items() if value})
                    if result is not None:
                        self.reply(200, result)
                    return
            raise HubError(404, f"This hub does not answer {self.command} {path!a}")
        except HubError as error:
            self.reply_error(error)
        except (KeyError, ValueError) as error:
            self.reply_error(HubError(400, f"Malformed request: {error!a}"))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def start(self, status: int, headers: Json) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def reply(self, status: int, value: Any, headers: Json | None = None) -> None:
        content = json.dumps(value).encode()
        self.start(status, {"Content-Type": "application/json", "Content-Length": len(content), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_error(self, error: HubError) -> None:
        headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
        self.reply(error.status, {"error": str(error)}, headers)

    def check_token(self) -> None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if self.hub.tokens is not None and (kind != "Bearer" or token not in self.hub.tokens):
            raise HubError(401, BAD_TOKEN)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent: clients report what goes wrong."""

    def find(self, match: dict[str, str], revision: str = "main") -> tuple[Repository, str]:
        """The repository and the commit that a URL names."""
        repository = self.hub.repository(match.get("kind", "models"), match["repo"])
        return repository, repository.resolve(match.get("rev", revision))

    @route("GET", "/api/whoami-v2", write=True)
    def whoami(self, match: dict[str, str]) -> Json:
        access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        return {"type": "user", "id": OWNER, "name": OWNER, "fullname": OWNER, "orgs": [], "auth": access}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, match: dict[str, str]) -> Json:
        return {"errors": [], "warnings": []}

    def named_in_body(self) -> tuple[str, str, Json]:
        body = json.loads(self.body)
        return f"{body.get('type') or 'model'}s", f"{body.get('organization') or OWNER}/{body['name']}", body

    @route("POST", "/api/repos/create", write=True)
    def create(self, match: dict[str, str]) -> Json | None:
        kind, name, body = self.named_in_body()
        if body.get("private") or body.get("visibility") not in (None, "public"):
            raise HubError(400, "This hub has no private repositories")
        answer = {"url": self.hub.page(kind, name), "name": name}
        with self.hub.lock:
            repository = self.hub.repository(kind, name, must_exist=False)
            if repository.refs["branches"]:
                self.reply(409, {**answer, "error": "You already created this repository"})
                return None
            header = {"key": "header", "value": {"summary": "initial commit"}}
            content = base64.b64encode(GITATTRIBUTES.encode()).decode()
            first = {"key": "file", "value": {"path": ".gitattributes", "content": content}}
            repository.add_commit("main", [header, first])
        return answer

    @route("DELETE", "/api/repos/delete", write=True)
    def delete(self, match: dict[str, str]) -> Json:
        kind, name, _ = self.named_in_body()
        with self.hub.lock:
            shutil.rmtree(self.hub.repository(kind, name).folder)
        return {}

    @route("GET", f"{REPO}(?:/revision{REV})?")
    def info(self, match: dict[str, str]) -> Json:
        repository, oid = self.find(match)
        commit = repository.commit(oid)
        siblings: list[Json] = []
        for path, file in commit["files"].items():
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1].update(size=file["size"], blobId=file["oid"], **lfs_details(file))
        answer = {"id": match["repo"], "sha": oid, "private": False, "gated": False, "disabled": False, "tags": []}
        return {**answer, "lastModified": commit["date"], "siblings": siblings}

    @route("GET", f"{REPO}/tree{REV}(?:/(?P<path>.+))?")
    def tree(self, match: dict[str, str]) -> list[Json]:
        repository, tip = self.find(match)
        prefix = match["path"].rstrip("/") + "/" if "path" in match else ""
        entries: dict[str, Json] = {}
        for path, file in repository.commit(tip)["files"].items():
            if not path.startswith(prefix):
                continue
            below = path.removeprefix(prefix).split("/")
            for depth in range(1, len(below)):
                folder = prefix + "/".join(below[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()  # any will do: nothing is looked up by it
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            entries[path] = {"type": "file", "path": path, **file, **lfs_details(file)}
        if prefix and not entries:
            raise HubError(404, f"{match['path']!a} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]

    @route("GET", f"{REPO}/refs")
    def list_refs(self, match: dict[str, str]) -> Json:
        repository, _ = self.find(match)
        prefixes = {"branches": "refs/heads/", "tags": "refs/tags/"}
        refs = {
            kind: [{"name": name, "ref": prefixes[kind] + name, "targetCommit": oid} for name, oid in names.items()]
            for kind, names in repository.refs.items()
        }
        return {**refs, "converts": [], "pullRequests": []}

    @route("GET", f"{REPO}/commits{REV}")
    def list_commits(self, match: dict[str, str]) -> list[Json]:
        repository, oid = self.find(match)
        authors = [{"user": OWNER}]
        return [{**commit, "id": one, "authors": authors} for one, commit in repository.history(oid)]

    @route("POST DELETE", f"{REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)", write=True)
    def change_ref(self, match: dict[str, str]) -> Json:
        body = json.loads(self.body or b"{}")
        kind = "branches" if match["ref"] == "branch" else "tags"
        with self.hub.lock:
            if self.command == "DELETE":
                repository, _ = self.find(match)
                if match["name"] == "main" or match["name"] not in repository.refs[kind]:
                    raise HubError(400, f"Cannot delete the {match['ref']} {match['name']!a}")
                repository.set_ref(kind, match["name"], None)
                return {}
            # The name in the URL is the new branch, but for a tag it is the commit to be tagged.
            name, start = body.get("tag", match["name"]), body.get("startingPoint", "main")
            repository, oid = self.find(match, start if kind == "branches" else match["name"])
            if name in repository.refs[kind]:
                raise HubError(409, f"Reference already exists: {name!a}")
            repository.set_ref(kind, name, oid)
        return {}

    @route("POST", f"{REPO}/preupload{REV}", write=True)
    def preupload(self, match: dict[str, str]) -> Json:
        repository, oid = self.find(match)
        files = repository.commit(oid)["files"]
        answers = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            lfs = file["size"] > 0 and (binary or file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES))
            known = files.get(file["path"], {}).get("oid")  # with it the client sees that its file is unchanged
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return {"files": answers}

    @route("POST", rf"{REPO_PAGE}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, match: dict[str, str]) -> Json:
        self.find(match)
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid = item["oid"]
            objects.append({"oid": oid, "size": item["size"]})
            if not (self.hub.blobs / oid).exists():  # without an action the client skips the upload
                url = f"{self.hub.endpoint}/lfs/{oid}?signature={self.hub.sign(oid)}"
                objects[-1]["actions"] = {"upload": {"href": url}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, match: dict[str, str]) -> Json:
        digest = hashlib.sha256()
        left = int(self.headers["Content-Length"] or 0)
        with tempfile.NamedTemporaryFile(dir=self.hub.blobs, delete=False) as file:
            while left and (chunk := self.rfile.read(min(left, 2**20))):
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        signed = hmac.compare_digest(self.query.get("signature", ""), self.hub.sign(match["oid"]))
        if not signed or digest.hexdigest() != match["oid"]:
            os.unlink(file.name)
            raise HubError(400, "Content does not match its checksum") if signed else HubError(403, "Invalid signature")
        os.replace(file.name, self.hub.blobs / match["oid"])
        return {}

    @route("POST", f"{REPO}/commit{REV}", write=True)
    def commit(self, match: dict[str, str]) -> Json:
        if "create_pr" in self.query:
            raise HubError(400, "This hub has no pull requests")
        changes = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            repository, _ = self.find(match)
            if match["rev"] not in repository.refs["branches"]:
                raise HubError(400, f"Not a branch: {match['rev']!a}")
            oid = repository.add_commit(match["rev"], changes)
        return {"commitOid": oid, "commitUrl": f"{self.hub.page(match['kind'], match['repo'])}/commit/{oid}"}

    @route("GET HEAD", f"{REPO_PAGE}/resolve{REV}/(?P<path>.+)")
    def resolve(self, match: dict[str, str]) -> None:
        repository, oid = self.find(match)
        file = repository.commit(oid)["files"].get(match["path"])
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        size, start, end = file["size"], 0, file["size"] - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")  # how downloads are resumed
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or end), end)
            if start > end:
                self.reply(416, {"error": "Range not satisfiable"}, {"Content-Range": f"bytes */{size}"})
                return
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{file["oid"]}"',
            "Content-Length": end + 1 - start,
            "Accept-Ranges": "bytes",
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        if lfs_details(file):
            headers |= {"X-Linked-Size": size, "X-Linked-Etag": f'"{file["oid"]}"'}
        self.start(206 if asked else 200, headers)
        if self.command == "GET":
            with open(self.hub.blobs / file["oid"], "rb") as blob:
                blob.seek(start)
                while start <= end:
                    start += self.wfile.write(blob.read(min(2**20, end + 1 - start)))


def main() -> None:
    """Serve a folder until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on this machine, for tests and examples.")
    parser.add_argument("root", type=Path, help="the folder of everything stored")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--token", action="append", help="who has it may write (may be repeated); default: everybody")
    parser.add_argument("--ready-file", type=Path, help="is written, with the endpoint in it, once the hub listens")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored
    with LocalHub(options.root, set(options.token) if options.token else None, options.port) as hub:
        print(hub.endpoint, flush=True)
        if options.ready_file:
            write_atomically(options.ready_file, hub.endpoint.encode())
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped")


if __name__ == "__main__":
    main()
