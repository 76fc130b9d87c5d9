"""Resizing equals Pillow's but for one level in few pixels."""

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


@pytest.mark.parametrize("size", [(400, 533), (800, 1066), (240, 320), (97, 640), (480, 640)])
@pytest.mark.parametrize("flipped", [False, True])
def test_pixels_are_pillows(size, flipped):
    image = photograph(480, 640)
    image = image[:, ::-1] if flipped else image
    expected = T.ResizeTransform(480, 640, *size, Image.BILINEAR).apply_image(image).astype(int)
    actual = TensorResizeTransform(480, 640, *size, Image.BILINEAR).apply_image(image)
    assert actual.shape == (*size, 3) and actual.dtype == np.uint8
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3


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


def test_the_image_itself_is_not_changed():
    image = photograph(48, 64)
    before = image.copy()
    TensorResizeTransform(48, 64, 30, 40, Image.BILINEAR).apply_image(image)
    assert np.array_equal(image, before)
