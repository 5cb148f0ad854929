"""Pico models: real architectures and single layers with random weights, built in milliseconds, for every test.

`MODELS` are whole models that train; `LAYERS` has one entry for every way in which a layer can hold or use a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

SAMPLES = 4


@dataclass(frozen=True, eq=False)  # one is another even if it is built alike: a pool belongs to one
class Pico:
    """A model, a batch of four samples for it, and the config fields that say what of it is adapted."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """In eval mode and frozen: torch picks other kernels, which round otherwise, for weights that need a gradient."""
        torch.manual_seed(seed)
        return self.build().to(dtype).eval().requires_grad_(False)

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model; floats in `dtype`."""
        torch.manual_seed(seed)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs().items()}


def output(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """The logits, or whatever else a model computes first."""
    result = model(**batch, **kwargs)
    if isinstance(result, tf.utils.ModelOutput):
        return result.logits
    return result[0] if isinstance(result, tuple) else result


def run(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """`output` without gradients."""
    with torch.no_grad():
        return output(model, batch, **kwargs)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Squared distance to a fixed random target: every architecture has it."""
    found = output(model, batch)
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return (found.float() - target).square().mean()


def train(model: nn.Module, batch: dict[str, Any], steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few steps of Adam on everything trainable; the losses. Leaves the model in eval mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    model.eval()
    return losses


# Plain torch models ------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two hidden layers and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class ConvNet(nn.Module):
    """Convolutions with stride, groups and a depthwise one; BatchNorm between them if asked."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x))))
        return self.head(self.pointwise(x).mean((2, 3)))


class Attention(nn.Module):
    """nn.MultiheadAttention on `[batch, length, 8]`, whatever layout it wants inside, with a mask per sample."""

    def __init__(self, batch_first: bool = True, memory: int = 8) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=memory, vdim=memory)
        self.head = nn.Linear(8, 4)
        self.memory = memory

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) >= lengths[:, None]
        memory = x.repeat(1, 1, self.memory // 8)
        if not self.attention.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        out = self.attention(x, memory, memory, key_padding_mask=mask)[0]
        return self.head(out if self.attention.batch_first else out.transpose(0, 1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, which takes a fused path past its children in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# Models of transformers --------------------------------------------------------------------------------------------------

VOCABULARY, WIDTH = 48, 16
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,  # wide enough that an update can be seen in the output
}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "use_cache": False}


def _llama(tied: bool = False) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER, tie_word_embeddings=tied))


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def _bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.BertForSequenceClassification(tf.BertConfig(**_COMMON, **dropout, max_position_embeddings=32, num_labels=4))


def _vit() -> nn.Module:
    config = {k: v for k, v in _COMMON.items() if k != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(**config, image_size=8, patch_size=4, num_labels=4))


def _resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, num_labels=4))


def _t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False))


def _moe() -> nn.Module:
    """Llama4: fused stacks of experts, and a router that is an nn.Linear with a forward of its own."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [0], "intermediate_size_mlp": 32}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**_DECODER, **experts, "head_dim": 8, "attention_chunk_size": 32}))


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (SAMPLES, 6))}


def _images(size: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, size, size)}


def _x(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, *shape)}


def _seq2seq() -> dict[str, Tensor]:
    return {**_ids(), "decoder_input_ids": torch.randint(1, VOCABULARY, (SAMPLES, 5))}


def _sequence() -> dict[str, Tensor]:
    return {**_x(5, 8), "lengths": torch.tensor([5, 3, 4, 2])}


CONV_TARGETS = {"target_modules": ["stem", "depthwise", "grouped", "pointwise"]}
MODELS: dict[str, Pico] = {
    "mlp": Pico(Mlp, partial(_x, 8), {"target_modules": ["first", "second"]}),
    "conv": Pico(ConvNet, partial(_x, 3, 8, 8), CONV_TARGETS),
    "batch norm": Pico(partial(ConvNet, True), partial(_x, 3, 8, 8), CONV_TARGETS),
    "mha": Pico(Attention, _sequence, {"target_modules": ["attention"]}),
    "mha, batch second": Pico(partial(Attention, False), _sequence, {"target_modules": ["attention"]}),
    "mha, other keys": Pico(partial(Attention, True, 16), _sequence, {"target_modules": ["attention"]}),
    "encoder": Pico(Encoder, partial(_x, 5, 8), {"target_modules": ["self_attn", "linear1", "linear2"]}),
    "llama": Pico(_llama, _ids, {"target_modules": "all-linear"}),
    "llama, tied": Pico(partial(_llama, True), _ids, {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": Pico(_gpt2, _ids, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "bert": Pico(_bert, _ids, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "vit": Pico(_vit, _images, {"target_modules": ["all-linear", "all-conv"]}),
    "resnet": Pico(_resnet, partial(_images, 16), {"target_modules": "all-conv", "modules_to_save": ["classifier.1"]}),
    "t5": Pico(_t5, _seq2seq, {"target_modules": ["q", "v", "wo"]}),
    "moe": Pico(
        _moe,
        _ids,
        {"target_modules": ["q_proj", "router"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


# Single layers -----------------------------------------------------------------------------------------------------------


class Single(nn.Module):
    """One layer called `layer`, and the first tensor that it returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        result = self.layer(x, **kwargs)
        return result[0] if isinstance(result, tuple) else result


