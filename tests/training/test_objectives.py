"""The objectives against their formulas, and what the released code of UFM gets wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_subspace.training.objectives import (
    addition_loss,
    entropy_loss,
    information_maximization_loss,
    negation_loss,
    sharpen,
    threshold_at,
    trusted_set,
    ufm_loss,
)


def test_addition_and_negation() -> None:
    tasks = [(torch.randn(4, classes, requires_grad=True), torch.randint(classes, (4,))) for classes in (3, 5)]
    first, second = (F.cross_entropy(logits, labels) for logits, labels in tasks)
    torch.testing.assert_close(addition_loss(tasks), first + second)
    torch.testing.assert_close(negation_loss(target=tasks[0], control=tasks[1]), second - first)
    with pytest.raises(ValueError, match="at least one task"):
        addition_loss([])


def test_entropy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy_loss(logits), -(p * p.log()).sum(-1).mean().float())
    sure = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    entropy_loss(sure).backward()
    assert torch.isfinite(sure.grad).all()  # type: ignore[arg-type]


def test_information_maximization() -> None:
    """Minus the mutual information of input and class: least for sure answers of all classes, 0 where all are alike."""
    logits = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    mean = p.mean((0, 1))
    expected = -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(information_maximization_loss(logits), expected.float())
    (found,) = torch.autograd.grad(information_maximization_loss(logits), logits)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0], atol=1e-6, rtol=1e-5)
    alike, sure = torch.tensor([[3.0, 0.0, -1.0]]).repeat(6, 1), 1e4 * torch.eye(3).repeat(2, 1).requires_grad_(True)
    assert abs(float(information_maximization_loss(alike))) < 1e-6
    assert entropy_loss(sure) == entropy_loss(1e4 * torch.eye(3)[[0] * 6]) == 0  # which entropy cannot tell apart
    torch.testing.assert_close(information_maximization_loss(sure), -torch.tensor(3.0).log())
    assert abs(float(information_maximization_loss(torch.randn(4)))) < 1e-6  # one sample says nothing about the others
    masked = torch.randn(6, 4).index_fill(1, torch.tensor([2]), -torch.inf).requires_grad_(True)
    for one in (sure, masked):
        assert torch.isfinite(torch.autograd.grad(information_maximization_loss(one), one)[0]).all()
    kept = masked.detach()[:, [0, 1, 3]]
    torch.testing.assert_close(information_maximization_loss(masked), information_maximization_loss(kept))


def test_sharpening_sharpens() -> None:
    """The released code multiplies by a half and normalises again, which changes nothing."""
    p = torch.tensor([[0.6, 0.3, 0.1]])
    torch.testing.assert_close(sharpen(p, 1.0), p)
    torch.testing.assert_close(sharpen(p, 0.5), p.square() / p.square().sum())
    assert sharpen(p, 2.0).max() < p.max() < sharpen(p, 0.5).max()
    assert torch.isfinite(sharpen(torch.tensor([[1.0, 0.0]]), 0.1)).all()
    with pytest.raises(ValueError, match="must be positive"):
        sharpen(p, 0.0)


def test_only_sure_samples_count_and_the_weak_view_has_no_gradient() -> None:
    weak = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 9.0]], requires_grad=True)
    strong = torch.randn(3, 2, requires_grad=True)
    loss = ufm_loss(weak, strong, 0.9)
    q = weak.detach().softmax(-1)
    expected = F.cross_entropy(strong, q, reduction="none")[[0, 2]].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert weak.grad is None
    assert not strong.grad[1].any()  # type: ignore[index]


def test_a_batch_without_a_sure_sample_has_a_loss_of_zero() -> None:
    """And a gradient of zero; the released code divides zero by zero."""
    strong = torch.randn(3, 2, requires_grad=True)
    loss = ufm_loss(torch.zeros(3, 2), strong, 0.9)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(strong.grad, torch.zeros(3, 2))  # type: ignore[arg-type]


def test_trusted_samples_count_with_their_labels() -> None:
    weak, strong = torch.zeros(3, 2), torch.randn(3, 2)
    trusted, labels = torch.tensor([False, True, False]), torch.tensor([0, 1, 0])
    torch.testing.assert_close(
        ufm_loss(weak, strong, 0.9, trusted=trusted, labels=labels), F.cross_entropy(strong[1:2], labels[1:2])
    )
    with pytest.raises(ValueError, match="go together"):
        ufm_loss(weak, strong, 0.9, trusted=trusted)
    with pytest.raises(ValueError, match="must be equal"):
        ufm_loss(weak, strong[:2], 0.9)


def test_the_trusted_set_is_what_was_chosen_and_no_more() -> None:
    """The released code marks every sample, so that threshold and weak view have no effect."""
    probabilities = torch.randn(200, 4).softmax(-1)
    mask, labels = trusted_set(probabilities)
    most = 200 // 4 // 10
    confidence, predicted = probabilities.max(-1)
    assert torch.equal(labels, predicted)
    assert 0 < int(mask.sum()) <= 4 * most
    for label in range(4):
        mine = predicted == label
        assert int((mask & mine).sum()) == min(most, int(mine.sum()))
        assert confidence[mask & mine].min() >= confidence[mine & ~mask].max()
    assert int(trusted_set(probabilities, most=1)[0].sum()) == 4


def test_the_threshold_rises() -> None:
    assert [threshold_at(share) for share in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.9, 0.9, 0.945, 0.99, 0.99])


def test_a_class_that_is_masked_out_has_no_share() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    loss = entropy_loss(logits)
    loss.backward()
    torch.testing.assert_close(loss, entropy_loss(logits[:, :2]))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_samples_that_are_not_trusted_need_no_label() -> None:
    logits = torch.randn(3, 4)
    trusted = torch.tensor([True, False, False])
    labels = [torch.tensor([1, other, other]) for other in (-100, 2)]
    assert torch.equal(*(ufm_loss(logits, logits, 0.99, trusted=trusted, labels=label) for label in labels))
