"""The chunked loss equals PyTorch's cross-entropy, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mgm.label_loss import label_loss


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_and_gradients_equal_cross_entropy(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (11,), generator=generator)
    weights = torch.rand(11, generator=generator, dtype=torch.float64)
    expected = (F.cross_entropy(hidden @ head.t(), targets, reduction="none") * weights).sum()
    found = label_loss(hidden, head, targets, weights, chunk=chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(3 * expected, (hidden, head))
    got = torch.autograd.grad(3 * found, (hidden, head))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(5, 4)
    loss = label_loss(hidden, head, torch.tensor([0, 1, 2]), torch.full((3,), 1 / 3))
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_a_float32_head_takes_its_gradient_from_rows_of_lower_precision() -> None:
    hidden = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(5, 4, requires_grad=True)
    label_loss(hidden, head, torch.tensor([0, 1, 2]), torch.full((3,), 1 / 3)).backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_no_rows_cost_nothing() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = label_loss(hidden, torch.randn(5, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0
