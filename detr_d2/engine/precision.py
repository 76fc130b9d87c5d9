"""Mixed precision, on CUDA and on CPUs."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from ..errors import UserError


class Precision:
    """Autocast and gradient scaling as `SOLVER.AMP` asks for.

    Gradients are scaled for float16 only, whose range is too small for them.
    """

    def __init__(self, cfg: CfgNode, device: torch.device):
        """
        Raises:
            UserError: an unknown type, or float16 on a CPU.
        """
        amp = cfg.SOLVER.AMP
        self.enabled = amp.ENABLED
        self.device_type = device.type
        name = amp.DTYPE
        if name == "auto":
            name = "float16" if device.type == "cuda" else "bfloat16"
        if name not in ("float16", "bfloat16"):
            raise UserError(f"SOLVER.AMP.DTYPE is {name!r}; it must be auto, float16 or bfloat16.")
        if name == "float16" and device.type == "cpu":
            raise UserError("SOLVER.AMP.DTYPE float16 needs a GPU; CPUs train in bfloat16.")
        self.dtype = getattr(torch, name)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.enabled and self.dtype == torch.float16
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") if self.enabled else "float32"
