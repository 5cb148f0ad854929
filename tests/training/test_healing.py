"""Distillation and the healing objective: one input for both passes, a teacher that is really the original, DDP, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_subspace import PelaConfig
from peft_subspace.training import (
    Healing,
    HealingTrainer,
    as_teacher,
    feature_distillation,
    find_blocks,
    perturbation_penalty,
    recorded_features,
)
from tests.flows.test_trainer import arguments_for, examples
from tests.pico import MODELS, run, train

pytestmark = pytest.mark.filterwarnings("ignore:PELA leaves .* layers dense")


def compressed(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    pico = MODELS[name]
    torch.manual_seed(1)
    return get_peft_model(pico.model(dtype), PelaConfig(**{"r": 2, **pico.targets, **fields}))


def labelled(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch = MODELS[name].batch(dtype)
    labels = batch["input_ids"] if name in ("llama", "gpt2") else torch.tensor([0, 1, 2, 3])
    return {**batch, "labels": batch["decoder_input_ids"] if name == "t5" else labels}


# Features ----------------------------------------------------------------------------------------------------------------


def test_the_distance_of_features() -> None:
    student, teacher = ([torch.randn(2, 5, 8) for _ in range(3)] for _ in range(2))
    plain = sum((a - b).square().mean() for a, b in zip(student, teacher, strict=True)) / 3
    torch.testing.assert_close(feature_distillation(student, teacher), plain)
    weighted = sum(w * (a - b).square().mean() for w, a, b in zip((1.0, 0.0, 2.0), student, teacher, strict=True))
    torch.testing.assert_close(feature_distillation(student, teacher, layer_weights=[1.0, 0.0, 2.0]), weighted)


def test_padding_does_not_count() -> None:
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = feature_distillation([student], [teacher], mask)
    real = (student - teacher)[mask.bool()].square().mean()
    torch.testing.assert_close(loss, real)
    loss.backward()
    assert not student.grad[0, 3:].any()
    assert teacher.grad is None, "no gradient reaches the teacher"
    image = [torch.randn(2, 8, 4, 4)]  # no tokens: the mask has other axes
    torch.testing.assert_close(feature_distillation(image, [image[0] + 1], mask), torch.tensor(1.0))


def test_normalised_features() -> None:
    features = torch.randn(2, 5, 8)
    for normalize in ("layernorm", "cosine"):
        assert float(feature_distillation([features], [3 * features], normalize=normalize)) < 1e-10  # type: ignore[arg-type]
    other = torch.randn(2, 5, 8)
    cosine = torch.cosine_similarity(features, other, dim=-1)
    found = feature_distillation([features], [other], normalize="cosine")
    torch.testing.assert_close(found, (2 - 2 * cosine).mean() / 8)


def test_features_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 features of the student and 1 of the teacher"):
        feature_distillation([torch.zeros(1)] * 2, [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"feature 0: the student's is \[2\], the teacher's \[3\]"):
        feature_distillation([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="2 layer_weights for 1 layers"):
        feature_distillation([torch.zeros(2)], [torch.zeros(2)], layer_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="normalize='l2' is not known"):
        feature_distillation([torch.zeros(2)], [torch.zeros(2)], normalize="l2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("llama", 2), ("gpt2", 2), ("vit", 2), ("t5", 4)])
def test_every_block_is_found_and_recorded(name: str, count: int) -> None:
    """The official Swin code distils one pooled feature instead."""
    model = compressed(name)
    blocks = find_blocks(model)
    assert len(blocks) == count
    with recorded_features(blocks) as features:
        run(model, MODELS[name].batch())
    assert len(features) == count
    assert all(feature.ndim == 3 and feature.shape[-1] == 16 for feature in features)
    run(model, MODELS[name].batch())
    assert len(features) == count, "nothing is recorded afterwards"


def test_blocks_by_name() -> None:
    model = compressed("bert")
    (embeddings, last) = find_blocks(model, ["embeddings", "encoder.layer.1"])
    assert type(embeddings).__name__ == "BertEmbeddings"
    assert last is model.get_base_model().bert.encoder.layer[1]
    with pytest.raises(ValueError, match=r"features name 'layer.9'.*Its lists: .*encoder.layer"):
        find_blocks(model, ["layer.9"])
    with pytest.raises(ValueError, match="Mlp has no list of equal blocks"):
        find_blocks(MODELS["mlp"].model())


# The teacher -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_the_teacher_is_the_original_and_everything_is_put_back(name: str) -> None:
    """Also trained copies of modules, dropout and BatchNorm statistics; and what the user froze stays frozen."""
    pico = MODELS[name]
    base, batch = run(pico.model(), pico.batch()), pico.batch()
    model = compressed(name, dropout=0.5, train_norms=True)
    train(model, batch)
    trained = run(model, batch)
    frozen = next(p for n, p in model.named_parameters() if "pela_delta" in n and n.endswith("up"))
    frozen.requires_grad_(False)
    model.train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with as_teacher(model):
        found = model(**batch).logits
    assert torch.equal(found, base)
    assert not found.requires_grad
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    assert torch.equal(run(model.eval(), batch), trained)


def test_both_passes_draw_the_same_mask() -> None:
    """A masked autoencoder draws its mask in the forward: the official ALBEF code compares features of different inputs."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1}
    config = tf.ViTMAEConfig(**sizes, **decoder, decoder_num_attention_heads=2, image_size=16, patch_size=4)
    model: Any = get_peft_model(tf.ViTMAEForPreTraining(config), PelaConfig(r=2)).train()
    pixels = torch.randn(2, 3, 16, 16)
    with as_teacher(model):
        theirs = model(pixel_values=pixels).mask
    ours = model(pixel_values=pixels).mask
    assert torch.equal(ours, theirs)
    assert not torch.equal(model(pixel_values=pixels).mask, ours)


