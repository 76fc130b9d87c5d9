"""Frozen batch norms folded into the convolutions before them: the same function, one pass less."""

from __future__ import annotations

import copy
import logging

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..modeling.frozen_norm import following_norms, scale_and_shift, unfold_frozen_norms

logger = logging.getLogger(__name__)

_BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


def folded(backbone: nn.Module, device: torch.device, image_channels: int) -> nn.Module:
    """The backbone with its batch norms folded; unfolded, with a warning, where that changes it:
    it then uses what a convolution says before the norm, too."""
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, image_channels, 64, 64, generator=generator).to(device)
    candidate = copy.deepcopy(backbone)
    fold_batch_norms(candidate, example)
    with torch.no_grad():
        pairs = zip(backbone(example).values(), candidate(example).values(), strict=True)
        same = all(torch.allclose(b, a, rtol=1e-2, atol=1e-2 * b.abs().max()) for b, a in pairs)
    if not same:
        logger.warning("The batch norms of %s are not folded.", type(backbone).__name__)
    return candidate if same else backbone


def fold_batch_norms(module: nn.Module, example: Tensor) -> int:
    """Folds every batch norm that nothing but one convolution feeds, in place.

    Which these are is seen in a forward pass, so any backbone will do: detectron2's, whose
    convolutions hold their norms, and timm's, whose norms hold an activation.

    Args:
        module: in evaluation mode, its batch norms constant.
        example: (1, 3, H, W) input for the forward pass.

    Returns:
        How many were folded.
    """
    folded = 0
    unfold_frozen_norms(module)
    for convolution in module.modules():
        norm = getattr(convolution, "norm", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, _BATCH_NORMS):
            _fold(convolution, norm)
            convolution.norm = None
            folded += 1
    names = {child: name for name, child in module.named_modules()}
    for convolution, norm in following_norms(module, example):
        parent, _, child = names[norm].rpartition(".")
        _fold(convolution, norm)
        # timm's norms apply dropout and an activation, too; in evaluation only the latter counts.
        setattr(module.get_submodule(parent), child, getattr(norm, "act", None) or nn.Identity())
        folded += 1
    return folded


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    scale, shift = scale_and_shift(norm)
    weight = convolution.weight * scale[:, None, None, None]
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(bias, requires_grad=False)
