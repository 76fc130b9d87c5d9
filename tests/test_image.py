"""Image files are read as detectron2 reads them, whatever state they are in."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from detr_d2.data import image as image_module
from detr_d2.data.image import UnreadableImageError, read_image


def noisy_jpeg(height: int = 91, width: int = 123, mode: str = "RGB", **options) -> bytes:
    colours = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    pixels = np.kron(colours, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[274] = orientation
    return data


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 50, "subsampling": 0},
        {"subsampling": 1, "progressive": True},
        {"height": 1, "width": 1},
        {"mode": "L"},
        {"mode": "CMYK"},
        *({"exif": exif(orientation)} for orientation in range(10)),
        {"exif": b"Exif\0\0garbage!!", "dpi": (72, 72)},
        {"exif": b"Exif\0\0MM\0*\0\0", "dpi": (72, 72)},
    ],
)
def test_jpegs_have_the_pixels_that_detectron2_reads(options, image_format, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(noisy_jpeg(**options))
    pixels = read_image(str(path), image_format)
    expected = detection_utils.read_image(str(path), image_format)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_upright_jpegs_need_no_pillow(tmp_path, monkeypatch):
    path = tmp_path / "image.jpg"
    path.write_bytes(noisy_jpeg())
    expected = detection_utils.read_image(str(path), "RGB")
    monkeypatch.setattr(detection_utils, "read_image", None)
    np.testing.assert_array_equal(read_image(str(path), "RGB"), expected)


def test_broken_jpegs_are_read_where_detectron2_reads_them(tmp_path):
    """Bytes changed, lost and cut off: the same pixels, or an error where there is one."""
    rng = random.Random(0)
    whole, read, refused = noisy_jpeg(), 0, 0
    path = str(tmp_path / "image.jpg")
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(1, len(data)) :]
        for _ in range(rng.choice((0, 1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        Path(path).write_bytes(data)
        try:
            expected = detection_utils.read_image(path, "RGB")
        except Exception:
            with pytest.raises(UnreadableImageError):
                read_image(path, "RGB")
            refused += 1
        else:
            np.testing.assert_array_equal(read_image(path, "RGB"), expected)
            read += 1
    assert read > 50 and refused > 50


def test_pillow_names_what_is_wrong(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(noisy_jpeg()[:1500])
    with pytest.raises(UnreadableImageError, match="cut.jpg.*truncated"):
        read_image(str(path), "RGB")


@pytest.mark.parametrize("state", ["removed", RuntimeError, AttributeError])
def test_without_torchvisions_decoder(state, tmp_path, monkeypatch):
    path = tmp_path / "image.jpg"
    path.write_bytes(noisy_jpeg())

    def broken(*_):
        raise state("torchvision was built without libjpeg")

    monkeypatch.setattr(image_module, "decode_jpeg", None if state == "removed" else broken)
    expected = detection_utils.read_image(str(path), "RGB")
    np.testing.assert_array_equal(read_image(str(path), "RGB"), expected)
