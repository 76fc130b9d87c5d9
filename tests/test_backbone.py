"""Backbones against torchvision's and timm's own words."""

import logging
import re
import sys

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn

from detr_d2 import get_detr_cfg
from detr_d2.checkpoint import load_weights
from detr_d2.errors import UserError, require_package
from detr_d2.modeling.backbone import warn_of_other_pixels
from detr_d2.modeling.neck import padding_mask, resize_padding, valid_ratio

from .helpers import tiny_cfg


def resnet_cfg(*options):
    cfg = get_detr_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(options))
    return cfg


DC5 = ("MODEL.BACKBONE.NAME", "build_resnet_dc5_backbone", "MODEL.RESNETS.RES5_DILATION", 2)


def detectron2_name(name):
    """torchvision's name of a ResNet's tensor -> detectron2's."""
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"bn(\d)", r"conv\1.norm", name)


@torch.no_grad()
def assert_equal_to_torchvision(backbone, theirs):
    """Copies random weights and compares all four maps on an odd-sized image."""
    torch.manual_seed(0)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.3, 0.6)
            module.bias.normal_(std=0.1)
    state = {
        detectron2_name(name): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    backbone.load_state_dict(state)
    backbone.eval()
    theirs.eval()

    image = torch.randn(1, 3, 75, 106)
    maps = backbone(image)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    for index in range(1, 5):
        x = getattr(theirs, f"layer{index}")(x)
        actual = maps[f"res{index + 1}"]
        assert x.std() > 0.01
        torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_r50_is_torchvisions():
    backbone = build_backbone(resnet_cfg())
    assert_equal_to_torchvision(backbone, torchvision.models.resnet50())
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 32]


def test_dc5_is_torchvisions():
    backbone = build_backbone(resnet_cfg(*DC5))
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    assert_equal_to_torchvision(backbone, theirs)
    assert backbone.output_shape()["res5"].stride == 16


def test_dc5_is_not_detectron2s_dilation():
    plain = build_backbone(resnet_cfg("MODEL.RESNETS.RES5_DILATION", 2))
    dc5 = build_backbone(resnet_cfg(*DC5))
    dilations = [[block.conv2.dilation[0] for block in b.res5] for b in (plain, dc5)]
    assert dilations == [[2, 2, 2], [1, 2, 2]]
    dc5.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = [b.eval()(image)["res5"] for b in (plain, dc5)]
    assert maps[0].shape == maps[1].shape
    assert not torch.allclose(*maps, rtol=1e-2)


def test_dc5_refuses_a_config_without_dilation():
    with pytest.raises(UserError, match="needs MODEL.RESNETS.RES5_DILATION: 2, got 1"):
        build_backbone(resnet_cfg("MODEL.BACKBONE.NAME", "build_resnet_dc5_backbone"))


