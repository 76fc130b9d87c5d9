"""Frozen batch norms folded into the convolutions before them: the same function, one pass less."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


def folded(backbone: nn.Module, device: torch.device) -> nn.Module:
    """The backbone with its batch norms folded; unfolded, with a warning, where that changes it:
    it then uses what a convolution says before the norm, too."""
    example = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
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
    for convolution in module.modules():
        norm = getattr(convolution, "norm", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, _BATCH_NORMS):
            _fold(convolution, norm)
            convolution.norm = None
            folded += 1
    for convolution, name in _pairs(module, example):
        parent, _, child = name.rpartition(".")
        norm = module.get_submodule(name)
        _fold(convolution, norm)
        # timm's norms apply dropout and an activation, too; in evaluation only the latter counts.
        setattr(module.get_submodule(parent), child, getattr(norm, "act", None) or nn.Identity())
        folded += 1
    return folded


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, str]]:
    """Convolutions and the names of the batch norms that take their output, called once each."""
    names = {child: name for name, child in module.named_modules()}
    outputs: dict[int, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    found: list[tuple[nn.Conv2d, str]] = []

    def after(child: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[child] = calls.get(child, 0) + 1
        if isinstance(child, nn.Conv2d):
            kept.append(output)
            outputs[id(output)] = child
        elif id(inputs[0]) in outputs:
            found.append((outputs[id(inputs[0])], names[child]))

    hooks: list[Callable] = [
        child.register_forward_hook(after).remove
        for child in module.modules()
        if isinstance(child, nn.Conv2d) or _is_plain_batch_norm(child)
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for remove in hooks:
            remove()
    convolutions = [convolution for convolution, _ in found]
    return [
        (convolution, name)
        for convolution, name in found
        if convolutions.count(convolution) == calls[convolution] == 1
        and calls[module.get_submodule(name)] == 1
    ]


def _is_plain_batch_norm(module: nn.Module) -> bool:
    """Also timm's frozen ones, which are classes of its own with the same four tensors."""
    tensors = {name for name, _ in [*module.named_buffers(recurse=False)]}
    tensors |= {name for name, _ in module.named_parameters(recurse=False)}
    return {"weight", "bias", "running_mean", "running_var"} <= tensors


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = convolution.weight * scale[:, None, None, None]
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(bias, requires_grad=False)
