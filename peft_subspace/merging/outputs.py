"""What a merged model has beside its weights: config, tokenizer, recipe and card. Needs no torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..task_vectors.blueprint import blueprint
from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.headers import FLOAT_DTYPES, refuse_pointer
from ..task_vectors.models import Source
from ..task_vectors.references import HUB_ID, Reference, locate
from ..task_vectors.sources import read_json
from .files import write_new
from .plan import Plan
from .recipe import Recipe

RECIPE_FILE = "merge_recipe.yaml"
CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
MAX_SMALL_FILE = 200 * 2**20
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def side_files(plan: Plan) -> dict[str, bytes]:
    """Name -> content of all files of a merged model but its weights and the manifest.

    Raises:
        InputError: the models have different tokenizers and the recipe does not say whose to take.
    """
    reference = plan.reference.full
    assert reference is not None
    files: dict[str, bytes] = {}
    for name in CONFIGS:
        if (reference.folder / name).is_file():
            files[name] = _small(reference.folder / name)
    if "config.json" in files:
        files["config.json"] = _config(read_json(reference.folder / "config.json"), plan)
    files.update(tokenizer_files(plan.recipe, plan.base, plan.sources))
    if plan.layout.index is not None:
        files["model.safetensors.index.json"] = plan.layout.index
    files[RECIPE_FILE] = plan.recipe.to_yaml().encode()
    files["README.md"] = card(plan).encode()
    return files


def write_side_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write them all."""
    for name, content in files.items():
        write_new(folder / name, content)


def _small(path: Path) -> bytes:
    refuse_pointer(path)
    if path.stat().st_size > MAX_SMALL_FILE:
        raise InputError(f"{path}: has {path.stat().st_size:,} bytes, too many for such a file.")
    return path.read_bytes()


def _config(config: dict[str, Any], plan: Plan) -> bytes:
    """The base's config with the result's dtype."""
    dtype = plan.recipe.out_dtype or plan.recipe.dtype
    if dtype is None:
        codes = Counter[str]()
        for tensor in plan.tensors:
            codes[tensor.dtype] += tensor.nbytes
        most = codes.most_common(1)[0][0]
        dtype = next((name for name, code in FLOAT_DTYPES.items() if code == most), None)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    config.pop("_name_or_path", None)
    if plan.untied:
        _untie(config)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _untie(config: dict[str, Any]) -> None:
    """Say that the output has weights of its own, also in the configs of a model's parts.

    A class that computes otherwise with untied weights, as T5 does, keeps its config: transformers does not tie what a file
    has with different values.
    """
    found = blueprint(config)
    if found is not None and found.computes_by_tie:
        return
    config["tie_word_embeddings"] = False
    for inner in config.values():
        if isinstance(inner, dict) and "tie_word_embeddings" in inner:
            inner["tie_word_embeddings"] = False


def tokenizer_files(recipe: Recipe, base: Source | None, sources: Sequence[Source]) -> dict[str, bytes]:
    """Name -> content of the files of the tokenizer, with the chat template.

    Raises:
        RecipeError: `tokenizer_source` or `chat_template` says something that is not known.
        InputError: a model that is not there, or models with different tokens, and the recipe does not say whose to take.
    """
    source = recipe.tokenizer_source
    folders = {str(s.reference): s.full.folder for s in [base, *sources] if s is not None and s.full is not None}
    if source == "union":
        raise RecipeError(
            "tokenizer_source: union is not supported: row i of an embedding is merged with row i. Accepted: base, or a "
            "model's name; put models with other tokens on one tokenizer first."
        )
    if source in (None, "base"):
        full = (base or sources[0]).full
        chosen = full.folder if full else Path()
    elif source in folders:
        chosen = folders[source]
    else:
        reference = Reference.parse(source)
        chosen, _ = locate(reference.model, reference.revision)
    files = {name: _small(chosen / name) for name in TOKENIZER_FILES if (chosen / name).is_file()}
    if source is None:
        _check_vocabularies(chosen, folders)
    template = _chat_template(recipe.chat_template, list(folders.values()))
    if template is not None:
        _set_template(files, template)
    return files


