"""Configs and weights by name."""

import pytest
import torch

from detr_d2 import model_zoo
from detr_d2.errors import UserError


@pytest.mark.parametrize("name", model_zoo.CHECKPOINTS)
def test_every_entry_has_a_config_and_weights(name):
    cfg = model_zoo.get_config(f"{name}.yaml", trained=True)
    assert cfg.MODEL.META_ARCHITECTURE == "Detr"
    assert model_zoo.get_checkpoint_url(f"{name}.yaml") == cfg.MODEL.WEIGHTS
    if name.startswith("COCO"):
        assert cfg.MODEL.WEIGHTS.startswith("https://dl.fbaipublicfiles.com/detr/detr-r")
        assert (25 if cfg.MODEL.MASK_ON else 500) == cfg.SOLVER.EPOCHS
        assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 0.1


def test_untrained_config_keeps_its_weights():
    cfg = model_zoo.get_config("COCO-Detection/detr_R_101_500ep.yaml")
    assert cfg.MODEL.WEIGHTS.endswith("torchvision/R-101.pkl")


def test_unknown_names_are_refused():
    with pytest.raises(
        UserError, match="no config .*dino_4scale_R_51.yaml': .*dino_4scale_R_50_12"
    ):
        model_zoo.get_config("COCO-Detection/dino_4scale_R_51.yaml")
    with pytest.raises(UserError, match="no config 'nonsense': they lie in .*configs"):
        model_zoo.get_config("nonsense")
    with pytest.raises(UserError, match="no trained weights"):
        model_zoo.get_checkpoint_url("Base-DETR.yaml")


@pytest.mark.parametrize("name", ["detr_tiny", "fast_small", "fast_small_masks"])
def test_get_loads_the_committed_weights(name):
    config = f"DigitScenes/{name}.yaml"
    trained = model_zoo.get(config, trained=True)
    assert trained.training and trained.device.type == "cpu"
    torch.manual_seed(0)
    fresh = model_zoo.get(config)
    state, other = trained.state_dict(), fresh.state_dict()
    changed = [name for name in state if not torch.equal(state[name], other[name])]
    # Every weight was trained, so every one differs from a fresh model's.
    assert {n for n in state if n.endswith("weight")} <= set(changed)
