"""What the processor computes fast."""

from __future__ import annotations

import torch


def is_bfloat16_fast() -> bool:
    """Whether PyTorch has kernels for bfloat16 on this CPU; without them it needs ten to hundreds
    of times as long as for float32.

    Asked of oneDNN, as `torch.compile` does, by an operator that is private to PyTorch. (Measuring
    would be public, but on busy cores a small convolution may take any time.)
    """
    if not torch.backends.mkldnn.is_available():
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and is_supported()


def fast_types() -> list[torch.dtype]:
    """float32, and bfloat16 where this CPU is fast in it."""
    return [torch.float32, torch.bfloat16] if is_bfloat16_fast() else [torch.float32]
