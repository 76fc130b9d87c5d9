"""A loss that is not finite: what is said, and what survives."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from torch import nn

from detr_d2.engine import DetrTrainer
from detr_d2.engine.diagnose import DivergedError, find_non_finite_module, watch_outputs
from detr_d2.engine.precision import Precision
from detr_d2.errors import UserError
from detr_d2.structures import LayerOutput

from .helpers import random_inputs, tiny_cfg
from .test_masks import MASKS, inputs_with_masks
from .training import training_cfg


@pytest.fixture
def make_trainer(rectangles, tmp_path):
    def make(*options):
        return DetrTrainer(training_cfg(rectangles, tmp_path, *options))

    return make


class At(HookBase):
    """Does something before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


def test_all_that_training_computes_is_looked_at():
    """Also what detection alone does without: masks, and queries made from ground truth."""
    for name, options in (
        ("mask_head.convs.1", (*MASKS, "MODEL.DETR.FROZEN_WEIGHTS", "x.pth")),
        ("mask_head.convs.1", MASKS),
        ("transformer.denoising.label_embedding", ()),
    ):
        torch.manual_seed(0)
        model = build_model(tiny_cfg(*options, config="fast_tiny")).train()
        nn.init.constant_(model.get_submodule(name).weight, float("nan"))
        found = find_non_finite_module(model, [inputs_with_masks()], Precision("cpu", False))
        assert found == name


def test_synchronised_norms_wait_for_nobody():
    model = build_model(tiny_cfg())
    model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    norm = next(m for m in model.modules() if isinstance(m, nn.SyncBatchNorm))
    before = norm.running_mean.clone()
    batches = [random_inputs([(64, 64)], [1])]
    assert find_non_finite_module(model.train(), batches, Precision("cpu")) is None
    assert torch.equal(norm.running_mean, before) and norm.training


def test_module_iteration_rate_and_images_are_named(make_trainer, tmp_path):
    trainer = make_trainer("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.WARMUP_ITERS", 0)
    layer = trainer.model.transformer.encoder.layers[1].ffn.linear1
    poison = At(2, lambda: nn.init.constant_(layer.weight, float("nan")))
    files = []
    trainer.register_hooks([poison])
    trainer.model.register_forward_pre_hook(
        lambda module, arguments: files.append([x["file_name"] for x in arguments[0]])
    )
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "iteration 2, learning rate 0.0003" in message
    assert "non-finite output: transformer.encoder.layers.1.ffn.linear1." in message
    assert len(files) == 3 and ", ".join(files[2]) in message
    assert isinstance(caught.value, UserError)

    # What was saved before is whole and can be trained from.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "model_final.pth").exists()
    resumed = make_trainer()
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert all(torch.isfinite(p).all() for p in resumed.model.parameters())
    resumed.train()


def test_lack_of_memory_is_explained(make_trainer, monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    trainer = make_trainer()
    monkeypatch.setattr(trainer.model, "forward", full)
    with pytest.raises(UserError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "memory is full at iteration 0, with 4 image(s) a forward pass" in message
    assert "SOLVER.ACCUMULATION_STEPS" in message and message.endswith("allocate 2 GiB.")


def test_infinite_image_is_blamed_on_the_first_layer(make_trainer):
    trainer = make_trainer()
    trainer.model.pixel_std.zero_()
    with pytest.raises(DivergedError, match="non-finite output: backbone.stem.conv1[. ]"):
        trainer.train()


def test_criterion(make_trainer):
    trainer = make_trainer()
    trainer.model.criterion.class_weight = float("nan")
    with pytest.raises(DivergedError, match=r"loss is not finite \(loss_ce_0 nan.*criterion itse"):
        trainer.train()


def test_gradients(make_trainer):
    trainer = make_trainer()
    weight = next(trainer.model.transformer.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    with pytest.raises(DivergedError, match="iteration 0.*norm of the gradients is nan"):
        trainer.train()
    assert torch.equal(weight, before)


def test_outputs_of_every_kind_are_watched():
    class Returns(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self):
            return self.output

    bad, good = torch.tensor([1.0, float("inf")]), torch.ones(2)
    outputs = {
        "tensor": bad,
        "mapping": {"a": good, "b": bad},
        "nested": [good, (good, bad)],
        "dataclass": LayerOutput(logits=good, boxes=bad),
        "finite": {"a": [good], "b": torch.ones(2, dtype=torch.int64), "c": None, "d": "text"},
        "other": SimpleNamespace(a=bad),
    }
    model = nn.ModuleDict({name: Returns(output) for name, output in outputs.items()})
    with watch_outputs(model) as found:
        for module in model.values():
            module()
    assert found == ["tensor", "mapping", "nested", "dataclass"]
    model["tensor"]()
    assert len(found) == 4  # the hooks are gone
