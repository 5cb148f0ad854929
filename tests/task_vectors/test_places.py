"""What is at OUT decides what may become of it, for everything that writes; whatever was there is there afterwards.

A place is an obstacle (a file, a device, a folder with a thesis in it) or one that may be used. Every way of writing is
tried on each, and the whole tree is compared before and after.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from transformers import PreTrainedModel

import peft_subspace
from peft_subspace.cli.app import run
from peft_subspace.merging import merge
from peft_subspace.task_vectors import output_folder
from peft_subspace.task_vectors.errors import OutputError
from peft_subspace.task_vectors.extract import extract_lora
from peft_subspace.task_vectors.output_folder import OutputFolder, new_folder
from peft_subspace.task_vectors.places import RECORD, check_place, describe_place, foreign_files
from peft_subspace.task_vectors.task_vector import TaskVector
from tests.disks import mounted
from tests.merging.tiny import contents, recipe, trio
from tests.pico import MODELS

# Everything that writes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    trio(folder)
    extract_lora(str(folder / "a"), str(folder / "base"), folder / "lora", rank=2)
    pico = MODELS["llama"]
    pico.model().save_pretrained(folder / "llama")
    peft.get_peft_model(pico.model(), peft_subspace.FloraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        folder / "flora"
    )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files for the user alone
    return folder


@pytest.fixture
def zoo(made_once: Path, tmp_path: Path) -> Path:
    """Models, adapters and recipes for them."""
    folder = tmp_path / "zoo"
    shutil.copytree(made_once, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    adapters = {**recipe(folder, models=""), "models": [{"model": str(folder / "lora")}], "subspace": {"output": "adapter"}}
    (folder / "adapters.yaml").write_text(yaml.safe_dump(adapters))
    return folder


def _command(*arguments: Any) -> None:
    code = run([*map(str, arguments), "--quiet"])
    if code:
        raise OutputError(f"exit code {code}") if code == 4 else AssertionError(f"exit code {code}")


def _flag(overwrite: bool) -> list[str]:
    return ["--overwrite"] if overwrite else []


def _recipe(zoo: Path) -> Path:
    return zoo if zoo.is_file() else zoo / "recipe.yaml"


def _export(zoo: Path, out: Path, overwrite: bool) -> None:
    _command("export", zoo / "flora", out, "--base", zoo / "llama", *_flag(overwrite))


def _save_as_lora(zoo: Path, out: Path, overwrite: bool) -> None:
    base: PreTrainedModel = MODELS["llama"].model()
    model = peft.PeftModel.from_pretrained(base, os.fspath(zoo / "flora"))
    peft_subspace.save_as_lora(model, out, overwrite=overwrite)


FOLDERS: dict[str, Callable[[Path, Path, bool], Any]] = {
    "merge": lambda zoo, out, overwrite: merge(_recipe(zoo), out, overwrite=overwrite),
    "merge by command": lambda zoo, out, overwrite: _command("merge", _recipe(zoo), out, *_flag(overwrite)),
    "merge of adapters": lambda zoo, out, overwrite: merge(zoo / "adapters.yaml", out, overwrite=overwrite),
    "extract": lambda zoo, out, overwrite: extract_lora(str(zoo / "a"), str(zoo / "base"), out, rank=2, overwrite=overwrite),
    "extract by command": lambda zoo, out, overwrite: _command(
        "extract", zoo / "a", out, "--base", zoo / "base", "--rank", 2, *_flag(overwrite)
    ),
    "export": _export,
    "save_as_lora": _save_as_lora,
}
FILES: dict[str, Callable[[Path, Path, bool], Any]] = {
    "task vector by command": lambda zoo, out, overwrite: _command(
        "extract", zoo / "a", out, "--base", zoo / "base", "--task-vector", *_flag(overwrite)
    ),
    "TaskVector.save": lambda zoo, out, overwrite: TaskVector.open(zoo / "a", zoo / "base").save(out),
}


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder: kinds, contents, where links lead."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        name = str(path.relative_to(folder))
        if stat.S_ISREG(mode):
            found[name] = path.read_bytes()
        else:
            found[name] = os.readlink(path) if stat.S_ISLNK(mode) else stat.S_IFMT(mode)
    return found


# What must stay -----------------------------------------------------------------------------------------------------------


def _text(path: Path) -> Path:
    path.write_text("print('mine')\n")
    return path


def _folder(path: Path, *files: str) -> Path:
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("mine")
    return path


def _link(path: Path, target: Path | str) -> Path:
    path.symlink_to(target)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _device(path: Path) -> Path:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("no right to make a device")
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        made.bind(path.name)
        os.chdir(before)
    return path


def _trainer(path: Path) -> Path:
    """What a Trainer leaves in its output_dir: an adapter, checkpoints, logs."""
    base: PreTrainedModel = MODELS["llama"].model()
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)
    return _folder(path, "checkpoint-500/optimizer.pt", "runs/events.out")


def _used(path: Path, change: Callable[[Path], Any]) -> Path:
    """A result of this package, to which somebody did something."""
    with new_folder(path, "extract", ["adapter_config.json", "README.md"]) as made:
        (made / "adapter_config.json").write_text("{}")
        (made / "README.md").write_text("# written\n")
    change(path)
    return path


OBSTACLES: dict[str, Callable[[Path], Path]] = {
    "file": lambda at: _text(at / "train.py"),
    "named pipe": lambda at: _pipe(at / "pipe"),
    "device": lambda at: _device(at / "null"),
    "socket": lambda at: _socket(at / "socket"),
    "link to a file": lambda at: _link(at / "link", _text(at / "train.py")),
    "link to nothing": lambda at: _link(at / "link", "nowhere"),
    "link to itself": lambda at: _link(at / "link", "link"),
    "link to a thesis": lambda at: _link(at / "link", _folder(at / "mine", "thesis.tex")),
    "git repository": lambda at: _folder(at / "repository", ".git/HEAD", "train.py"),
    "thesis": lambda at: _folder(at / "mine", "thesis.tex", "deep/data.csv"),
    "Trainer": lambda at: _trainer(at / "trained"),
    "file below a file": lambda at: _text(at / "file") / "out",
    "a result with notes": lambda at: _used(at / "used", lambda path: (path / "notes.txt").write_text("mine")),
    "a result with a folder": lambda at: _used(at / "used", lambda path: (path / "figures").mkdir()),
    "a result with another card": lambda at: _used(at / "used", lambda path: (path / "README.md").write_text("# mine\n")),
    "a result with a link": lambda at: _used(at / "used", lambda path: (path / "best").symlink_to(at)),
    "a record that lies": lambda at: _used(
        at / "used",
        lambda path: (
            (path / "thesis.tex").write_text("mine")
            and (path / RECORD).write_text(json.dumps({"outputs": {"thesis.tex": {"bytes": 9, "sha256": "0"}}}))
        ),
    ),
    "a record that leads out": lambda at: _used(
        at / "used",
        lambda path: (path / RECORD).write_text(json.dumps({"outputs": {"../zoo/recipe.yaml": {}, "README.md": {}}})),
    ),
    "no name": lambda at: at / "..",
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("verb", FOLDERS)
def test_what_is_not_ours_stays(verb: str, obstacle: str, overwrite: bool, zoo: Path, tmp_path: Path) -> None:
    at = tmp_path / "at"
    at.mkdir()
    out = OBSTACLES[obstacle](at)
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        FOLDERS[verb](zoo, out, overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", FOLDERS)
def test_nothing_is_computed_for_a_place_that_cannot_be_used(verb: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    thesis = _folder(zoo / "mine", "thesis.tex")
    monkeypatch.setattr("peft_subspace.task_vectors.reading.read_rows", computed, raising=False)
    monkeypatch.setattr("peft_subspace.merging.execute.execute", computed)
    monkeypatch.setattr("peft_subspace.task_vectors.extract._factors", computed)
    monkeypatch.setattr("peft_subspace.export.to_lora", computed)
    with pytest.raises(OutputError):
        FOLDERS[verb](zoo, thesis, True)


@pytest.mark.parametrize("obstacle", [name for name in OBSTACLES if name != "no name"])
@pytest.mark.parametrize("verb", FILES)
def test_a_file_that_is_no_task_vector_stays(verb: str, obstacle: str, zoo: Path, tmp_path: Path) -> None:
    at = tmp_path / "at"
    at.mkdir()
    made = OBSTACLES[obstacle](at)
    out = made.with_name(f"{made.name}.safetensors")
    if os.path.lexists(made):
        made.rename(out)
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        FILES[verb](zoo, out, True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", FILES)
def test_somebody_elses_weights_stay(verb: str, zoo: Path, tmp_path: Path) -> None:
    """A safetensors file that this package did not write, alone and behind a link."""
    weights = shutil.copy(zoo / "c" / "model.safetensors", tmp_path / "weights.safetensors")
    before = tree(tmp_path)
    for out in (Path(weights), _link(tmp_path / "link.safetensors", weights)):
        with pytest.raises(OutputError, match=r"exit code 4|no task-vector file that could be replaced"):
            FILES[verb](zoo, out, True)
    (tmp_path / "link.safetensors").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", FILES)
def test_a_task_vector_is_replaced_through_a_link(verb: str, zoo: Path, tmp_path: Path) -> None:
    TaskVector.open(zoo / "c", zoo / "base").save(tmp_path / "old.safetensors")
    link = _link(tmp_path / "link.safetensors", "old.safetensors")
    FILES[verb](zoo, link, True)
    assert link.is_symlink()
    TaskVector.open(zoo / "a", zoo / "base").save(tmp_path / "expected.safetensors")
    assert (tmp_path / "old.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("verb", ["merge", "merge by command"])
@pytest.mark.parametrize("where", ["of the recipe", "above the recipe", "of an input", "above an input", "current", "home"])
def test_folders_that_last(where: str, verb: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if everything in them was written by this package."""
    result = merge(zoo / "recipe.yaml", tmp_path / "old")
    places = {
        "of the recipe": result, "above the recipe": tmp_path, "of an input": zoo / "a", "above an input": zoo,
        "current": result, "home": result,
    }  # fmt: skip
    source = result / "merge_recipe.yaml" if "recipe" in where else zoo / "recipe.yaml"
    if where == "current":
        monkeypatch.chdir(result)
    if where == "home":
        monkeypatch.setenv("HOME", str(result))
    before = tree(tmp_path)
    words = {"current": "is or holds the current folder", "home": "is or holds the home folder"}
    message = "exit code 4" if "command" in verb else words.get(where, "is or holds|is, holds|already")
    with pytest.raises(OutputError, match=message):
        FOLDERS[verb](source, places[where], True)
    assert tree(tmp_path) == before
    with pytest.raises(OutputError, match="is not a name for a new folder"):
        check_place("/", overwrite=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system, where the system lets us make one."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_mount_point_is_refused_and_a_folder_in_it_is_not(disk: Path, zoo: Path) -> None:
    with pytest.raises(OutputError, match=r"another file system is mounted there\. Choose a folder in it"):
        merge(zoo / "recipe.yaml", disk, overwrite=True)
    merge(zoo / "recipe.yaml", disk / "out")
    assert os.listdir(disk) == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_another_user(zoo: Path, tmp_path: Path) -> None:
    """Without the rights of root: nothing of others is replaced, and a folder without rights is refused before the work."""
    for folder in (tmp_path, *tmp_path.parents):  # pytest makes its folders for root alone
        os.chmod(folder, os.stat(folder).st_mode | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, 65534, 65534)
    _folder(own / "mine", "thesis.tex")
    with suppress(OutputError):  # imports everything, which the other user may have no right to read
        merge(zoo / "recipe.yaml", tmp_path / "warm")
        extract_lora(str(zoo / "a"), str(zoo / "base"), tmp_path / "warm", rank=2)
    cases: list[tuple[str, Path, bool, str | None]] = [
        ("merge", tmp_path / "new", False, "there is no right to write in"),
        ("extract", tmp_path / "new", False, "there is no right to write in"),
        ("merge", own / "mine", True, "holds thesis.tex"),
        ("merge", Path("/dev/null"), True, "is a device"),
        ("merge", tmp_path / "warm", True, "there is no right to write in"),
        ("merge", own / "out", False, None),
        ("merge", own / "out", True, None),
        ("extract", own / "lora", False, None),
    ]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for number, (verb, out, overwrite, message) in enumerate(cases):
            try:
                FOLDERS[verb](zoo, out, overwrite)
                said = None
            except BaseException as error:
                said = str(error)
            if (said is None) != (message is None) or (message or "") not in (said or ""):
                os.write(writer, f"{number}: {said}\n".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == ""
    assert sorted(os.listdir(own)) == ["lora", "mine", "out"]
    assert tree(own / "mine") == {"thesis.tex": b"mine"}
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# What may be used ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", FOLDERS)
def test_an_own_result_is_replaced_when_asked(verb: str, zoo: Path, tmp_path: Path) -> None:
    """By every verb, whatever made it; through a link too. The result is the one in a new folder."""
    real = tmp_path / "bigdisk" / "result"
    real.parent.mkdir()
    FOLDERS[verb](zoo, tmp_path / "new", False)
    expected = contents(tmp_path / "new")
    with new_folder(real, "extract", ["old", "vectors/"]) as folder:
        _folder(folder, "old", "vectors/task.safetensors")
    link = _link(tmp_path / "link", "bigdisk/result")
    with pytest.raises(OutputError):
        FOLDERS[verb](zoo, link, False)
    FOLDERS[verb](zoo, link, True)
    assert link.is_symlink()
    assert contents(real) == expected
    assert os.listdir(real.parent) == ["result"]
    assert sorted(os.listdir(tmp_path)) == ["bigdisk", "link", "new", "zoo"]


@pytest.mark.parametrize("verb", FOLDERS)
@pytest.mark.parametrize("place", ["empty", "link", "deep/deeper/out", "ünïcode 名"])
def test_new_places(place: str, verb: str, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _link(tmp_path / "link", "empty")
    FOLDERS[verb](zoo, tmp_path / place, False)
    assert foreign_files(tmp_path / place) == []
    assert (tmp_path / "link").is_symlink()
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name.startswith(".")]


def test_a_dry_run_says_what_stands_there_and_what_becomes_of_it(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry(out: Path, *more: str) -> tuple[int, str]:
        code = run(["merge", str(zoo / "recipe.yaml"), str(out), "--dry-run", *more])
        said = capsys.readouterr()
        place = [line.removeprefix("Place    ") for line in said.out.splitlines() if line.startswith("Place")]
        return code, (place[0] if place else said.err.strip()).replace(str(tmp_path), "")

    (tmp_path / "empty").mkdir()
    _link(tmp_path / "link", tmp_path / "empty")
    _folder(tmp_path / "mine", "thesis.tex")
    merge(zoo / "recipe.yaml", tmp_path / "old")
    before = tree(tmp_path)
    assert dry(tmp_path / "new") == (0, "/new: does not exist and will be made")
    assert dry(tmp_path / "link") == (0, "/link, a link to /empty: an empty folder, which will be filled")
    said = "/old: a result of `peft-subspace merge` with 5 files, which will be replaced"
    assert dry(tmp_path / "old", "--overwrite") == (0, said)
    assert dry(tmp_path / "old")[0] == 4
    code, said = dry(tmp_path / "mine", "--overwrite")
    assert code == 4
    assert said.startswith("Error: /mine: already exists and holds thesis.tex, which peft_subspace did not write")
    assert tree(tmp_path) == before


def test_a_dry_run_says_what_becomes_of_an_unfinished_result(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused where the merge would be, and nothing changes."""

    def dry(*more: str) -> tuple[int, str]:
        code = run(["merge", str(zoo / "recipe.yaml"), str(tmp_path / "out"), "--dry-run", *more])
        said = capsys.readouterr()
        return code, (said.err.strip() or said.out.splitlines()[-1]).replace(str(tmp_path), "")

    first = OutputFolder(tmp_path / "out", "merge")
    first.begin(["model.safetensors"])
    (first.folder / "model.safetensors").write_text("half")
    before = tree(tmp_path)
    assert dry() == (4, "Error: /out.partial.journal: another process is writing this result. Wait for it, or end it.")
    first.leave()
    assert dry()[0] == 4
    assert dry("--resume") == (0, "Place    /out.partial: unfinished; the merge would go on with it")
    assert dry("--overwrite") == (0, "Place    /out.partial: unfinished; the merge would start anew")
    assert tree(tmp_path) == before
    (first.folder / "thesis.tex").write_text("mine")
    for more in ([], ["--resume"], ["--overwrite"]):
        code, said = dry(*more)
        assert code == 4
        assert "/out.partial: holds thesis.tex, which is no part of an unfinished result" in said


def test_saving_twice_is_asked_for(zoo: Path, tmp_path: Path) -> None:
    """The same adapter gives the same bytes; what another command made is not replaced unasked."""
    _save_as_lora(zoo, tmp_path / "lora", False)
    first = contents(tmp_path / "lora")
    base: PreTrainedModel = MODELS["llama"].model()
    model = peft.PeftModel.from_pretrained(base, os.fspath(zoo / "flora"))
    merge(zoo / "recipe.yaml", tmp_path / "merged")
    for out in ("lora", "merged"):
        with pytest.raises(OutputError, match=r"already exists .* pass --overwrite \(overwrite=True\)"):
            peft_subspace.save_as_lora(model, tmp_path / out)
    peft_subspace.save_as_lora(model, tmp_path / "lora", overwrite=True)
    assert contents(tmp_path / "lora") == first


def test_what_is_said_of_a_place(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made", "extract", ["x"]) as folder:
        (folder / "x").write_text("1")
    assert describe_place(tmp_path / "made", tmp_path / "made").endswith(
        "a result of extract with 2 files, which will be replaced"
    )


# Unfinished results --------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_in_the_place_of_an_unfinished_result_stays(zoo: Path, tmp_path: Path) -> None:
    """OUT.partial and its journal may be somebody else's: a model that is called so, a link that was planted."""
    victim = _folder(tmp_path / "victim", "thesis.tex")
    for make in (
        lambda: shutil.copytree(zoo / "c", tmp_path / "out.partial"),
        lambda: _folder(tmp_path / "out.partial", "thesis.tex"),
        lambda: _link(tmp_path / "out.partial", victim),
        lambda: _text(tmp_path / "out.partial"),
        lambda: _text(tmp_path / "out.partial.journal"),
        lambda: _link(tmp_path / "out.partial.journal", victim / "thesis.tex"),
        lambda: _pipe(tmp_path / "out.partial.journal"),
    ):
        made: Any = make()
        before = tree(tmp_path)
        for more in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match=r"out\.partial"):
                merge(zoo / "recipe.yaml", tmp_path / "out", **more)
            with pytest.raises(OutputError, match=r"out\.partial"):
                extract_lora(str(zoo / "a"), str(zoo / "base"), tmp_path / "out", rank=2, overwrite="overwrite" in more)
            assert tree(tmp_path) == before
        shutil.rmtree(made) if made.is_dir() and not made.is_symlink() else made.unlink()


def test_only_the_first_of_two_writes(zoo: Path, tmp_path: Path) -> None:
    """The others hear it before the work, and touch nothing."""
    first = OutputFolder(tmp_path / "out", "merge")
    first.begin(["model.safetensors"])
    (first.folder / "model.safetensors").write_text("half")
    before = tree(tmp_path)
    for verb, write in FOLDERS.items():
        for overwrite in (False, True):
            with pytest.raises(
                OutputError, match="exit code 4" if "command" in verb or verb == "export" else "another process"
            ):
                write(zoo, tmp_path / "out", overwrite)
            assert tree(tmp_path) == before
    first.discard()
    assert sorted(os.listdir(tmp_path)) == ["zoo"]


def test_a_refusal_keeps_the_unfinished_result_of_another_command(zoo: Path, tmp_path: Path) -> None:
    """Also where somebody put a file of their own into it."""
    first = OutputFolder(tmp_path / "out", "merge")
    first.begin(["model.safetensors"])
    (first.folder / "model.safetensors").write_text("hours of work")
    first.leave()
    for overwrite, message in ((False, "an unfinished result of `merge` is there"), (True, r"holds thesis\.tex")):
        if overwrite:
            (first.folder / "thesis.tex").write_text("mine")
        before = tree(tmp_path)
        for verb in ("merge of adapters", "extract", "save_as_lora"):
            with pytest.raises(OutputError, match=message):
                FOLDERS[verb](zoo, tmp_path / "out", overwrite)
            assert tree(tmp_path) == before, verb


def test_a_file_that_is_taken_away_while_it_is_written(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not take its place without it."""
    from peft_subspace.merging.files import OutputFiles

    close = OutputFiles.close

    def taken(self: OutputFiles) -> Any:
        (self.folder / "model.safetensors").unlink()
        return close(self)

    old = merge(zoo / "recipe.yaml", tmp_path / "out")
    before = contents(old)
    monkeypatch.setattr(OutputFiles, "close", taken)
    with pytest.raises(OutputError, match=r"model\.safetensors: was removed while it was written"):
        merge(zoo / "recipe.yaml", tmp_path / "out", overwrite=True)
    assert contents(old) == before


CALLS = ("rename", "mkdir", "rmdir", "unlink")  # tests/merging/crashes.py has the rest


def _killed_at(point: int, action: Callable[[], Any]) -> int:
    """Do something in a forked process that ends by SIGKILL before its system call of this number; its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = [0]

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    output_folder.exchange = wrapped(output_folder.exchange)
    end = os._exit
    try:
        action()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        end(1)
    end(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("at_once", [True, False], ids=["one step", "two renames"])
@pytest.mark.parametrize("verb", ["merge", "extract"])
def test_killed_at_any_point_of_a_replacement(
    verb: str, at_once: bool, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old result or the new one is there, or, where the system cannot exchange two folders, comes back with the next run.

    Whatever is left is cleared by the next run, and other files beside the result stay.
    """
    if not at_once:
        monkeypatch.setattr(output_folder, "_exchange_at_once", lambda new, old: False)
    work = tmp_path / "work"
    FOLDERS[verb](zoo, work / "expected", False)
    new = contents(work / "expected")
    shutil.rmtree(work / "expected")
    merge({**recipe(zoo), "models": recipe(zoo)["models"][:1]}, work / "old")
    old = contents(work / "old")
    _folder(work, "thesis.tex", "out.d/notes", "out.partial.d")
    point, gap = 0, 0
    while True:
        point += 1
        shutil.copytree(work / "old", work / "out")
        status = _killed_at(point, lambda: FOLDERS[verb](zoo, work / "out", True))
        assert status in (0, signal.SIGKILL)
        there = contents(work / "out") if (work / "out").exists() else None
        gap += there is None
        assert there in ((old, new) if at_once else (old, new, None)), point
        if status == 0:
            break
        if verb == "merge":
            merge(zoo / "recipe.yaml", work / "out", resume=True, overwrite=True)
        else:
            FOLDERS[verb](zoo, work / "out", True)
        assert contents(work / "out") == new
        litter = [name for name in os.listdir(work) if name not in ("old", "out", "thesis.tex", "out.d", "out.partial.d")]
        assert not [name for name in litter if not name.startswith(".")], point
        shutil.rmtree(work / "out")
    assert point > 8
    assert gap == (0 if at_once else 1)
    assert contents(work / "old") == old
    assert (work / "out.d" / "notes").read_text() == "mine"


def test_what_cannot_be_put_in_place_stays_beside_it(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = merge(zoo / "recipe.yaml", tmp_path / "out")
    before = contents(old)

    def refuses(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(output_folder, "exchange", refuses)
    with pytest.raises(OutputError, match=r"cannot be put in place of .*: Device or resource busy"):
        merge(zoo / "recipe.yaml", tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert contents(old) == before
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    merge(zoo / "recipe.yaml", tmp_path / "out", resume=True, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "zoo"]


def test_a_killed_merge_leaves_no_hidden_folder(zoo: Path, tmp_path: Path) -> None:
    """Aligned models lie in the unfinished result, and go with it."""
    for seed in (1, 2):
        MODELS["llama"].model(seed=seed).save_pretrained(zoo / f"llama{seed}")
    table = {**recipe(zoo, "linear", ["llama1", "llama2"]), "subspace": {"align": "weight_matching", "base_check": "off"}}
    table["base_model"] = str(zoo / "llama")
    point = 0
    while True:
        point += 1
        status = _killed_at(point, lambda: merge(table, tmp_path / "out"))
        assert {path.name for path in tmp_path.iterdir()} <= {"zoo", "out", "out.partial", "out.partial.journal"}, point
        if status == 0:
            break
        merge(table, tmp_path / "out", resume=True)
        assert sorted(os.listdir(tmp_path)) == ["out", "zoo"]
        shutil.rmtree(tmp_path / "out")
    assert point > 10


def test_a_file_system_without_locks_is_warned_of(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre and NFS are mounted in places."""

    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    with pytest.warns(UserWarning, match=r"out\.partial\.journal: this file system has no locks"):
        merge(zoo / "recipe.yaml", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "zoo"]
