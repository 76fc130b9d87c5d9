"""Resizing equals Pillow's but for one level in few pixels."""

import warnings

import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image

from detr_d2.data.resize import ResizeShortestEdge, TensorResizeTransform


def photograph(height, width, seed=0):
    """Detail at several scales."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    coarse = np.asarray(small.resize((width, height), Image.BICUBIC), int)
    return (coarse + rng.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)


VIEWS = {
    "as read": lambda image: image,
    "flipped": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "BGR": lambda image: image[:, ::-1, ::-1],
    "cropped": lambda image: image[7:, 13:],
    "planes": lambda image: np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
    "read-only": lambda image: np.asarray(Image.fromarray(image)),
}


@pytest.mark.parametrize("size", [(400, 533), (800, 1066), (240, 320), (97, 640), (480, 640)])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_pixels_are_pillows(size, view):
    image = view(photograph(500, 700))[:480, :640]
    before = image.copy()
    expected = T.ResizeTransform(480, 640, *size, Image.BILINEAR).apply_image(image).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = TensorResizeTransform(480, 640, *size, Image.BILINEAR).apply_image(image)
    assert np.array_equal(image, before)
    assert actual.shape == (*size, 3) and actual.dtype == np.uint8
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3


def test_interleaved_channels_are_known_by_their_strides():
    """Else PyTorch would make planes of them, in three times the time."""
    resize = TensorResizeTransform(480, 640, 400, 533, Image.BILINEAR)
    assert resize.apply_image(photograph(480, 640)).flags.c_contiguous


def test_masks_and_other_images_are_detectron2s():
    theirs = T.ResizeTransform(40, 60, 80, 90, Image.BILINEAR)
    ours = TensorResizeTransform(40, 60, 80, 90, Image.BILINEAR)
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (40, 60), dtype=np.uint8)
    assert np.array_equal(ours.apply_segmentation(mask), theirs.apply_segmentation(mask))
    for image in (rng.random((40, 60, 3)).astype(np.float32), photograph(40, 60)[..., :1]):
        assert np.array_equal(ours.apply_image(image), theirs.apply_image(image))
    boxes = np.array([[3.0, 4, 20, 30]])
    assert np.array_equal(ours.apply_box(boxes), theirs.apply_box(boxes))


def test_sizes_are_chosen_as_detectron2_does():
    image = photograph(48, 64)
    for seed in range(10):
        sizes = []
        for kind in (T.ResizeShortestEdge, ResizeShortestEdge):
            np.random.seed(seed)
            transform = kind([20, 30, 40, 50], 60, "choice").get_transform(image)
            sizes.append((transform.new_h, transform.new_w))
        assert sizes[0] == sizes[1]


def test_narrow_images_keep_their_pixels():
    """1x1000 at a longer side of at most 90 would be 0 pixels high."""
    image = np.full((1, 1000, 3), 7, np.uint8)
    transform = ResizeShortestEdge([70], 90, "choice").get_transform(image)
    assert transform.apply_image(image).shape == (1, 90, 3)
