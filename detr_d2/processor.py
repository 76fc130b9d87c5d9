"""Which processor there is, and what it computes fast."""

from __future__ import annotations

import logging
import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .errors import UserError

logger = logging.getLogger(__name__)


def usable_device(device: str) -> str:
    """The device a config names, or the CPU where that is a GPU and there is none."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    has_mps = torch.backends.mps.is_available()
    other = ", though mps is there (MODEL.DEVICE mps, untested)" if has_mps else ""
    logger.warning(f"No CUDA GPU is available: the device is the CPU, not {device!r}{other}.")
    return "cpu"


def is_bfloat16_fast() -> bool:
    """Whether PyTorch has kernels for bfloat16 on this CPU; without them it needs ten to hundreds
    of times as long as for float32.

    Asked of oneDNN, as `torch.compile` does, by an operator that is private to PyTorch. (Measuring
    would be public, but on busy cores a small convolution may take any time.)
    """
    if not torch.backends.mkldnn.is_available():
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and is_supported() and _has_bfloat16_instructions()


def _has_bfloat16_instructions() -> bool:
    """On x86 oneDNN counts every AVX512, and emulates what Skylake and Cascade Lake lack."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known = getattr(torch.cpu, "get_capabilities", dict)()  # of newer PyTorch
    if "avx512_bf16" in known:
        return known["avx512_bf16"] or known.get("amx_bf16", False)
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return is_supported is None or is_supported()


def autocast(
    device_type: str, dtype: torch.dtype | None = None, enabled: bool = True
) -> AbstractContextManager:
    """`torch.autocast`, which some devices cannot even switch off (MPS in PyTorch 2.4)."""
    if not enabled and not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, computed in float32 inside an autocast, too."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return module(x).float()
    with autocast(device, enabled=False):
        return module(x.float())


def has_bfloat16(device_type: str) -> bool:
    """Whether a device is no slower in bfloat16 than in float32 (GPUs since Ampere)."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return device_type != "cpu" or is_bfloat16_fast()


def set_float32_precision(precision: str) -> None:
    """Of matrix products on GPUs with TF32, as newer versions of detectron2 do by the same key.

    Args:
        precision: "highest", "high" (TF32), "medium" (bfloat16), or "": as it is.

    Raises:
        UserError: anything else.
    """
    if precision not in ("", "highest", "high", "medium"):
        raise UserError(
            f"FLOAT32_PRECISION is {precision!r}; it must be 'highest', 'high', 'medium' or ''."
        )
    if precision:
        torch.set_float32_matmul_precision(precision)


def fast_types() -> list[torch.dtype]:
    """float32, and bfloat16 where this CPU is fast in it."""
    return [torch.float32, torch.bfloat16] if is_bfloat16_fast() else [torch.float32]
