"""What the processor computes fast."""

from __future__ import annotations

import functools
import time

import torch
from torch.nn.functional import conv2d


@functools.cache
def is_bfloat16_fast() -> bool:
    """Whether this CPU convolves in bfloat16 about as fast as in float32, or faster.

    Measured once per process, in less than half a second: without instructions for it, a CPU needs
    ten to hundreds of times as long as for float32, and which instructions PyTorch uses differs
    between systems and versions.
    """
    # Far from either kind: in so small a convolution a fast one hardly shows how fast it is.
    return _seconds(torch.bfloat16) < 2 * _seconds(torch.float32)


def fast_types() -> list[torch.dtype]:
    """float32, and bfloat16 where this CPU is fast in it."""
    return [torch.float32, torch.bfloat16] if is_bfloat16_fast() else [torch.float32]


@torch.no_grad()
def _seconds(dtype: torch.dtype, rounds: int = 5) -> float:
    """The best of some rounds: other processes can only make one look slow."""
    image = torch.ones(1, 64, 16, 16, dtype=dtype)
    weight = torch.ones(64, 64, 3, 3, dtype=dtype)
    seconds = []
    for _ in range(1 + rounds):  # the first one prepares
        start = time.perf_counter()
        conv2d(image, weight, padding=1)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
