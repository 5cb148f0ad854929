"""Small random models with tied weights, of many families of transformers, and what is computed with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_OPT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip

# How each is made; a layer that LoRA adapts beside the embedding and the head.
TIED: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
        "q_proj",
    ),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8)), "q_proj"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT, bos_token_id=1, eos_token_id=2)), "c_attn"),
    "mamba": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "x_proj",
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)), "query"),
    "albert": (lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**_SIZES, embedding_size=16)), "query"),
    "distilbert": (lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(**_DISTILBERT)), "q_lin"),
    "electra": (lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**_SIZES, embedding_size=32)), "query"),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        "q",
    ),
    "umt5": (
        lambda: tf.UMT5ForConditionalGeneration(
            tf.UMT5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=True)
        ),
        "q",
    ),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)), "q_proj"),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)), "q_proj"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
        "query_key_value",
    ),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_SIZES)), "query"),
    "modernbert": (lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**_SIZES, pad_token_id=0)), "Wqkv"),
}
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))


def save(name: str, folder: Path) -> Any:
    """Make a model of a family, write it by transformers, and return it."""
    torch.manual_seed(0)
    model = TIED[name][0]().eval()
    assert model.all_tied_weights_keys
    model.save_pretrained(folder)
    return model


def load(name: str, folder: Path) -> Any:
    """Load a model of a family by transformers, which must find all tensors and no others."""
    kind = type(TIED[name][0]())
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def embedding_and_head(model: Any) -> tuple[str, str]:
    """Names of the modules of the input embedding and of the output head."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    first, second = (next(name for name, one in model.named_modules() if one is module) for module in both)
    return first, second


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model computes for the same ids."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **more).logits


@torch.no_grad()
def trained(model: Any, size: float = 0.3) -> Any:
    """Stands for training: moves everything that is trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())