class StandardizedConv(nn.Conv2d):
    """A convolution with a forward of its own, as in ResNet-v2 (BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Bare(nn.Module):
    """Parameters that belong to no layer: a stack of experts, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gain = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x * self.gain, self.experts)


def _router() -> nn.Module:
    config = tf.Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    return Llama4Router(config)


def _tokens() -> dict[str, Tensor]:
    return {"x": torch.tensor([[3, 1, 4, 0], [1, 5, 9, 2], [0, 0, 6, 5], [3, 5, 8, 9]])}  # 0 is the padding


def _layer(make: Callable[..., nn.Module], *args: Any, x: tuple[int, ...] = (6, 9, 9), **kwargs: Any) -> Pico:
    return Pico(lambda: Single(make(*args, **kwargs)), partial(_x, *x), {"target_modules": ["layer"]})


def _embedding(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Pico:
    return Pico(lambda: Single(make(*args, **kwargs)), _tokens, {"target_modules": ["layer"]})


LAYERS: dict[str, Pico] = {
    "linear": _layer(nn.Linear, 8, 6, x=(8,)),
    "linear, sequence": _layer(nn.Linear, 8, 6, x=(5, 8)),
    "linear, no bias": _layer(nn.Linear, 8, 6, bias=False, x=(8,)),
    "Conv1D": _layer(Conv1D, 6, 8, x=(5, 8)),
    "router": _layer(_router, x=(8,)),
    "embedding": _embedding(nn.Embedding, 10, 8),
    "embedding, padding_idx": _embedding(nn.Embedding, 10, 8, padding_idx=0),
    "embedding, scaled": _embedding(Gemma3TextScaledWordEmbedding, 10, 8, padding_idx=0, embed_scale=4.0),
    "embedding, scaled by one": _embedding(Gemma3TextScaledWordEmbedding, 10, 8, padding_idx=0, embed_scale=1.0),
    "experts": Pico(lambda: Single(Bare()), partial(_x, 6), {"target_parameters": ["layer.experts", "layer.gain"]}),
    "conv, own forward": _layer(StandardizedConv, 6, 8, 3, padding=1),
    "conv1d": _layer(nn.Conv1d, 6, 8, 3, x=(6, 9)),
    "conv2d": _layer(nn.Conv2d, 6, 8, 3, padding=1),
    "conv3d": _layer(nn.Conv3d, 6, 8, 3, padding=1, x=(6, 5, 5, 5)),
    "conv, rectangular": _layer(nn.Conv2d, 6, 8, (3, 5), stride=(1, 2), padding=(1, 2)),
    "conv, stride": _layer(nn.Conv2d, 6, 8, 3, stride=2, padding=1),
    "conv, patches": _layer(nn.Conv2d, 3, 8, 4, stride=4, x=(3, 8, 8)),
    "conv, dilation": _layer(nn.Conv2d, 6, 8, 3, dilation=2, padding=2),
    "conv, valid": _layer(nn.Conv2d, 6, 8, 3, padding="valid"),
    "conv, same": _layer(nn.Conv2d, 6, 8, 3, padding="same", dilation=2),
    "conv, same, even": _layer(nn.Conv2d, 6, 8, (4, 3), padding="same"),
    "conv, same, even, reflect": _layer(nn.Conv2d, 6, 8, (4, 3), padding="same", padding_mode="reflect"),
    **{
        f"conv{n}d, {mode}": _layer(conv, 6, 8, 3, padding=2, padding_mode=mode, stride=2, x=(6, *[5] * n))
        for n, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
        for mode in ("reflect", "replicate", "circular")
    },
    "conv, groups": _layer(nn.Conv2d, 6, 8, 3, padding=1, groups=2),
    "conv, groups, reflect": _layer(nn.Conv2d, 6, 8, 3, padding=1, groups=2, padding_mode="reflect", stride=2),
    "conv, depthwise": _layer(nn.Conv2d, 6, 6, 3, padding=1, groups=6),
    "conv, depthwise, wider": _layer(nn.Conv2d, 6, 12, 3, padding=1, groups=6),
    "conv, pointwise": _layer(nn.Conv2d, 6, 8, 1),
    "conv, pointwise, stride": _layer(nn.Conv2d, 6, 8, 1, stride=2),
    "conv, pointwise, groups": _layer(nn.Conv2d, 6, 8, 1, groups=2, stride=2),
    "conv, pointwise, padding": _layer(nn.Conv2d, 6, 8, 1, padding=1, stride=2),
    "transposed1d": _layer(nn.ConvTranspose1d, 6, 8, 3, stride=2, x=(6, 9)),
    "transposed2d": _layer(nn.ConvTranspose2d, 6, 8, 3, stride=2, padding=1, output_padding=1),
    "transposed3d": _layer(nn.ConvTranspose3d, 6, 8, 3, stride=2, dilation=2, x=(6, 3, 3, 3)),
    "transposed, groups": _layer(nn.ConvTranspose2d, 6, 8, 3, stride=2, padding=1, groups=2),
    "transposed, depthwise": _layer(nn.ConvTranspose2d, 6, 6, 3, groups=6),
    "transposed, pointwise": _layer(nn.ConvTranspose2d, 6, 8, 1),
}
