"""Image files to arrays, as detectron2 reads them, JPEGs in less time.

Shapes: H and W in pixels, C channels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to remove it; Pillow reads everything
    decode_jpeg = None

EXIF_ORIENTATION = 274


class UnreadableImageError(UserError, OSError):
    """An image file that is missing or cannot be decoded; the message names it."""


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """An image (H, W, C) uint8, turned as its Exif data says.

    Raises:
        UnreadableImageError: the file is missing or cannot be decoded.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            header = Image.open(file)
            if header.mode[0] in "IF":
                raise ValueError(f"its pixels have the type {header.mode}, convert it to 8 bits")
            pixels = None
            if image_format in ("RGB", "BGR") and is_upright_jpeg(header):
                file.seek(0)
                pixels = decode(file.read())
        if pixels is not None:
            return pixels if image_format == "RGB" else pixels[:, :, ::-1]
        return detection_utils.read_image(file_name, format=image_format)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise UnreadableImageError(
            f"Cannot read the image {file_name} ({type(error).__name__}: {error})"
        ) from error


def is_upright_jpeg(header: Image.Image) -> bool:
    """Of three channels, and shown as it is stored."""
    if header.format != "JPEG" or header.mode != "RGB":
        return False
    try:
        return header.getexif().get(EXIF_ORIENTATION) not in range(2, 9)
    except Exception:  # of broken Exif data anything; detectron2 knows what to do then
        return False


def decode(jpeg: bytes) -> np.ndarray | None:
    """(H, W, 3) RGB, the pixels that Pillow gives, without its copies of them; None where
    torchvision will not, so that Pillow has the last word and its message."""
    if decode_jpeg is None:
        return None
    try:
        with warnings.catch_warnings():  # it says that it is going to be removed, see above
            warnings.simplefilter("ignore")
            data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
            return decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except MemoryError:
        raise
    except Exception:  # also of a torchvision that was built without it
        return None
