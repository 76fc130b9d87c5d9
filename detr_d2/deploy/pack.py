"""Linear layers and convolutions whose weights lie as oneDNN wants them, for CPUs.

PyTorch reorders a convolution's weights at every call, and computes float32 matrix products with a
library that is slow on many processors. With weights packed once, and the activation computed while
a result is still in the cache, both are two to three times faster. These are the operators that
`torch.compile` uses; used directly they need no compilation and take any shape.

They are private to PyTorch, so this file is the only one that names them, and `is_available` says
whether this build has them.

Shapes: B images, C channels, H and W of a map.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.attention import MultiHeadAttention, PlainAttention, SelfAttention
from ..modeling.transformer import EncoderLayer, FeedForward

_OPERATORS = (
    "_convolution_pointwise",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_reorder_linear_weight",
)


def is_available() -> bool:
    """Whether this PyTorch has oneDNN and its packed operators."""
    if not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


# The layout of packed linear weights depends on the number of tokens; this one's is good for all.
_TYPICAL_TOKENS = 1024


class PackedLinear(nn.Module):
    """`nn.Linear`, perhaps with ReLU after it; computes in the type of its weights."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, activation: str = "none"):
        super().__init__()
        self.activation = activation
        self.dtype = dtype
        weight = linear.weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_TOKENS)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x.to(self.dtype), self.weight, self.bias, self.activation, [], "")


