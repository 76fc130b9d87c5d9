"""Names of ResNets: rows of tables, see names.py. Own names are detectron2's."""

from __future__ import annotations

from .names import Row


def torchvision_resnet(prefix: str) -> tuple[Row, ...]:
    """torchvision's and timm's names, bottleneck and basic blocks alike."""
    rows = [
        ("backbone.stem.conv1.weight", prefix + "conv1.weight"),
        ("backbone.stem.conv1.norm.*", prefix + "bn1.*"),
    ]
    for stage in range(1, 5):
        own, foreign = f"backbone.res{stage + 1}.#.", f"{prefix}layer{stage}.#."
        rows += [
            (own + "shortcut.weight", foreign + "downsample.0.weight"),
            (own + "shortcut.norm.*", foreign + "downsample.1.*"),
        ]
        for conv in (1, 2, 3):
            rows += [
                (own + f"conv{conv}.weight", foreign + f"conv{conv}.weight"),
                (own + f"conv{conv}.norm.*", foreign + f"bn{conv}.*"),
            ]
    return tuple(rows)


def huggingface_resnet(prefix: str) -> tuple[Row, ...]:
    """Hugging Face's own ResNet, the body of models made with ``use_timm_backbone=False``."""
    rows = [
        ("backbone.stem.conv1.weight", prefix + "embedder.embedder.convolution.weight"),
        ("backbone.stem.conv1.norm.*", prefix + "embedder.embedder.normalization.*"),
    ]
    for stage in range(4):
        own, foreign = f"backbone.res{stage + 2}.#.", f"{prefix}encoder.stages.{stage}.layers.#."
        rows += [
            (own + "shortcut.weight", foreign + "shortcut.convolution.weight"),
            (own + "shortcut.norm.*", foreign + "shortcut.normalization.*"),
        ]
        for conv in (0, 1, 2):
            rows += [
                (own + f"conv{conv + 1}.weight", foreign + f"layer.{conv}.convolution.weight"),
                (own + f"conv{conv + 1}.norm.*", foreign + f"layer.{conv}.normalization.*"),
            ]
    return tuple(rows)
