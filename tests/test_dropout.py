"""Dropout drops as much as it should, where it should, and scales the rest."""

import math

import pytest
import torch
from torch import nn

from detr_d2.modeling.dropout import Dropout, draw_factors, drop_out


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    count = 400_003  # no multiple of what one random number decides
    factors = draw_factors((count,), p, dtype)
    assert factors.shape == (count,) and factors.dtype == dtype
    # As PyTorch's: ones divided by 1 - p, in that type.
    kept = torch.ones(1, dtype=dtype).div(1 - p)
    assert set(factors.unique().tolist()) == {0.0, kept.item()}
    dropped = (factors == 0).float().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / count)  # standard errors


def test_every_sixteen_bits_decide_for_one_element():
    """Each of the four parts of a random number drops its share, whatever its neighbours do."""
    torch.manual_seed(0)
    dropped = (draw_factors((100_000, 4), 0.3, torch.float32) == 0).float()
    assert (dropped.mean(0) - 0.3).abs().max() < 0.01
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.015


def test_gradients_reach_what_is_kept():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = drop_out(x, 0.4)
    y.sum().backward()
    factors = (y / x).detach()
    torch.testing.assert_close(x.grad, factors)
    assert 0 < (factors == 0).sum() < factors.numel()


def test_same_seed_same_lots():
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append([drop_out(torch.ones(9), 0.5) for _ in range(2)])
    torch.testing.assert_close(draws[0], draws[1])
    assert not torch.equal(*draws[0])


def test_module_is_pytorchs_in_all_else():
    x = torch.randn(6)
    module = Dropout(0.5)
    assert isinstance(module, nn.Dropout) and not module.state_dict()
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert torch.equal(Dropout(1.0).train()(x), torch.zeros(6))
    assert drop_out(torch.zeros(0, 3), 0.5).shape == (0, 3)
