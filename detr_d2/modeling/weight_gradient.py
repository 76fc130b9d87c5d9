"""Gradients of 3x3 convolutions' weights as matrix products, on CPUs with AVX2 and no AVX512.

There oneDNN computes them at a third to a half of the speed of everything else, in the layout
(channels last) in which all the rest is fastest. Values are equal up to rounding.

Shapes: B images, I and O channels, H and W of the input, H' and W' of the output.
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
    """`F.conv2d` of one group, with `gradient_of_weight` in its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *place = inputs
        # In the order of PyTorch's own: activation checkpointing may compute one for the other.
        ctx.save_for_backward(x, weight)
        ctx.place = place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            # torch.nn.grad has the same, but its result is not in x's layout.
            one_group = (False, (0, 0), 1)
            of_input, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, *ctx.place, *one_group, (True, False, False)
            )
        if ctx.needs_input_grad[1]:
            of_weight = gradient_of_weight(x, gradient, weight.shape[2:], *ctx.place)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_input, of_weight, of_bias, None, None, None


def gradient_of_weight(
    x: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """One product for each place of the kernel: the outputs' gradients (O, pixels) with the inputs
    (pixels, I) at that place.

    Args:
        x: (B, I, H, W), the convolution's input.
        gradient: (B, O, H', W'), of its output.
        kernel: height and width.

    Returns:
        (O, I, *kernel)
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
        # Of no types: subclasses of tensors may have convolutions of their own.
        if function is F.conv2d and not types and len(args) == 7 and not kwargs and _gains(*args):
            return ConvolutionByProducts.apply(*args[:6])
        return function(*args, **(kwargs or {}))


# Of fewer channels products take as long as oneDNN.
_FEWEST_CHANNELS = 128


def _gains(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> bool:
    """
    Args:
        place: stride, padding, dilation, groups; perhaps numbers or names.
    """
    *pairs, groups = place
    is_large = min(weight.shape[:2]) >= _FEWEST_CHANNELS and weight.shape[2:] == (3, 3)
    is_plain = groups == 1 and all(isinstance(p, tuple) and len(p) == 2 for p in pairs)
    is_fast = x.is_contiguous(memory_format=torch.channels_last)  # of a batch
    is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    is_ours = weight.requires_grad and not torch.compiler.is_compiling()
    return is_large and is_plain and is_fast and is_float32 and is_ours


def weight_gradients_by_products(x: Tensor) -> AbstractContextManager:
    """For the forward pass of convolutions over `x`: what makes their backward pass fast."""
    is_slow = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return _ByProducts() if is_slow and torch.is_grad_enabled() else nullcontext()