class PackedConv2d(nn.Module):
    """`nn.Conv2d`, perhaps with ReLU after it, or with a sum and ReLU after that.

    The best layout of the weights depends on the size of the map, so they are packed when a size
    first comes, once for each power of two of its pixels.
    """

    capacity = 3

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype, activation: str = "none"):
        super().__init__()
        self.activation = activation
        self.dtype = dtype
        self.place = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        weight = convolution.weight.detach().to(dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(dtype)
        self._packed: dict[int, Tensor] = {}

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """(B, C, H, W); a summand of the output's shape is overwritten with the output."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        arguments = (self._weight_for(x), self.bias, *self.place)
        if summand is None:
            convolve = torch.ops.mkldnn._convolution_pointwise
            return convolve(x, *arguments, self.activation, [], "")
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        return add(summand, x, *arguments, "add", None, self.activation, [], "")

    def _weight_for(self, x: Tensor) -> Tensor:
        pixels = (x.shape[0] * x.shape[2] * x.shape[3]).bit_length()
        if pixels not in self._packed:
            if len(self._packed) >= self.capacity:
                self._packed.pop(next(iter(self._packed)))
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed[pixels] = reorder(self.weight, *self.place, list(x.shape))
        return self._packed[pixels]


class PackedFeedForward(nn.Module):
    """`FeedForward` with ReLU, without dropout; some tokens of each image at a time, so that what
    is between its layers, the largest tensor of an encoder, stays in the cache."""

    tokens = 512

    def __init__(self, layer: FeedForward, dtype: torch.dtype):
        super().__init__()
        self.linear1 = PackedLinear(layer.linear1, dtype, "relu")
        self.linear2 = PackedLinear(layer.linear2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.split(self.tokens, dim=1)
        return torch.cat([self.linear2(self.linear1(block)) for block in blocks], dim=1)


class _OneProjection(MultiHeadAttention):
    """Attention whose queries and keys are the same: one matrix product makes both."""

    def __init__(self, attention: MultiHeadAttention, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_heads, self.dropout = attention.num_heads, 0.0
        pair = attention.q_proj, attention.k_proj
        both = nn.Linear(pair[0].in_features, 2 * pair[0].out_features, device="meta")
        both.weight = nn.Parameter(torch.cat([projection.weight for projection in pair]))
        both.bias = nn.Parameter(torch.cat([projection.bias for projection in pair]))
        self.qk_proj = PackedLinear(both, dtype)
        self.v_proj = PackedLinear(attention.v_proj, dtype)
        self.out_proj = PackedLinear(attention.out_proj, dtype)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.qk_proj(query).chunk(2, dim=-1), self.v_proj(value)


class PackedSelfAttention(_OneProjection, SelfAttention):
    """`SelfAttention`, of the decoder's queries."""


class PackedEncoderAttention(_OneProjection, PlainAttention):
    """`PlainAttention` in the encoder, where the queries are the memory's tokens."""


class PackedStem(nn.Module):
    """detectron2's `BasicStem`, in strips of the image: the map before pooling is the largest of
    all, and more than C libraries keep for the next call, so every page of it would be new."""

    rows = 64

    def __init__(self, stem: BasicStem, dtype: torch.dtype):
        super().__init__()
        self.conv1 = PackedConv2d(stem.conv1, dtype, "relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4)"""
        strips = []
        for first in range(0, -(-x.shape[2] // 4), self.rows):
            # Eight pixels above and below are what a row depends on.
            start, end = max(4 * first - 8, 0), 4 * (first + self.rows) + 8
            pooled = F.max_pool2d(self.conv1(x[:, :, start:end]), 3, stride=2, padding=1)
            strips.append(pooled[:, :, first - start // 4 :][:, :, : self.rows])
        return torch.cat(strips, dim=2)


class PackedBlock(nn.Module):
    """detectron2's `BottleneckBlock` or `BasicBlock`: convolutions with ReLU, then the sum."""

    def __init__(
        self, block: BottleneckBlock | BasicBlock, dtype: torch.dtype, may_overwrite: bool
    ):
        """
        Args:
            may_overwrite: nobody else needs what enters the block.
        """
        super().__init__()
        convolutions = [getattr(block, f"conv{n}", None) for n in (1, 2, 3)]
        packed = [PackedConv2d(c, dtype, "relu") for c in convolutions if c is not None]
        self.inner = nn.Sequential(*packed[:-1])
        self.last = packed[-1]
        self.shortcut = None if block.shortcut is None else PackedConv2d(block.shortcut, dtype)
        self.may_overwrite = may_overwrite

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.last(self.inner(x), self.shortcut(x))
        inner = self.inner(x)
        return self.last(inner, x if self.may_overwrite else x.clone())


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces what is below `module`, in place, by its packed form.

    Args:
        module: in evaluation mode, its batch norms folded.
        dtype: of weights and results, float32 or bfloat16.
    """
    if isinstance(module, EncoderLayer) and type(module.self_attn) is PlainAttention:
        module.self_attn = PackedEncoderAttention(module.self_attn, dtype)
    for name, child in module.named_children():
        # A stage's later blocks are fed by the one before, whose output is no map of the backbone.
        is_later = isinstance(module, nn.Sequential) and name != "0"
        packed = _packed(child, dtype, is_later)
        if isinstance(child, nn.PReLU):
            child.to(dtype)
        elif packed is None:
            pack(child, dtype)
            if isinstance(child, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                child.register_forward_pre_hook(_as_weights)
        else:
            setattr(module, name, packed)


def _as_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is not packed computes in the type of its weights, whatever its neighbours are in."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def _packed(module: nn.Module, dtype: torch.dtype, may_overwrite: bool) -> nn.Module | None:
    if isinstance(module, FeedForward) and isinstance(module.activation, nn.ReLU):
        return PackedFeedForward(module, dtype)
    if type(module) is SelfAttention:
        return PackedSelfAttention(module, dtype)
    if type(module) is BasicStem and _is_plain(module.conv1):
        return PackedStem(module, dtype)
    if type(module) in (BottleneckBlock, BasicBlock):
        convolutions = [c for c in module.modules() if isinstance(c, nn.Conv2d)]
        if all(map(_is_plain, convolutions)):
            return PackedBlock(module, dtype, may_overwrite)
        return None
    if type(module) is nn.Linear:  # others may do more, or have their weights read by a parent
        return PackedLinear(module, dtype)
    if isinstance(module, nn.Conv2d) and _is_plain(module):
        return PackedConv2d(module, dtype)
    return None


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is plain: no norm or activation inside (detectron2), no padding that
    depends on the input (timm) or is given as "same" or "valid" (PyTorch)."""
    forward = type(convolution).forward
    plain = forward is nn.Conv2d.forward or hasattr(convolution, "norm")
    held = getattr(convolution, "norm", None), getattr(convolution, "activation", None)
    padded = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return plain and held == (None, None) and padded
