"""Activation checkpointing changes no gradient and keeps less; a compiled training is the same."""

import pytest
import torch
from detectron2.modeling import build_model

from detr_d2.errors import UserError
from detr_d2.modeling.recompute import Recomputed

from .helpers import random_inputs, tiny_cfg

FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN")
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "test_resnet")


def make(parts, *options, variant="detr_tiny"):
    torch.manual_seed(0)
    options = (*FROZEN, *options, "MODEL.ACTIVATION_CHECKPOINTING", parts)
    return build_model(tiny_cfg(*options, config=variant)).train()


def step(model):
    """Losses, gradients, and how many numbers are kept for the backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(1)  # dropout and noise
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses = model(random_inputs([(128, 160), (96, 128)], [2, 1]))
    sum(losses.values()).backward()
    return losses, [p.grad for p in model.parameters() if p.grad is not None], sum(kept)


@pytest.mark.parametrize(
    ("parts", "options", "variant"),
    [
        (["encoder"], ("MODEL.DETR.DROPOUT", 0.2), "detr_tiny"),
        (["backbone"], (), "detr_tiny"),
        (["backbone", "encoder"], ("MODEL.DETR.DROPOUT", 0.2), "detr_tiny"),
        (["backbone", "encoder"], (), "dino_tiny"),
        (["backbone"], TIMM, "detr_tiny"),
        (["sampling"], (), "dino_tiny"),
        (["encoder", "sampling"], (), "deformable_tiny"),
    ],
)
def test_gradients_are_equal_and_less_is_kept(parts, options, variant):
    if "MODEL.TIMM.NAME" in options:
        pytest.importorskip("timm")
    losses, gradients, kept = step(make([], *options, variant=variant))
    again, others, fewer = step(make(parts, *options, variant=variant))
    for name, loss in losses.items():
        torch.testing.assert_close(again[name], loss, rtol=0, atol=0)
    for ours, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert fewer < 0.9 * kept


@torch.no_grad()
def test_inference_and_copies_are_as_before():
    import copy

    plain, recomputing = make([]).eval(), make(["backbone", "encoder"]).eval()
    inputs = random_inputs([(64, 96)])
    for model in (recomputing, copy.deepcopy(recomputing)):
        assert torch.equal(model.predict(inputs)[-1].boxes, plain.predict(inputs)[-1].boxes)
    copied = copy.deepcopy(recomputing)
    block = copied.backbone.stages[0][0]
    assert isinstance(block.forward, Recomputed) and block.forward.module is block
    assert recomputing.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.RESNETS.NORM", "SyncBN"), "batch norms that learn would count every batch twice"),
        (("MODEL.RESNETS.NORM", "BN"), "batch norms that learn would count every batch twice"),
        (("MODEL.ACTIVATION_CHECKPOINTING", ["decoder"]), "names 'decoder'; it may have backbone"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    cfg = tiny_cfg(*FROZEN, "MODEL.ACTIVATION_CHECKPOINTING", ["backbone"], *options)
    with pytest.raises(UserError, match=message):
        build_model(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["detr_tiny", "fast_tiny"])
def test_a_compiled_training_step_is_the_same(variant):
    from detr_d2.engine.trainer import compile_for_training

    plain, compiled = make([], variant=variant), make([], variant=variant)
    compile_for_training(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for sizes in ([(64, 96), (80, 64)], [(128, 64), (70, 90)]):
        totals = []
        for model in (plain, compiled):
            torch.manual_seed(1)
            total = sum(model(random_inputs(sizes, [2, 1])).values())
            total.backward()
            totals.append(total.item())
        assert totals[1] == pytest.approx(totals[0], rel=1e-4)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3 * scale + 1e-4)