def _check_vocabularies(chosen: Path, folders: dict[str, Path]) -> None:
    """The same rows of an embedding must be the same tokens."""
    ours = _vocabulary(chosen)
    for name, folder in folders.items():
        theirs = _vocabulary(folder) if folder != chosen else ours
        if ours is not None and theirs is not None and ours != theirs:
            different = ", ".join(repr(token) for token in sorted(dict(ours.items() ^ theirs.items()))[:5])
            raise InputError(
                f"{name}: its tokenizer has other tokens than that of {chosen.name} (such as {different}): rows of "
                f"the embeddings mean different things. Write `tokenizer_source: base` (or a model's name) if that is meant."
            )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    table = read_json(folder / "tokenizer.json")
    vocabulary = (table.get("model") or {}).get("vocab")
    found = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if isinstance(vocabulary, list):  # unigram models: [token, score] by number
        found = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    for token in table.get("added_tokens") or []:
        found[str(token.get("content"))] = token.get("id")
    return found


def _chat_template(choice: str | None, folders: list[Path]) -> str | None:
    if choice is None:
        return None
    if choice == "chatml":
        return CHATML
    if choice == "auto":  # what most of the models have
        found = Counter(template for folder in folders if (template := _own_template(folder)) is not None)
        return found.most_common(1)[0][0] if found else None
    if "{" not in choice:
        raise RecipeError(f"chat_template: {choice!r} is not known. Accepted: auto, chatml, or a Jinja template.")
    return choice


def _own_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "tokenizer_config.json").is_file():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _set_template(files: dict[str, bytes], template: str) -> None:
    """In a file of its own, which transformers prefers, and not in the tokenizer's config as well."""
    files["chat_template.jinja"] = template.encode()
    if "tokenizer_config.json" in files:
        table = json.loads(files["tokenizer_config.json"])
        table.pop("chat_template", None)
        files["tokenizer_config.json"] = json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"


def card(plan: Plan, kind: str = "model") -> str:
    """The README.md: what was merged, how, and the recipe."""
    recipe = plan.recipe
    models = [recipe.base_model, *(entry.model for entry in recipe.merged_models)]
    ids = list(dict.fromkeys(m.model for m in models if m is not None and is_hub_id(m.model)))
    data = ["---", "library_name: " + ("transformers" if kind == "model" else "peft"), "tags:", "- merge", "- peft-subspace"]
    if ids:
        data += ["base_model:", *(f"- {json.dumps(name)}" for name in ids)]
    rows = [
        ("Method", f"`{recipe.merge_method}`" + (f" ({plan.method.reference})" if plan.method.reference else "")),
        ("Base", f"`{_label(recipe.base_model)}`" if recipe.base_model else "none"),
        *(("Model", f"`{_label(entry.model)}`") for entry in recipe.merged_models),
        *([("Learned", f"`{_label(recipe.subspace.learned)}`")] if recipe.subspace.learned else []),
        *([("Mask", f"`{_label(recipe.subspace.mask)}`")] if recipe.subspace.mask else []),
        ("Semantics", recipe.subspace.semantics),
        ("Seed", str(recipe.subspace.seed)),
        ("Made with", f"peft_subspace {__version__}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    title = {"model": "Merged model", "adapter": "Merged adapter", "task_vector": "Task vector"}[kind]
    notes = "".join(f"- {note}\n" for note in plan.notes)
    return "\n".join(data) + (
        f"\n---\n\n# {title}\n\n| | |\n| --- | --- |\n{table}\n\n"
        + (f"{notes}\n" if notes else "")
        + f"`{RECIPE_FILE}` holds the recipe, `merge_manifest.json` the hashes of all inputs and outputs; "
        f"`peft-subspace verify` compares them.\n\n```yaml\n{recipe.to_yaml()}```\n"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is a Hub id and no local folder."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def _label(reference: Reference | None) -> str:
    """A name that may be published: Hub ids as they are, of local folders the last part."""
    if reference is None:
        return ""
    parts = [(reference.model, reference.revision), (reference.lora, reference.lora_revision)]
    shown = [(name if is_hub_id(name) else os.path.basename(name.rstrip("/")), revision) for name, revision in parts if name]
    return "+".join(f"{name}@{revision}" if revision else name for name, revision in shown)