# The objective -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "t5"])
def test_the_parts_of_the_objective(name: str) -> None:
    model, batch = compressed(name).train(), labelled(name)
    healing = Healing(task=0.5, alpha=2.0, beta=3.0, gamma=4.0, mode="hinge", eps=0.0)
    loss, outputs = healing(model, batch)
    blocks = find_blocks(model)
    with torch.no_grad():
        with recorded_features(blocks) as ours:
            mine = model(**batch)
        with model.disable_adapter(), recorded_features(blocks) as theirs:
            original = model(**batch)
    penalties = []
    for layer in (m for _, m in model.base_model.named_subspace_layers()):
        delta = layer.deltas("default")["pela_delta"]
        if delta.core is None:
            penalties.append(perturbation_penalty(delta.up, delta.down, layer._canonical_weight("pela_delta"), "hinge", 0.0))
    expected = {
        "task": 0.5 * mine.loss,
        "features": 2 * feature_distillation(ours, theirs),
        "logits": 3 * nn.functional.mse_loss(mine.logits, original.logits),
        "penalty": 4 * torch.stack(penalties).mean().detach(),
    }
    assert set(healing.parts) == set(expected)
    for part, value in expected.items():
        torch.testing.assert_close(healing.parts[part], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach(), sum(expected.values()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.logits.detach(), mine.logits)
    loss.backward()
    base = [p for n, p in model.named_parameters() if "pela_delta" not in n]
    assert all(p.grad is None for p in base if not p.requires_grad), "the teacher's weights have no gradient"


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_gives_both_passes_one_decoder_input(kind: str) -> None:
    """It is made of the labels; and the decoder's tokens have a mask of their own."""
    if kind == "t5":
        base: Any = MODELS["t5"].model()
    else:
        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 48}
        ffn = {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
        base = tf.BartForConditionalGeneration(tf.BartConfig(**sizes, **ffn, dropout=0.0)).eval()
    names = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    model = get_peft_model(base, PelaConfig(r=2, target_modules=names)).train()
    ids, labels = torch.randint(3, 48, (2, 7)), torch.randint(3, 48, (2, 7))
    labels[:, 5:] = -100
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    seen: list[Tensor] = []
    decoder = model.get_base_model().get_decoder()
    handle = decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    healing = Healing()
    healing(model, batch)
    handle.remove()
    assert torch.equal(*seen)
    blocks = find_blocks(model)
    with torch.no_grad(), recorded_features(blocks) as ours:
        model(**batch)
    with as_teacher(model), recorded_features(blocks) as theirs:
        model(**batch)
    distances = [(a - b).square() for a, b in zip(ours, theirs, strict=True)]
    expected = [d[mask.bool()].mean() for d in distances[:2]] + [d[labels != -100].mean() for d in distances[2:]]
    torch.testing.assert_close(healing.parts["features"], torch.stack(expected).mean(), rtol=1e-5, atol=1e-7)


def test_logits_are_masked_too_and_all_of_them_count() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = tf.BertForQuestionAnswering(tf.BertConfig(**sizes, vocab_size=48, max_position_embeddings=32)).eval()
    model = get_peft_model(base, PelaConfig(r=2, target_modules=["query"]))
    ids = torch.randint(1, 48, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    healing = Healing(task=0.0, alpha=0.0, beta=1.0)
    healing(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        mine = model(input_ids=ids, attention_mask=mask)
    with as_teacher(model):
        theirs = model(input_ids=ids, attention_mask=mask)
    kept = mask.bool()
    parts = [
        (a - b)[kept].square().mean()
        for a, b in ((mine.start_logits, theirs.start_logits), (mine.end_logits, theirs.end_logits))
    ]
    torch.testing.assert_close(healing.parts["logits"], torch.stack(parts).mean(), rtol=1e-4, atol=1e-9)


def test_blocks_of_a_model_in_stages() -> None:
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
    assert [type(block).__name__ for block in find_blocks(tf.SwinModel(config))] == ["SwinLayer"] * 4


def test_healing_without_labels_brings_the_student_to_the_teacher() -> None:
    model, batch = compressed("vit", r=6).train(), MODELS["vit"].batch()
    healing = Healing(task=0.0, alpha=1.0, beta=1.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(80):
        loss, _ = healing(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_bfloat16(dtype: torch.dtype) -> None:
    model, batch = compressed("llama", dtype).train(), labelled("llama")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss, _ = Healing(gamma=1.0, beta=1.0)(model, batch)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # for a name that is a month old
def test_gradient_checkpointing() -> None:
    gradients = []
    for reentrant in (None, False, True):
        model, batch = compressed("llama", torch.float64).double().train(), labelled("llama")
        if reentrant is not None:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        Healing()(model, batch)[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for found in gradients[1:]:
        for mine, wanted in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


class Reentrant(nn.Module):
    """Calls its blocks inside of a reentrant checkpoint, where they run without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda y, block=block: torch.relu(block(y)), x, use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the teacher has no gradients
def test_features_without_a_graph_are_refused() -> None:
    model = get_peft_model(Reentrant(), PelaConfig(r=2))
    with pytest.raises(ValueError, match=r"carry no gradient.*'use_reentrant': False"):
        Healing(task=0.0)(model.train(), {"x": torch.randn(3, 16, requires_grad=True)})


def test_a_penalty_now_and_then_is_as_heavy() -> None:
    model, batch = compressed("llama").train(), labelled("llama")
    healing = Healing(gamma=1.0, penalty_every=3)
    parts = []
    for _ in range(4):
        healing(model, batch)
        parts.append("penalty" in healing.parts)
    assert parts == [True, False, False, True]
    torch.testing.assert_close(healing.parts["penalty"], 3 * healing.penalty(model).detach())


def test_a_relative_eps_is_a_share_of_the_first_deviation() -> None:
    model = compressed("llama")
    assert float(Healing(gamma=1.0, mode="official", eps=1.0, relative_eps=True).penalty(model).detach()) < 1e-12
    assert float(Healing(gamma=1.0, mode="hinge", eps=0.5, relative_eps=True).penalty(model).detach()) > 0


def test_wrong_objectives() -> None:
    with pytest.raises(ValueError, match="weights of the losses"):
        Healing(task=-1.0)
    with pytest.raises(ValueError, match="weights of the losses"):
        Healing(task=0.0, alpha=0.0)
    with pytest.raises(ValueError, match="mode='max'"):
        Healing(mode="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalty_every=0"):
        Healing(penalty_every=0)
    with pytest.raises(ValueError, match="returned no loss: give it `labels`, or set task=0"):
        Healing()(compressed("bert"), MODELS["bert"].batch())
    plain = get_peft_model(MODELS["bert"].model(), tf_lora())
    with pytest.raises(ValueError, match="no active adapter has factors"):
        Healing(gamma=1.0)(plain, labelled("bert"))


def tf_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["query"])


# The Trainer -------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, healing: Healing, model: Any, name: str = "bert", **arguments: Any) -> HealingTrainer:
    args = arguments_for(folder, **arguments)
    rows = examples(name)
    return HealingTrainer(healing=healing, model=model, args=args, train_dataset=rows, eval_dataset=rows[:8])


def test_trainer_logs_the_parts_and_evaluates_the_task(tmp_path: Path) -> None:
    model = compressed("bert")
    healer = trainer(tmp_path, Healing(gamma=1.0, mode="topk"), model)
    healer.train()
    logs = [entry for entry in healer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        parts = entry["loss_task"] + entry["loss_features"] + entry["loss_penalty"]
        assert entry["loss"] == pytest.approx(parts, abs=2e-4)  # the Trainer rounds to four digits
    plain = tf.Trainer(model=model, args=healer.args, eval_dataset=healer.eval_dataset)
    assert healer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(MODELS["bert"].model(), str(tmp_path / "adapter"))
    batch = MODELS["bert"].batch()
    assert torch.equal(run(loaded, batch), run(model.eval(), batch))


def test_trainer_without_labels(tmp_path: Path) -> None:
    model = compressed("bert")
    healer = trainer(tmp_path, Healing(task=0.0), model)
    healer.train_dataset = [{key: value for key, value in row.items() if key != "labels"} for row in examples("bert")]
    healer.train()
    losses = [entry["loss"] for entry in healer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_trainer_without_labels_evaluates_the_objective(tmp_path: Path) -> None:
    model = compressed("bert")
    healer = trainer(tmp_path, Healing(task=0.0), model, eval_strategy="steps", eval_steps=3, save_steps=3,
                     load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in examples("bert")]
    healer.train_dataset, healer.eval_dataset = rows, rows[:8]
    healer.train()
    assert healer.evaluate()["eval_loss"] > 0


def test_resuming_goes_on_with_the_penalty(tmp_path: Path) -> None:
    """Its cadence, and the first deviations that a relative eps refers to."""
    states = []
    for resumed in (False, True):
        options = {"gamma": 10.0, "relative_eps": True, "eps": 0.5, "mode": "hinge", "penalty_every": 3}
        arguments = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "constant"}
        model = compressed("bert", dropout=0.0)
        healer = trainer(tmp_path, Healing(**options), model, **arguments)  # type: ignore[arg-type]
        healer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        logs = [entry for entry in healer.state.log_history if "loss" in entry]
        for entry in logs:
            parts = sum(value for name, value in entry.items() if name.startswith("loss_"))
            assert entry["loss"] == pytest.approx(parts, abs=2e-4)
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_accumulated_steps_equal_one_large_batch(tmp_path: Path, name: str) -> None:
    """llama's own loss would be normalised by all tokens of the step, the distillation's not."""
    states = []
    for size, steps in ((8, 1), (4, 2)):
        model = compressed(name, dropout=0.0)
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer(tmp_path / str(size), Healing(gamma=1.0), model, name, **batches, optim="sgd", max_grad_norm=0.0).train()
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
