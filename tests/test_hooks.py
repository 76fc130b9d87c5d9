"""Which checkpoints stay: the best evaluation's, and the last ones."""

import json
import logging
import shutil

import pytest
import torch
from detectron2.engine import HookBase, hooks

from detr_d2.engine import DetrTrainer
from detr_d2.engine.trainer import best_metric
from detr_d2.errors import UserError

from .helpers import tiny_cfg
from .training import registered_rectangles, training_cfg


@pytest.fixture
def caplog(caplog, monkeypatch):
    """Also where a trainer is the first to set the loggers up."""
    logger = logging.getLogger("detr_d2.engine.hooks")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    return caplog


def make_trainer(rectangles, folder, scores, *options):
    """Its evaluations, one after each iteration, give these APs in turn."""
    given = iter(scores)

    class Scripted(DetrTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": next(given)}}

    options = ("DATASETS.TEST", (rectangles,), "TEST.EVAL_PERIOD", 1, *options)
    options = ("SEED", 1, "SOLVER.CHECKPOINT_PERIOD", 1, *options)
    return Scripted(training_cfg(rectangles, folder, *options))


class Weights(HookBase):
    """What the model was after each iteration."""

    def __init__(self):
        self.after = {}

    def after_step(self):
        weight = self.trainer.model.transformer.decoder.heads[0].class_head.weight
        self.after[self.trainer.iter] = weight.detach().clone()


def best_of(folder):
    checkpoint = torch.load(folder / "model_best.pth")
    known = json.loads((folder / "model_best.json").read_text())
    return checkpoint["model"]["transformer.decoder.heads.0.class_head.weight"], known


@pytest.mark.parametrize(
    ("scores", "best"),
    [([10, 30, 20, 25], 1), ([10, 20, 30, 40], 3), ([float("nan"), 2, 1, 2], 1)],
)
def test_the_best_evaluation_keeps_its_weights(rectangles, tmp_path, scores, best):
    trainer, weights = make_trainer(rectangles, tmp_path, scores), Weights()
    trainer.register_hooks([weights])
    trainer.train()
    kept, known = best_of(tmp_path)
    assert torch.equal(kept, weights.after[best])
    iteration = best if best < 3 else 4  # the last evaluation comes after the last iteration
    assert known == {"metric": "bbox/AP", "value": scores[best], "iteration": iteration}
    # A training goes on from its end, and evaluation takes the file as any other.
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert "optimizer" not in torch.load(tmp_path / "model_best.pth")


@pytest.mark.parametrize(("later", "best"), [((29, 5), 35), ((5, 36), 36)])
def test_a_resumed_training_has_to_be_better_than_before(rectangles, tmp_path, later, best):
    """Also than what came after the checkpoint that it goes on from."""
    make_trainer(rectangles, tmp_path, [10, 30, 35, 25]).train()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = make_trainer(rectangles, tmp_path, later)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert best_of(tmp_path)[1]["value"] == best


def test_detectron2s_hook_of_the_same_name_keeps_its_file(rectangles, tmp_path, caplog):
    """It makes the best checkpoint the one to resume from, for which it needs all of it."""
    options = ("SOLVER.CHECKPOINT_PERIOD", 100)
    trainer = make_trainer(rectangles, tmp_path, [10, 20, 30, 9], *options)
    theirs = hooks.BestCheckpointer(1, trainer.checkpointer, "bbox/AP", mode="min")
    trainer.register_hooks([theirs])
    trainer.train()
    checkpoint = torch.load(tmp_path / "model_best.pth")
    assert "optimizer" in checkpoint
    assert "Another hook writes model_best.pth, which is left to it" in caplog.text


def test_a_new_training_in_the_folder_starts_anew(rectangles, tmp_path):
    make_trainer(rectangles, tmp_path, [90] * 4).train()
    make_trainer(rectangles, tmp_path, [10, 30, 20, 25]).train()
    assert best_of(tmp_path)[1]["value"] == 30


def test_no_training_goes_on_from_weights_alone(rectangles, tmp_path):
    make_trainer(rectangles, tmp_path, [1] * 4).train()
    (tmp_path / "last_checkpoint").write_text("model_best.pth")
    trainer = make_trainer(rectangles, tmp_path, [1] * 4)
    with pytest.raises(UserError, match=r"model_best.pth' .* no state .* \(trainer, optim"):
        trainer.resume_or_load(resume=True)


def test_a_metric_that_no_evaluation_gives_is_named(rectangles, tmp_path, caplog):
    make_trainer(rectangles, tmp_path, [1] * 4, "TEST.BEST_METRIC", "segm/AP").train()
    assert "No evaluation gave a segm/AP" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()


@pytest.mark.parametrize(
    ("masks", "panoptic", "metric"),
    [(False, False, "bbox/AP"), (True, False, "segm/AP"), (True, True, "panoptic_seg/PQ")],
)
def test_what_is_best_is_told_by_what_is_trained(masks, panoptic, metric):
    """Boxes of a frozen detector are the same from the first evaluation on."""
    cfg = tiny_cfg("MODEL.MASK_ON", masks, "MODEL.DETR.PANOPTIC.ENABLED", panoptic)
    assert best_metric(cfg) == metric
    cfg.TEST.BEST_METRIC = "bbox/AP50"
    assert best_metric(cfg) == "bbox/AP50"
    cfg.DATASETS.TEST = ()
    assert best_metric(cfg) == ""


def test_the_best_need_not_be_kept(rectangles, tmp_path):
    make_trainer(rectangles, tmp_path, [1] * 4, "TEST.BEST_METRIC", "").train()
    assert not (tmp_path / "model_best.pth").exists()


def test_of_several_data_sets_the_first_counts(rectangles, tmp_path):
    other = tmp_path / "other"
    with registered_rectangles(other, num_images=4, seed=1) as second:
        names = ("DATASETS.TEST", (rectangles, second))
        cfg = training_cfg(rectangles, tmp_path / "out", *names, "TEST.EVAL_PERIOD", 2)
        DetrTrainer(cfg).train()
    known = json.loads((tmp_path / "out" / "model_best.json").read_text())
    assert known["metric"] == f"{rectangles}/bbox/AP"


@pytest.mark.parametrize(("number", "kept"), [(0, [0, 1, 2, 3]), (2, [2, 3])])
def test_the_last_checkpoints_stay(rectangles, tmp_path, number, kept):
    make_trainer(rectangles, tmp_path, [1] * 4, "SOLVER.MAX_CHECKPOINTS", number).train()
    names = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert names == [f"model_{iteration:07d}.pth" for iteration in kept]
    assert (tmp_path / "model_final.pth").exists()


def test_checkpoints_from_before_an_interruption_count(rectangles, tmp_path):
    options = ("SOLVER.MAX_CHECKPOINTS", 2)
    make_trainer(rectangles, tmp_path, [1] * 4, *options).train()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    (tmp_path / "model_0000003.pth").unlink()
    shutil.copy(tmp_path / "model_0000002.pth", tmp_path / "model_0000001.pth")
    resumed = make_trainer(rectangles, tmp_path, [1] * 4, *options)
    resumed.resume_or_load(resume=True)
    resumed.train()
    names = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert names == ["model_0000002.pth", "model_0000003.pth"]


def test_a_negative_number_of_checkpoints_is_refused(rectangles, tmp_path):
    with pytest.raises(UserError, match="MAX_CHECKPOINTS is negative"):
        make_trainer(rectangles, tmp_path, [], "SOLVER.MAX_CHECKPOINTS", -1)
    shutil.rmtree(tmp_path)
