"""Activation checkpointing: inner activations are computed again in the backward pass instead of
being kept (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016). Gradients are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .backbone import TimmBackbone


def recompute_backbone(backbone: nn.Module) -> None:
    """Lets every block of a backbone keep its input only, in place.

    Raises:
        UserError: a backbone that has another way, or batch norms that would see a batch twice.
    """
    if any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in backbone.modules()):
        raise UserError(
            "MODEL.ACTIVATION_CHECKPOINTING backbone computes the backbone twice, and batch norms "
            'that learn would count every batch twice: set MODEL.RESNETS.NORM "FrozenBN" or '
            "MODEL.TIMM.FREEZE_NORM True."
        )
    if isinstance(backbone, TimmBackbone) and hasattr(backbone.body, "set_grad_checkpointing"):
        backbone.body.set_grad_checkpointing(True)
    elif isinstance(backbone, ResNet):
        for stage in backbone.stages:
            for block in stage:
                block.forward = Recomputed(block)
    else:
        raise UserError(
            "MODEL.ACTIVATION_CHECKPOINTING backbone knows detectron2's ResNets and timm's models, "
            f"not {type(backbone).__name__}, which may have a key of its own."
        )


class Recomputed:
    """In place of a module's `forward`."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *inputs: Any) -> Tensor:
        return run(self.module, type(self.module).forward, self.module, *inputs)


def run(module: nn.Module, function: Any, *inputs: Any) -> Any:
    """Calls a function of a module, in training without keeping what it computes."""
    if module.training and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
