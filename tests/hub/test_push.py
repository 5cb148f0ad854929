"""An adapter goes to a Hub and comes back in another process: over HTTP, by the real client."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hub.server import LocalHub
from tests.processes import run_python

TOKEN = "push-test"

# Two processes for everything: the client reads its settings when it is imported, and importing PEFT takes seconds.
PUSH = """
import sys
import pytest, torch, peft_subspace
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import get_peft_model
from tests.pico import MODELS, output, train
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

bert, results = MODELS["bert"], {}
bert.model().push_to_hub("user/base")
base = AutoModelForSequenceClassification.from_pretrained("user/base")
model = get_peft_model(base, peft_subspace.FloraConfig(r=2, metrics={"accuracy": 0.5}, **bert.targets))
train(model, bert.batch())
model.push_to_hub("adapter", commit_message="The first")
results["first"] = output(model, bert.batch()).detach()
HfApi().create_tag("user/adapter", tag="v1")

train(model, bert.batch())
model.peft_config["default"].metrics = {"accuracy": 0.75}
model.push_to_hub("user/adapter", commit_message="The second")
results["second"] = output(model, bert.batch()).detach()
titles = [commit.title for commit in HfApi().list_repo_commits("user/adapter")]
assert titles == ["The second", "The first", "initial commit"], titles
model.push_to_hub("user/adapter")
assert len(HfApi().list_repo_commits("user/adapter")) == 3, "an unchanged adapter must not be another commit"

args = TrainingArguments(sys.argv[2], hub_model_id="user/trained", use_cpu=True, report_to=[])
Trainer(model, args).push_to_hub()

from tests.pools import vector_of, write_vector
bare = AutoModelForSequenceClassification.from_pretrained("user/base").eval()
pool = {"task": write_vector(sys.argv[2] + "-task.safetensors", vector_of(bare, 0))}
composed = get_peft_model(bare, peft_subspace.AtlasConfig(pool=pool, init=0.5, bundle_vectors=True))
composed.push_to_hub("user/bundle")
results["bundle"] = output(composed, bert.batch()).detach()
import os
os.remove(pool["task"])

model.push_to_hub("user/branches", revision="experiment")
files = set(HfApi().list_repo_files("user/branches", revision="experiment"))
assert files == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}, files
assert HfApi().list_repo_files("user/branches") == [".gitattributes"]

# Three that cannot be loaded, for the other process
weights = open(HfApi().hf_hub_download("user/adapter", "adapter_model.safetensors"), "rb").read()
config = HfApi().hf_hub_download("user/adapter", "adapter_config.json")
from safetensors.torch import load, save
tensors = load(weights)
for repo, content in {
    "user/cut": weights[:-1],
    "user/no-head": save({key: tensor for key, tensor in tensors.items() if "classifier.bias" not in key}),
    "user/no-core": save({key: tensor for key, tensor in tensors.items() if "layer.1.attention.self.query" not in key}),
}.items():
    HfApi().create_repo(repo)
    HfApi().upload_file(path_or_fileobj=config, path_in_repo="adapter_config.json", repo_id=repo)
    HfApi().upload_file(path_or_fileobj=content, path_in_repo="adapter_model.safetensors", repo_id=repo)

with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
    model.push_to_hub("user/adapter", token="not-the-token")
with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
    model.push_to_hub("user/refused", token="not-the-token")
with pytest.raises(RepositoryNotFoundError):
    HfApi().repo_info("user/refused")
torch.save(results, sys.argv[1])
"""

LOAD = """
import re, sys
import pytest, torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from tests.base.snapshot import unchanged
from tests.pico import MODELS, output

# As the card says
card = ModelCard.load("user/adapter")
assert card.data.base_model == "user/base" and "flora" in card.data.tags and "| accuracy | 0.75 |" in card.text
(snippet,) = re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL)
assert "[More Information Needed]" not in card.text
old = open(HfApi().hf_hub_download("user/adapter", "README.md", revision="v1")).read()
assert "| accuracy | 0.5 |" in old
trained = ModelCard.load("user/trained").text
assert "| accuracy | 0.75 |" in trained and "## Training procedure" in trained, trained
exec(snippet.replace("this-repository", "user/adapter"))
assert type(model.base_model).__name__ == "FloraModel"

bert = MODELS["bert"]
from transformers import AutoModelForSequenceClassification
base = lambda: AutoModelForSequenceClassification.from_pretrained("user/base")
first = PeftModel.from_pretrained(base(), "user/adapter", revision="v1")
results = {"second": output(model, bert.batch()).detach(), "first": output(first, bert.batch()).detach()}
bundle = PeftModel.from_pretrained(base(), "user/bundle").eval()
results["bundle"] = output(bundle, bert.batch()).detach()
assert "bundled in `vectors/`" in ModelCard.load("user/bundle").text
branch = PeftModel.from_pretrained(base(), "user/branches", revision="experiment")
assert torch.equal(output(branch, bert.batch()), results["second"])
assert first.peft_config["default"].metrics == {"accuracy": 0.5}
commit = HfApi().list_repo_refs("user/adapter").tags[0].target_commit
first.load_adapter("user/adapter", "pinned", revision=commit)
first.set_adapter("pinned")
assert torch.equal(output(first, bert.batch()), results["first"])

# By transformers alone, and for training
automatic = AutoModelForSequenceClassification.from_pretrained("user/adapter")
assert torch.equal(output(automatic.eval(), bert.batch()), results["second"])

for repo, message in {
    "user/none": "'user/none'",
    "user/branches": "adapter_config.json.*'user/branches'",  # its main branch is empty
    "user/cut": "cut short or damaged.*the model was not changed",
    "user/no-head": "1 missing: classifier.bias.*was left as it was",
    "user/no-core": "3 missing: .*layer.1.attention.self.query.*was left as it was",
}.items():
    fresh = base()
    with unchanged(fresh, bert.batch()), pytest.raises(ValueError, match=f"(?s){message}"):
        PeftModel.from_pretrained(fresh, repo)
with pytest.raises(ValueError, match="'user/adapter'"):
    PeftModel.from_pretrained(base(), "user/adapter", revision="none")
torch.save(results, sys.argv[1])
"""


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "hub", {TOKEN})


def test_push_and_load(hub: LocalHub, tmp_path: Path) -> None:
    with hub:
        run_python(PUSH, tmp_path / "pushed", tmp_path / "trainer", **hub.environment(tmp_path / "home", TOKEN))
        run_python(LOAD, tmp_path / "loaded", **hub.environment(tmp_path / "another-home"))
    pushed, loaded = torch.load(tmp_path / "pushed"), torch.load(tmp_path / "loaded")
    assert set(pushed) == set(loaded) == {"first", "second", "bundle"}
    assert not torch.equal(pushed["first"], pushed["second"])
    for name, expected in pushed.items():
        assert torch.equal(loaded[name], expected), name
