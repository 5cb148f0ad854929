"""Merge a fine-tuned model and adapters by the recipes beside this script, verify, inspect, and load the results.

    python examples/merging/merge_adapters.py

The models are tiny and random, so that it runs anywhere in seconds; put your own names into the recipes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_subspace.merging import merge, verify
from peft_subspace.task_vectors.task_vector import TaskVector

RECIPES = Path(__file__).resolve().parent


def make_models() -> None:
    """`base`, the fine-tuned `math`, and two LoRA adapters, in the current folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    base.save_pretrained("base")
    for parameter in base.parameters():
        parameter.data += 0.002 * torch.randn_like(parameter)
    base.save_pretrained("math")
    for name, rank in (("code-lora", 4), ("chat-lora", 8)):
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).save_pretrained(name)


def main() -> None:
    """Do it all in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_models()
        for recipe in ("ties", "gradient", "subtract"):
            out = merge(RECIPES / f"{recipe}.yaml", f"merged-{recipe}")
            print(recipe, "verified:", verify(out).bytes, "bytes")
            AutoModelForCausalLM.from_pretrained(out)
        adapter = merge(RECIPES / "adapter.yaml", "merged-adapter")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter)
        code, chat, both = (TaskVector.open(name, "base") for name in ("code-lora", "chat-lora", adapter))
        print(f"cosine of the merged adapter with code {both.cosine(code):.3f}, with chat {both.cosine(chat):.3f}")
        print(f"left out by rank 8: {(both - (0.7 * code + 0.5 * chat)).norm() / both.norm():.1%} of the norm")
        os.chdir(RECIPES)  # the temporary folder goes


if __name__ == "__main__":
    main()