@pytest.mark.parametrize("depth", [18, 34])
def test_r18_and_r34_are_torchvisions(depth):
    cfg = resnet_cfg("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert_equal_to_torchvision(build_backbone(cfg), theirs)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
@pytest.mark.parametrize("dc5", [False, True])
def test_freeze_at(freeze_at, dc5):
    with torch.device("meta"):
        options = ("MODEL.BACKBONE.FREEZE_AT", freeze_at, *(DC5 if dc5 else ()))
        backbone = build_backbone(resnet_cfg(*options))
    parts = ["stem", "res2", "res3", "res4", "res5"]
    for index, part in enumerate(parts):
        trained = {p.requires_grad for p in getattr(backbone, part).parameters()}
        assert trained == {index >= freeze_at}, part


def test_basic_resnet():
    cfg = tiny_cfg(
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 6,
        "MODEL.BASIC_RESNET.BLOCKS_PER_STAGE", [1, 2, 1],
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"], "MODEL.BACKBONE.FREEZE_AT", 2,
    )  # fmt: skip
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    assert [shape.channels for shape in shapes.values()] == [6, 12, 24]
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16]
    assert [len(getattr(backbone, name)) for name in shapes] == [1, 2, 1]
    maps = backbone(torch.randn(2, 3, 64, 96))
    for name, shape in shapes.items():
        assert maps[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert not any(p.requires_grad for p in backbone.res2.parameters())
    assert all(p.requires_grad for p in backbone.res3.parameters())


def test_basic_resnet_with_r18s_numbers_is_r18():
    options = (
        "MODEL.BACKBONE.NAME", "build_basic_resnet_backbone",
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    )  # fmt: skip
    assert_equal_to_torchvision(build_backbone(resnet_cfg(*options)), torchvision.models.resnet18())


def timm_cfg(name, *options):
    pytest.importorskip("timm")
    return tiny_cfg("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name, *options)


@pytest.mark.parametrize(
    ("name", "out_indices", "count"),
    [("test_resnet", [], 5), ("test_resnet", [2, 4], 2), ("test_efficientnet", [3], 1)],
)
def test_timm_shapes(name, out_indices, count):
    backbone = build_backbone(timm_cfg(name, "MODEL.TIMM.OUT_INDICES", out_indices)).eval()
    shapes = backbone.output_shape()
    assert list(shapes) == [f"p{index}" for index in range(count)]
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 128))
    assert list(maps) == list(shapes)
    for key, shape in shapes.items():
        expected = (2, shape.channels, 64 // shape.stride, 128 // shape.stride)
        assert maps[key].shape == expected


def test_timm_is_timm():
    timm = pytest.importorskip("timm")
    backbone = build_backbone(timm_cfg("test_resnet")).eval()
    body = timm.create_model("test_resnet", features_only=True).eval()
    state = {name: tensor for name, tensor in body.state_dict().items() if "tracked" not in name}
    backbone.body.load_state_dict(state)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image).values(), body(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_timm_norms_are_frozen_unless_asked_otherwise():
    frozen = build_backbone(timm_cfg("test_efficientnet"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    frozen.train()(torch.randn(2, 3, 64, 64))
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in frozen.named_buffers())
    free = build_backbone(timm_cfg("test_efficientnet", "MODEL.TIMM.FREEZE_NORM", False))
    assert any(isinstance(module, nn.BatchNorm2d) for module in free.modules())


def test_pixels_that_pretrained_weights_do_not_know_are_named(caplog, monkeypatch):
    """TensorFlow's EfficientNets were trained with 127.5, most others with ImageNet's mean."""
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    cfg = timm_cfg("tf_efficientnet_lite0", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53])
    warn_of_other_pixels(cfg)
    [message] = [r.getMessage() for r in caplog.records if "PIXEL_MEAN" in r.getMessage()]
    assert "were trained with [127.5, 127.5, 127.5]" in message
    caplog.clear()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    cfg.INPUT.FORMAT = "BGR"
    warn_of_other_pixels(cfg)
    [record] = caplog.records
    assert "timm's weights want RGB" in record.getMessage()
    caplog.clear()
    cfg.INPUT.FORMAT = "RGB"
    warn_of_other_pixels(cfg)
    assert not caplog.records


def test_timm_names_that_do_not_exist():
    with pytest.raises(UserError, match="MODEL.TIMM.NAME is 'resnet_fifty'"):
        build_backbone(timm_cfg("resnet_fifty"))
    with pytest.raises(UserError, match=r"MODEL.TIMM.OUT_INDICES \[9\]"):
        build_backbone(timm_cfg("test_resnet", "MODEL.TIMM.OUT_INDICES", [9]))


def test_timm_models_of_one_size_say_so():
    backbone = build_backbone(timm_cfg("test_vit_relpos", "MODEL.TIMM.OUT_INDICES", [0]))
    with pytest.raises(UserError, match="NAME .test_vit_relpos. does not take .* 96x64 .*choose"):
        backbone(torch.zeros(1, 3, 64, 96))


def test_timm_is_asked_for_where_it_is_missing(monkeypatch):
    cfg = timm_cfg("test_resnet")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_backbone(cfg)


def test_a_package_that_lacks_another_one_says_so_itself(monkeypatch, tmp_path):
    """ "Not installed" would be wrong of it."""
    (tmp_path / "half_installed.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        require_package("half_installed", "test")


def test_detectron2s_norm_is_frozen():
    backbone = build_backbone(
        resnet_cfg("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    )
    norms = [module for name, module in backbone.named_modules() if name.endswith("norm")]
    assert len(norms) == 20
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)


# The padding mask follows from the backbone's map size.


def test_padding_mask():
    padding = padding_mask(torch.tensor([(2, 3), (4, 1)]), (4, 3))
    assert padding.dtype == torch.bool
    assert (~padding).long().tolist() == [
        [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]],
    ]


def test_padding_is_resized_by_the_nearest_rule():
    """Cell i looks at pixel floor(i * pixels / cells); rounding sizes up by the stride differs."""
    differences = 0
    sizes = [(padded, valid) for padded in range(33, 1334, 61) for valid in range(7, padded, 53)]
    for padded, valid in sizes:
        cells = -(-padded // 32)
        padding = padding_mask(torch.tensor([(valid, padded), (padded, valid)]), (padded, padded))
        resized = resize_padding(padding, (cells, cells))
        expected = [i * padded // cells >= valid for i in range(cells)]
        assert resized[0, :, 0].tolist() == expected, (padded, valid)
        assert resized[1, 0].tolist() == expected, (padded, valid)
        ceiling = [i >= -(-valid // 32) for i in range(cells)]
        differences += expected != ceiling
    # Along one side; of images with two sides, more than a third differ.
    assert len(sizes) / 5 < differences < len(sizes)


def test_valid_ratio():
    padding = padding_mask(torch.tensor([(2, 3), (4, 6)]), (4, 6))
    # Width first.
    assert valid_ratio(padding).tolist() == [[0.5, 0.5], [1, 1]]
    padding = padding_mask(torch.tensor([(1, 6)]), (4, 6))
    assert valid_ratio(padding).tolist() == [[1, 0.25]]


@pytest.mark.parametrize(
    ("name", "freeze_at", "last"),
    [
        ("tf_efficientnet_lite0", 0, None),
        ("tf_efficientnet_lite0", 1, "blocks.0.0.conv_pw.weight"),
        ("tf_efficientnet_lite0", 3, "blocks.2.1.conv_pwl.weight"),
        ("resnet18", 1, "conv1.weight"),
        ("resnet18", 2, "layer1.1.conv2.weight"),
        ("convnext_atto", 2, "stages_0.blocks.1.mlp.fc2.bias"),
    ],
)
def test_freeze_at_of_timm(name, freeze_at, last):
    """Everything up to the map of stride 2 ** freeze_at, and nothing after it."""
    pytest.importorskip("timm")
    options = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name)
    body = build_backbone(tiny_cfg(*options, "MODEL.BACKBONE.FREEZE_AT", freeze_at)).body
    names = [name for name, _ in body.named_parameters()]
    frozen = [name for name, p in body.named_parameters() if not p.requires_grad]
    assert frozen == (names[: names.index(last) + 1] if last else [])


def test_imagenet_weights_go_below_an_fpn(tmp_path):
    """Whose ResNet detectron2 calls bottom_up."""
    fpn = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18)
    fpn += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"])
    fpn += ("MODEL.FPN.IN_FEATURES", ["res4", "res5"], "MODEL.DETR.IN_FEATURES", ["p5"])
    fpn += ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    model, theirs = build_model(tiny_cfg(*fpn)), torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    report, _ = load_weights(model, str(tmp_path / "resnet18.pth"))
    loaded = model.state_dict()["backbone.bottom_up.res5.1.conv2.weight"]
    assert torch.equal(loaded, theirs.layer4[1].conv2.weight)
    assert not [name for name in report.initial if name.startswith("backbone.bottom_up")]
