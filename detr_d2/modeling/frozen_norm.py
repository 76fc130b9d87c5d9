"""Frozen batch norms computed with the convolutions' weights instead of the maps.

A frozen batch norm is a constant scale and shift of every channel. Scaling the weights, a few
thousand numbers, gives what scaling the maps, millions of them, gives: the same values and
gradients in less time. Names and values of parameters stay as they are.

Shapes: O output channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn


class _Mixed:
    """What `_mixed` has made is pickled by its parts: its class has no name to be found by."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_mixed, type(self).__bases__, *state


class _Folding(_Mixed):
    """Makes a convolution of any class compute with scaled weights: while its own forward runs,
    whatever that is, `weight` and `bias` are the scaled ones, and the parameters otherwise."""

    is_computing = False

    def forward(self, x: Tensor) -> Tensor:
        self.is_computing = True
        try:
            return super().forward(x)
        finally:
            self.is_computing = False

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        if not self.is_computing:
            return weight
        scale, _ = scale_and_shift(self.__dict__["_frozen_norm"])
        return weight * scale[:, None, None, None]

    @property
    def bias(self) -> Tensor | None:
        bias = self._parameters["bias"]
        if not self.is_computing:
            return bias
        scale, shift = scale_and_shift(self.__dict__["_frozen_norm"])
        return shift if bias is None else shift + bias * scale


class _Folded(_Mixed):
    """Leaves a norm its activation alone."""

    def forward(self, x: Tensor) -> Tensor:
        act = self._modules.get("act")
        return x if act is None else act(x)


def fold_frozen_norms(module: nn.Module, image_channels: int = 3) -> int:
    """Lets convolutions do the work of the frozen batch norms after them, in place.

    Args:
        image_channels: of the image for the forward pass that shows which norm follows which
            convolution.

    Returns:
        The number of norms folded.
    """
    pairs = [
        (convolution, convolution.norm)
        for convolution in module.modules()
        if isinstance(convolution, nn.Conv2d)
        and not isinstance(convolution, _Folding)
        and isinstance(getattr(convolution, "norm", None), FrozenBatchNorm2d)
    ]
    # Also of deformable convolutions, which apply it themselves, and cannot run on a CPU.
    filters = [m for m in module.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 4]
    held = {id(getattr(m, "norm", None)) for m in filters}
    held |= {id(m.__dict__.get("_frozen_norm")) for m in module.modules()}  # folded already
    if any(_is_frozen_norm(m) and id(m) not in held for m in module.modules()):
        parameter = next(module.parameters())
        example = parameter.new_zeros(1, image_channels, 64, 64)
        pairs += [
            (convolution, norm)
            for convolution, norm in following_norms(module, example)
            if _is_frozen_norm(norm) and id(norm) not in held
        ]
    for convolution, norm in pairs:
        convolution.__dict__["_frozen_norm"] = norm
        convolution.__class__ = _mixed(_Folding, type(convolution))
        norm.__class__ = _mixed(_Folded, type(norm))
    return len(pairs)


def unfold_frozen_norms(module: nn.Module) -> None:
    """Undoes `fold_frozen_norms`, in place."""
    for convolution in list(module.modules()):
        if isinstance(convolution, _Folding):
            norm = convolution.__dict__.pop("_frozen_norm")
            for each in (convolution, norm):
                each.__class__ = type(each).__bases__[1]


def following_norms(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Convolutions whose output one batch norm and no other takes, and that norm; seen in a forward
    pass in which each of them is called once."""
    outputs: dict[int, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    found: list[tuple[nn.Conv2d, nn.Module]] = []

    def after(child: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[child] = calls.get(child, 0) + 1
        if isinstance(child, nn.Conv2d):
            kept.append(output)
            outputs[id(output)] = child
        elif id(inputs[0]) in outputs:
            found.append((outputs[id(inputs[0])], child))

    hooks = [child.register_forward_hook(after) for child in _watched(module)]
    modes = {child: child.training for child in module.modules()}
    try:
        with torch.no_grad():
            module.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for child, mode in modes.items():
            child.training = mode
    convolutions = [convolution for convolution, _ in found]
    return [
        (convolution, norm)
        for convolution, norm in found
        if convolutions.count(convolution) == calls[convolution] == calls[norm] == 1
    ]


def _watched(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(m, nn.Conv2d) or is_batch_norm(m))


def is_batch_norm(module: nn.Module) -> bool:
    """Also timm's frozen ones, which are classes of its own with the same four tensors."""
    return {"weight", "bias", "running_mean", "running_var"} <= _tensor_names(module)


def _is_frozen_norm(module: nn.Module) -> bool:
    """All four tensors are buffers, and it is not an ordinary norm that happens to be idle."""
    frozen = not list(module.named_parameters(recurse=False))
    return frozen and is_batch_norm(module) and not isinstance(module, nn.BatchNorm2d)


def _tensor_names(module: nn.Module) -> set[str]:
    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    return {name for name, _ in tensors}


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm with constant statistics does to each channel: (O,), (O,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


_classes: dict[tuple[type, type], type] = {}


def _mixed(mixin: type, base: type) -> type:
    if (mixin, base) not in _classes:
        _classes[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    return _classes[mixin, base]


def _new_mixed(mixin: type, base: type) -> Any:
    mixed = _mixed(mixin, base)
    return mixed.__new__(mixed)
