"""Frozen norms folded into weights: the same values and gradients, under the same names."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from detr_d2.modeling.frozen_norm import fold_frozen_norms, unfold_frozen_norms

from .helpers import tiny_cfg

R18 = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18)
R18 += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "FrozenBN")
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME")
BACKBONES = {
    "basic": ("MODEL.RESNETS.NORM", "FrozenBN"),
    "resnet18": R18,
    "timm resnet": (*TIMM, "test_resnet"),
    "timm efficientnet": (*TIMM, "test_efficientnet"),
    "timm lite0": (*TIMM, "tf_efficientnet_lite0"),
}


def make(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = build_backbone(tiny_cfg(*BACKBONES[name], "MODEL.BACKBONE.FREEZE_AT", 0))
    for module in backbone.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return backbone.train()


@pytest.mark.parametrize("name", BACKBONES)
def test_values_and_gradients_are_equal(name):
    plain = make(name).double()
    folded = copy.deepcopy(plain)
    norms = sum(hasattr(m, "running_var") for m in plain.modules())
    assert fold_frozen_norms(folded) == norms > 5
    assert folded.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, actual = plain(image), folded(image)
    for level, tensor in expected.items():
        torch.testing.assert_close(actual[level], tensor)
    for outputs in (expected, actual):
        sum((t / t.detach().abs().max()).sum() for t in outputs.values()).backward()
    for (parameter_name, ours), theirs in zip(
        folded.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=parameter_name)


@pytest.mark.parametrize("name", ["basic", "timm resnet"])
@torch.no_grad()
def test_state_dicts_load_either_way(name):
    plain, folded = make(name), make(name)
    fold_frozen_norms(folded)
    other = {key: tensor + 0.1 for key, tensor in plain.state_dict().items()}
    plain.load_state_dict(other)
    folded.load_state_dict(other)
    image = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(folded(image).values(), plain(image).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["basic", "timm efficientnet"])
@torch.no_grad()
def test_whole_modules_are_pickled_and_copied(name, tmp_path):
    folded = make(name)
    fold_frozen_norms(folded)
    torch.save(folded, tmp_path / "backbone.pth")
    image = torch.randn(1, 3, 64, 64)
    loaded = torch.load(tmp_path / "backbone.pth", weights_only=False)
    for other in (loaded, copy.deepcopy(folded)):
        assert [type(m) for m in other.modules()] == [type(m) for m in folded.modules()]
        for ours, theirs in zip(other(image).values(), folded(image).values(), strict=True):
            assert torch.equal(ours, theirs)
    unfold_frozen_norms(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in make(name).modules()]


@torch.no_grad()
@pytest.mark.parametrize("name", ["basic", "timm resnet"])
def test_weights_are_there_to_be_changed(name):
    """A product in their place would take changes and lose them."""
    plain = make(name)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    convolution = next(m for m in folded.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight is next(p for p in folded.parameters() if p.ndim == 4)
    assert convolution.bias is None
    for backbone in (plain, folded):
        convolution = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
        with torch.no_grad():
            convolution.weight.mul_(2)
    image = torch.randn(1, 3, 64, 96)
    for level, expected in plain(image).items():
        torch.testing.assert_close(folded(image)[level], expected, rtol=1e-4, atol=1e-4)
    assert fold_frozen_norms(folded) == 0  # once is enough


def test_unfolding_brings_back_what_was():
    backbone = make("timm efficientnet")
    types = [type(m) for m in backbone.modules()]
    image = torch.randn(1, 3, 64, 64)
    expected = list(backbone(image).values())[-1]
    fold_frozen_norms(backbone)
    assert [type(m) for m in backbone.modules()] != types
    assert backbone.training
    unfold_frozen_norms(backbone)
    assert [type(m) for m in backbone.modules()] == types
    assert torch.equal(list(backbone(image).values())[-1], expected)


def test_norms_that_learn_are_left_alone():
    torch.manual_seed(0)
    backbone = build_backbone(tiny_cfg())
    assert fold_frozen_norms(backbone) == 0


def test_norms_that_others_hold_are_left_to_them():
    """As modulated deformable convolutions do, which no CPU can run to show what follows what."""

    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, 3, 3))
            self.norm = FrozenBatchNorm2d(4)

        def forward(self, x):
            raise NotImplementedError

    module = nn.Sequential(nn.Conv2d(3, 4, 1), Deformable())
    assert fold_frozen_norms(module) == 0
    assert type(module[1].norm) is FrozenBatchNorm2d
