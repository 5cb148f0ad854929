"""Run PEFT's own, unedited test-suite against the configs in cases.py: python tests/conformance/run.py [pytest arguments]

The tests come from the source distribution of the installed PEFT, so that they always match it. They are kept in a cache
folder (`PEFT_CONFORMANCE_CACHE`, default `~/.cache/peft_subspace/conformance`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_target_parameters",
    "test_config",
)


def fetch_tests(cache: Path) -> Path:
    """The tests folder of the installed PEFT's source distribution, downloaded once; written aside and renamed when whole."""
    release = version("peft")
    folder = cache / f"peft-{release}" / "tests"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-binary", ":all:", "--no-deps", "-d", scratch, f"peft=={release}"], check=True)
        archive = next(Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        source = Path(scratch) / f"peft-{release}"
        (source / "tests" / "__init__.py").touch()  # the archive leaves it out
        (source / "tests" / "conftest.py").unlink(missing_ok=True)  # only adds an option and turns warnings into errors
        shutil.rmtree(cache / f"peft-{release}", ignore_errors=True)
        os.replace(source, cache / f"peft-{release}")
    return folder


def main() -> int:
    """Make the models, run the tests, return pytest's exit code."""
    cache = Path(os.environ.get("PEFT_CONFORMANCE_CACHE", Path.home() / ".cache/peft_subspace/conformance"))
    tests, models = fetch_tests(cache), cache / "models"
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": paths.rstrip(os.pathsep),
    }
    subprocess.run([sys.executable, str(HERE / "make_models.py"), str(models)], check=True, env=environment)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_conformance", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(tests.parent), "-W", "ignore"]
    command += ["--peft-cases", str(HERE / "cases.py"), "--peft-models", str(models)]
    command += [str(tests / f"{name}.py") for name in FILES] + sys.argv[1:]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
