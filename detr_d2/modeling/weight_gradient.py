"""Gradients of convolution weights as matrix products, on CPUs without AVX512.

There oneDNN computes them at a third to a half of the speed of everything else, in the layout
(channels last) in which all the rest is fastest. Values are equal up to rounding.

Shapes: B images, I and O channels, K x K places of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ConvolutionByProducts(torch.autograd.Function):
    """`F.conv2d` of one group, whose weight gradient is K * K matrix products, one for each place
    of the kernel: outputs' gradients (O, pixels) with the inputs (pixels, I) at that place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        # In the order of PyTorch's own: activation checkpointing may compute one for the other.
        ctx.save_for_backward(x, weight)
        ctx.place = stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = torch.nn.grad.conv2d_input(x.shape, weight, gradient, *ctx.place)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient, weight.shape[2:], *ctx.place)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_input, of_weight, of_bias, None, None, None


def weight_gradient(
    x: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """
    Args:
        x: (B, I, H, W), the convolution's input.
        gradient: (B, O, H', W'), of its output.

    Returns:
        (O, I, K, K)
    """
    height, width = gradient.shape[2:]
    of_outputs = gradient.permute(0, 2, 3, 1).flatten(0, 2).t()
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(padding[1],) * 2, *(padding[0],) * 2))
    products = []
    for row in range(0, kernel[0] * dilation[0], dilation[0]):
        rows = padded[:, row : row + stride[0] * (height - 1) + 1 : stride[0]]
        for column in range(0, kernel[1] * dilation[1], dilation[1]):
            inputs = rows[:, :, column : column + stride[1] * (width - 1) + 1 : stride[1]]
            products.append(of_outputs @ inputs.flatten(0, 2))
    return torch.stack(products, dim=-1).unflatten(-1, tuple(kernel))


class _ByProducts(TorchFunctionMode):
    """Within it, convolutions that gain from it are `ConvolutionByProducts`."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.conv2d and len(args) == 7 and not kwargs and _gains(*args):
            return ConvolutionByProducts.apply(*args[:6])
        return function(*args, **(kwargs or {}))


# Of fewer channels, or of a single place, products take as long as oneDNN.
_FEWEST_CHANNELS = 128


def _gains(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> bool:
    is_large = min(weight.shape[:2]) >= _FEWEST_CHANNELS and weight.shape[2:].numel() > 1
    is_plain = groups == 1 and x.dtype == torch.float32 and not isinstance(padding, str)
    return is_large and is_plain and weight.requires_grad and torch.is_grad_enabled()


def weight_gradients_by_products(x: Tensor) -> AbstractContextManager:
    """For the forward pass of convolutions over `x`: what makes their backward pass fast."""
    device = x.device.type
    is_slow = device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not is_slow or torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return nullcontext()
    return _ByProducts()
