"""Parameter groups, optimizers and clipping."""

import pytest
import torch
from torch import nn

from detr_d2 import get_detr_cfg
from detr_d2.engine import build_optimizer
from detr_d2.engine.optimizer import full_model_clip_norm
from detr_d2.errors import UserError


class Model(nn.Module):
    """Names as a detector has them; each weight has another size to be told by."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"stem": nn.Linear(1, 2), "norm": nn.BatchNorm2d(3), "frozen": nn.Linear(1, 50)}
        )
        self.backbone["frozen"].requires_grad_(False)
        self.neck = nn.Linear(1, 5)
        # Belongs to no backbone, whatever it is called.
        self.timm_backbone_x = nn.Linear(1, 7)
        self.wrapped = nn.ModuleDict({"backbone": nn.Linear(1, 11)})


@pytest.fixture
def cfg():
    cfg = get_detr_cfg()
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 0.25
    return cfg


def learning_rates(optimizer, model):
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {
        name: rates[id(parameter)]
        for name, parameter in model.named_parameters()
        if id(parameter) in rates
    }


def test_backbone_has_its_own_learning_rate(cfg):
    model = Model()
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = learning_rates(optimizer, model)
    expected = {"backbone.stem": 0.05, "backbone.norm": 0.05, "wrapped.backbone": 0.05}
    expected |= {"neck": 0.5, "timm_backbone_x": 0.5}
    assert rates == {
        f"{module}.{kind}": pytest.approx(rate)
        for module, rate in expected.items()
        for kind in ("weight", "bias")
    }
    # Norms and biases too, as in the original.
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


def test_biases_as_detectron2_sets_them(cfg):
    cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_BIAS = 2.0, 0.0
    groups = build_optimizer(cfg, Model()).param_groups
    decays = {(p.ndim, group["weight_decay"]) for group in groups for p in group["params"]}
    assert {decay for ndim, decay in decays if ndim == 2} == {0.25}
    assert 0.0 in {decay for ndim, decay in decays if ndim == 1}
    assert max(group["lr"] for group in groups) == 1.0


def test_places_to_look_at_have_their_own_learning_rate(cfg):
    """Of Deformable DETR: sampling offsets and reference points."""
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.2
    model = Model()
    model.decoder = nn.ModuleDict(
        {"sampling_offsets": nn.Linear(1, 17), "reference_head": nn.Linear(1, 19)}
    )
    rates = learning_rates(build_optimizer(cfg, model), model)
    assert rates["decoder.sampling_offsets.weight"] == pytest.approx(0.1)
    assert rates["decoder.reference_head.bias"] == pytest.approx(0.1)
    assert rates["neck.weight"] == 0.5


def test_mask_head_has_its_own_learning_rate(cfg):
    cfg.SOLVER.MASK_HEAD_MULTIPLIER = 4.0
    model = Model()
    model.mask_head = nn.Linear(1, 13)
    rates = learning_rates(build_optimizer(cfg, model), model)
    assert rates["mask_head.weight"] == rates["mask_head.bias"] == 2.0
    assert rates["neck.weight"] == 0.5 and rates["backbone.stem.weight"] == pytest.approx(0.05)


def test_sgd(cfg):
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV = "SGD", 0.75, True
    model = Model()
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.75, True)}
    assert learning_rates(optimizer, model)["backbone.stem.weight"] == pytest.approx(0.05)


def test_one_step_of_adamw(cfg):
    """The first step moves by lr * sign of the gradient, after a decay by lr * weight decay."""
    model = Model()
    nn.init.ones_(model.neck.weight)
    nn.init.ones_(model.backbone["stem"].weight)
    optimizer = build_optimizer(cfg, model)
    (3 * model.neck.weight.sum() - 2 * model.backbone["stem"].weight.sum()).backward()
    optimizer.step()
    assert model.neck.weight[0, 0].item() == pytest.approx(1 - 0.5 * 0.25 - 0.5)
    assert model.backbone["stem"].weight[0, 0].item() == pytest.approx(1 - 0.05 * 0.25 + 0.05)


def test_unknown_optimizer(cfg):
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER is 'LION'.*ADAMW or SGD"):
        build_optimizer(cfg, Model())


def test_everything_frozen(cfg):
    with pytest.raises(UserError, match="everything is frozen"):
        build_optimizer(cfg, Model().requires_grad_(False))


def test_full_model_clipping_is_the_trainers(cfg):
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    assert full_model_clip_norm(cfg) is None  # not enabled
    clipping.ENABLED, clipping.CLIP_TYPE, clipping.CLIP_VALUE = True, "full_model", 0.1
    assert full_model_clip_norm(cfg) == 0.1
    assert type(build_optimizer(cfg, Model())) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("kind", "expected"), [("value", [0.1, -0.1]), ("norm", [0.1 * 0.6, -0.1 * 0.8])]
)
def test_clipping_per_parameter_is_detectron2s(cfg, kind, expected):
    """The gradient (3, -4) has the norm 5."""
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    clipping.ENABLED, clipping.CLIP_TYPE, clipping.CLIP_VALUE = True, kind, 0.1
    assert full_model_clip_norm(cfg) is None
    model = Model()
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.backbone["stem"].weight
    weight.grad = torch.tensor([[3.0], [-4.0]])
    optimizer.step()
    assert weight.grad.flatten().tolist() == pytest.approx(expected)


def test_unknown_clipping(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "all"
    with pytest.raises(UserError, match="CLIP_TYPE is 'all'.*full_model, value or norm"):
        build_optimizer(cfg, Model())


def test_other_norms_of_the_full_model_are_refused(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = float("inf")
    with pytest.raises(UserError, match="NORM_TYPE is inf: full_model clips by the 2-norm"):
        full_model_clip_norm(cfg)
