"""Weights, images and targets made by rule, for which the official implementations' outputs are
known. tests/parity/*.npz hold those outputs and the official names and shapes of the tensors.

Every tensor is drawn from a generator seeded with its name, so both sides can build it; gains keep
activations in a range where a wrong detail shows.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

FOLDER = Path(__file__).parent / "parity"
IMAGE_SIZES = {0: (256, 320), 1: (224, 288), 2: (256, 200)}
OBJECTS = {0: 3, 1: 3, 2: 7}
BATCHES = {"A": [0], "B": [1, 2]}

GAINS = [
    (r"backbone\.|mask_head\.", 2**0.5),
    (r"class_embed\.", 2.0),
    (r"self_attn\.out(put)?_proj", 0.1),
    (r"(cross_attn|multihead_attn)\.out_proj", 8.0),
    (r"[sc]a_[qk]\w*_proj", 2.4),
    (r"in_proj_weight|bbox_attention|decoder\.query_scale", 1.5),
    (r"linear2", 0.3),
    (r"ref_point_head|reference_points", 1.5),
]


def generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


# Picked so that no two scores that rank the encoder's proposals are nearly equal.
SALTS = {
    "transformer.enc_out_class_embed.": "#2882",
    "transformer.decoder.class_embed.6.": "#5822",
}
EMBEDDINGS = r"(^|\.)((query_embed|refpoint_embed|tgt_embed|label_enc)\.weight|level_embed)$"


def make_tensor(name: str, shape: list[int]) -> np.ndarray:
    salt = next((salt for prefix, salt in SALTS.items() if name.startswith(prefix)), "")
    noise = generator(f"0:{name}{salt}").standard_normal(shape)
    if re.search(EMBEDDINGS, name):
        value = noise
    elif len(shape) >= 2:
        gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
        centred = noise - noise.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        value = centred * gain / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    elif name.endswith("activation.weight"):
        value = 0.25 + 0.05 * noise
    elif name.endswith(".weight"):
        value = 1 + 0.1 * noise.clip(-3, 3)
        if re.search(r"layer\d\.\d+\.bn3\.weight$", name):
            value = 0.3 * value
    else:
        value = 0.1 * noise
    return value.astype(np.float32)


def make_state_dict(
    shapes: dict[str, list[int]], aliases: dict[str, str]
) -> dict[str, torch.Tensor]:
    """`aliases`: names of the same tensor -> the first of them, which seeds it."""
    return {
        name: torch.from_numpy(make_tensor(aliases.get(name, name), shape))
        for name, shape in shapes.items()
    }


def corners_of(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy in float64 of boxes that are stored in float32."""
    centre, size = (part.astype(np.float32).astype(np.float64) for part in (centre, size))
    return np.concatenate((centre - size / 2, centre + size / 2), axis=1)


def make_input(index: int) -> dict:
    """One element of a model's input; the image is the network's input, already normalised."""
    height, width = IMAGE_SIZES[index]
    image = generator(f"0:image{index}").standard_normal((3, height, width)).astype(np.float32)
    targets = generator(f"0:target{index}")
    uniform = targets.random((OBJECTS[index], 4))
    labels = targets.integers(1, 91, size=OBJECTS[index])
    size = 0.1 + 0.4 * uniform[:, 2:]
    centre = size / 2 + (1 - size) * uniform[:, :2]
    corners = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.from_numpy(corners * [width, height, width, height]).float())
    instances.gt_classes = torch.from_numpy(labels)
    # A mask has the pixels whose middle is in the box.
    low, high = np.split(corners_of(centre, size), 2, axis=1)
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    across = (low[:, :1] <= x) & (x < high[:, :1])
    down = (low[:, 1:] <= y) & (y < high[:, 1:])
    instances.gt_masks = BitMasks(torch.from_numpy(down[:, :, None] & across[:, None]))
    # The published post-processing was asked for 480x640.
    return {
        "image": torch.from_numpy(image),
        "instances": instances,
        "height": 480,
        "width": 640,
    }
