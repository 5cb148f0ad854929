"""Learned merges of models on a Hub: a dry run has their headers alone, and a bundle needs no other place."""

from __future__ import annotations

from pathlib import Path

from tests.hub.server import LocalHub
from tests.processes import run_python

PUSH = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import LlamaForCausalLM
import peft_subspace
from tests.merging.test_learned import fine_tuned
from tests.pico import MODELS
folder = Path(sys.argv[1])
MODELS["llama"].model().push_to_hub("user/base")
fine_tuned(MODELS["llama"].model(), 1).push_to_hub("user/task")
for name, bundled in (("user/coefficients", False), ("user/bundle", True)):
    base = LlamaForCausalLM.from_pretrained("user/base")
    config = peft_subspace.AtlasConfig(pool={"task": "user/task"}, base="user/base", init=0.5, bundle_vectors=bundled)
    get_peft_model(base, config).push_to_hub(name)
"""

MERGE = """
import os, sys
from pathlib import Path
from huggingface_hub import HfApi
from peft_subspace.cli.app import run
folder = Path(sys.argv[1])
folder.mkdir()
cache = Path(os.environ["HF_HUB_CACHE"])
for name in ("coefficients", "bundle"):
    recipe = folder / f"{name}.yaml"
    recipe.write_text(f"merge_method: atlas\\nsubspace: {{learned: user/{name}}}\\n")
    assert run(["merge", str(recipe), "--dry-run"]) == 0
    assert not list(cache.rglob("*.safetensors")), "a dry run downloads no weights"
listed = folder / "listed.yaml"
listed.write_text((folder / "coefficients.yaml").read_text() + "base_model: user/base\\nmodels: [{model: user/task}]\\n")
assert run(["merge", str(listed), "--dry-run"]) == 0
assert run(["merge", str(folder / "coefficients.yaml"), str(folder / "pool"), "--quiet"]) == 0
HfApi(token="learned-test").delete_repo("user/task")
assert run(["merge", str(folder / "bundle.yaml"), str(folder / "bundle"), "--quiet"]) == 0
weights = [(folder / name / "model.safetensors").read_bytes() for name in ("pool", "bundle")]
assert weights[0] == weights[1]
print("done")
"""


def test_dry_runs_and_bundles_of_learned_merges(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub", {"learned-test"}) as hub:
        run_python(PUSH, tmp_path / "pushed", **hub.environment(tmp_path / "home", "learned-test"))
        assert run_python(MERGE, tmp_path / "merged", **hub.environment(tmp_path / "other-home")).endswith("done\n")
