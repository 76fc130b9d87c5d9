"""Resizing as detectron2 does it with Pillow, several times faster.

PyTorch's anti-aliased interpolation of bytes follows Pillow's algorithm; a few pixels in ten
thousand differ by one level of 256, from another order of rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torch.nn import functional as F


class TensorResizeTransform(T.ResizeTransform):
    """detectron2's `ResizeTransform` for images of bytes in three channels; others as there."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (new_h, new_w, 3) uint8."""
        chosen = self.interp if interp is None else interp
        is_image = img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3
        if not is_image or chosen != Image.BILINEAR or min(self.new_h, self.new_w) < 1:
            return super().apply_image(img, interp)
        if img.shape[:2] == (self.new_h, self.new_w):
            return img
        # PyTorch resizes interleaved channels in a third of the time that planes take, where it
        # knows them by their strides: the batch dimension has to be made before the permutation.
        batch = to_tensor(img)[None].permute(0, 3, 1, 2)
        size = (self.new_h, self.new_w)
        resized = F.interpolate(batch, size=size, mode="bilinear", antialias=True)
        return resized.permute(0, 2, 3, 1)[0].numpy()


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) of any strides -> tensor. `torch.from_numpy` refuses negative strides (flipped
    images) and warns of read-only arrays (Pillow's). Flipping the tensor takes a thirtieth of the
    time of a copy in numpy."""
    flipped = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    tensor = torch.from_numpy(np.require(np.flip(image, flipped), requirements="W"))
    return tensor.flip(flipped) if flipped else tensor


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's augmentation with `TensorResizeTransform`. However narrow an image is, it has
    pixels."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if not isinstance(transform, T.ResizeTransform):
            return transform
        return TensorResizeTransform(
            transform.h,
            transform.w,
            max(transform.new_h, 1),
            max(transform.new_w, 1),
            transform.interp,
        )


class ResizeShortestEdgePerBatch(T.ResizeShortestEdge):
    """The same shorter side for all images of a batch, in all processes: less padding. Without a
    seed, from loaders of other kinds than this package's, one for each image."""

    def get_transform(self, image: np.ndarray, batch_seed: int | None) -> T.Transform:
        if batch_seed is None:
            batch_seed = np.random.randint(2**31)
        generator = np.random.default_rng(batch_seed)
        sizes = self.short_edge_length
        if self.is_range:
            size = int(generator.integers(sizes[0], sizes[1] + 1))
        else:
            size = int(generator.choice(sizes))
        return ResizeShortestEdge(size, self.max_size, "choice").get_transform(image)
