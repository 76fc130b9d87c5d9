"""Mixed precision, on CUDA and on CPUs."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch
from detectron2.config import CfgNode

from ..errors import UserError
from ..processor import autocast, has_bfloat16, is_bfloat16_fast

logger = logging.getLogger(__name__)


class Precision:
    """Autocast and gradient scaling as `SOLVER.AMP` asks for.

    Gradients are scaled for float16 only, whose range is too small for them.
    """

    def __init__(self, device: torch.device | str, enabled: bool = False, dtype: str = "auto"):
        """
        Args:
            dtype: "float16", "bfloat16", or "auto": bfloat16, which needs no scaling and overflows
                no sooner than float32, but float16 on GPUs before Ampere, and float32 on CPUs that
                would be slower in bfloat16.

        Raises:
            UserError: an unknown type, or float16 on a CPU.
        """
        self.enabled = enabled
        self.device_type = torch.device(device).type
        automatic = dtype == "auto"
        if automatic:
            is_old_gpu = self.device_type == "cuda" and not has_bfloat16("cuda")
            dtype = "float16" if is_old_gpu else "bfloat16"
        if dtype not in ("float16", "bfloat16"):
            raise UserError(f"SOLVER.AMP.DTYPE is {dtype!r}; it must be auto, float16 or bfloat16.")
        if enabled and dtype == "float16" and self.device_type == "cpu":
            raise UserError("SOLVER.AMP.DTYPE float16 needs a GPU; CPUs train in bfloat16.")
        if enabled and self.device_type == "cpu" and not is_bfloat16_fast():
            logger.warning(
                "This CPU is slower in bfloat16 than in float32. "
                + ("Training in float32." if automatic else "SOLVER.AMP.DTYPE auto would avoid it.")
            )
            self.enabled = enabled = not automatic
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(
            self.device_type, enabled=enabled and self.dtype == torch.float16
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Precision:
        return cls(cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device_type, self.dtype, self.enabled)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") if self.enabled else "float32"
