"""Dropout with cheap random numbers on CPUs.

Where PyTorch does not use MKL (AMD, ARM) it draws 64 random bits per element on one core: a quarter
of DETR R50's bfloat16 training step on two cores of an EPYC. Sixteen bits per element are enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout` (Srivastava et al., 2014)."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_out(x, self.p if self.training else 0.0)


def drop_out(x: Tensor, p: float) -> Tensor:
    """Each element of `x` is 0 with probability `p` and divided by 1 - p otherwise."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < p < 1:
        return F.dropout(x, p)
    return x * draw_factors(x.shape, p, x.dtype)


def draw_factors(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """0 with probability `p`, which is rounded to a multiple of 2 ** -16, else 1 / (1 - p)."""
    count = math.prod(shape)
    words = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    kept = bits >= min(round(p * 2**16), 2**16 - 1) - 2**15
    # Of bytes, as PyTorch converts booleans to bfloat16 eight times slower.
    return kept.view(torch.uint8).to(dtype).mul_(1 / (1 - p))
