"""The step, accumulation, resuming, epochs and evaluation during training."""

import logging
import math
import shutil

import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import HookBase, hooks
from detectron2.modeling import build_model
from torch import nn

from detr_d2.data import DetrDatasetMapper
from detr_d2.data.loader import build_train_loader
from detr_d2.engine import DetrTrainer, Precision, StepTrainer
from detr_d2.engine.diagnose import DivergedError
from detr_d2.engine.step import accumulate_gradients
from detr_d2.errors import UserError
from detr_d2.structures import Predictions

from .helpers import random_inputs, tiny_cfg
from .training import read_metrics, training_cfg

LOSSES = [f"loss_{kind}{layer}" for layer in ("_0", "_1", "") for kind in ("ce", "bbox", "giou")]


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detr_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "detr_d2")
    return caplog


class Linear(nn.Module):
    """Its gradient is `slope` (2), plus random numbers times `noise`."""

    def __init__(self, slope=(30.0, 40.0), noise=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.slope = torch.tensor(slope)
        self.noise = noise

    def forward(self, batch, object_counts=None):
        slope = self.slope + self.noise * torch.rand(2)
        return {"loss_a": (self.weight * slope).sum()}


def step_trainer(model, precision=None, **options):
    """Plain SGD with a learning rate of 1 on an endless stream of empty images."""
    dicts = [{"width": 1, "height": 1}] * 4

    def build_loader(seed):
        return build_train_loader(
            dicts, mapper=lambda x: {"instances": []}, seed=seed, total_batch_size=2
        )

    return StepTrainer(
        model,
        build_loader,
        torch.optim.SGD(model.parameters(), lr=1.0),
        precision=precision or Precision("cpu"),
        **options,
    )


# Gradient accumulation


def gradients_of(model, inputs, images_per_batch):
    model.zero_grad()
    batches = [
        inputs[start : start + images_per_batch]
        for start in range(0, len(inputs), images_per_batch)
    ]
    losses = accumulate_gradients(model, batches, Precision("cpu"))
    return {name: p.grad.clone() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("counts", [(3, 0, 1, 2, 0, 0, 0, 0), (0,) * 8, (1, 2, 3, 4, 1, 7, 2, 1)])
def test_accumulated_gradients_are_those_of_the_large_batch(counts):
    """Without dropout and batch statistics, which look at what is computed together."""
    torch.manual_seed(0)
    cfg = tiny_cfg("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.DROPOUT", 0.0)
    model = build_model(cfg).train()
    inputs = random_inputs([(64, 64)] * 8, counts)
    expected, expected_losses = gradients_of(model, inputs, 8)
    for images_per_batch in (4, 2):
        gradients, losses = gradients_of(model, inputs, images_per_batch)
        assert sorted(losses) == sorted(LOSSES)
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-5)
        largest = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


def test_accumulating_trainer_takes_as_many_images_per_step(rectangles, tmp_path):
    seen = []
    cfg = training_cfg(rectangles, tmp_path, "SOLVER.ACCUMULATION_STEPS", 2)
    trainer = DetrTrainer(cfg)
    trainer.model.register_forward_pre_hook(
        lambda module, arguments: seen.append([x["file_name"] for x in arguments[0]])
    )
    trainer.train()
    assert [len(batch) for batch in seen] == [2] * 8  # four iterations of 2 x 2 images
    large = build_train_loader(training_cfg(rectangles, tmp_path), cfg.SEED)
    for i, batch in zip(range(4), large):  # noqa: B905, the stream is endless
        assert [x["file_name"] for x in batch] == seen[2 * i] + seen[2 * i + 1]


# Loaders of one's own


class TrainerWithForeignLoader(DetrTrainer):
    """As people write it for detectron2."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))


def test_a_trainer_may_bring_its_loader(rectangles, tmp_path, caplog):
    options = ("SOLVER.CHECKPOINT_PERIOD", 2)
    trainer = TrainerWithForeignLoader(training_cfg(rectangles, tmp_path, *options))
    assert trainer.batch_sampler is None and trainer.num_images is None
    trainer.train()
    assert trainer.iter == 4 and "Images per optimizer step: ?" in caplog.text
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = TrainerWithForeignLoader(training_cfg(rectangles, tmp_path, *options))
    resumed.resume_or_load(resume=True)
    assert "starts its images anew" not in caplog.text
    resumed.train()
    assert "starts its images anew" in caplog.text
    with pytest.raises(UserError, match="the number of images, which this training's loader does"):
        TrainerWithForeignLoader(
            training_cfg(rectangles, tmp_path, "SOLVER.EPOCHS", 1.0, "SOLVER.MAX_ITER", 40000)
        )


def test_a_foreign_loader_that_ignores_accumulation_is_refused(rectangles, tmp_path):
    """detectron2's gives 4 images a batch, so two batches have twice as many as asked for."""
    cfg = training_cfg(rectangles, tmp_path, "SOLVER.ACCUMULATION_STEPS", 2)
    with pytest.raises(UserError, match="8 images, not the 4 of .*IMS_PER_BATCH.* give 2 images"):
        TrainerWithForeignLoader(cfg).train()

    class Halved(TrainerWithForeignLoader):
        @classmethod
        def build_train_loader(cls, cfg):
            cfg = cfg.clone()
            cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2])
            return super().build_train_loader(cfg)

    Halved(cfg).train()


def test_a_foreign_loader_has_images_of_many_sizes(rectangles, tmp_path):
    """One size per batch needs this package's loader; others draw one for each image."""
    sizes = ("INPUT.MIN_SIZE_TRAIN", (32, 48, 64), "INPUT.MIN_SIZE_TRAIN_PER_BATCH", True)
    cfg = training_cfg(rectangles, tmp_path, *sizes, "INPUT.CROP.ENABLED", False)
    mapper = DetrDatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(cfg, mapper=mapper)
    batches = [next(iter(loader)) for _ in range(3)]
    shortest = {min(image["image"].shape[1:]) for batch in batches for image in batch}
    assert shortest == {32, 48, 64}


def test_a_loader_knows_the_seed_that_was_drawn(rectangles, tmp_path):
    seeds = []

    class Trainer(DetrTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            seeds.append(cfg.SEED)
            return super().build_train_loader(cfg)

    trainer = Trainer(training_cfg(rectangles, tmp_path, "SEED", -1))
    assert seeds == [trainer.seed] and trainer.seed >= 0
    assert trainer.cfg.SEED == -1


# One step


def test_hooks_see_the_gradients():
    """As detectron2's trainers let them: after the backward pass, before clipping."""

    class Hook(HookBase):
        def after_backward(self):
            seen.append(self.trainer.model.weight.grad.tolist())

    seen, trainer = [], step_trainer(Linear(), max_gradient_norm=0.1)
    trainer.register_hooks([Hook()])
    trainer.train(0, 1)
    assert seen == [[30.0, 40.0]]


def test_a_model_need_not_know_of_object_counts():
    """detectron2's models take a batch; only accumulated batches have to know of each other."""

    class Plain(Linear):
        def forward(self, batch):
            return {"loss": self.weight.sum()}

    trainer = step_trainer(Plain())
    trainer.train(0, 1)
    assert trainer.model.weight.grad.tolist() == [1.0, 1.0]


def test_clipping_by_the_norm_of_all_gradients():
    """The gradient (30, 40) has the norm 50."""
    trainer = step_trainer(Linear(), max_gradient_norm=0.1)
    trainer.train(0, 1)
    assert trainer.model.weight.tolist() == pytest.approx([-0.06, -0.08])
    assert trainer.storage.latest()["gradient_norm"] == (pytest.approx(50.0), 0)


def test_without_clipping():
    trainer = step_trainer(Linear())
    trainer.train(0, 2)
    assert trainer.model.weight.tolist() == [-60.0, -80.0]


def test_small_gradients_are_not_scaled_up():
    trainer = step_trainer(Linear(slope=(0.03, 0.04)), max_gradient_norm=0.1)
    trainer.train(0, 1)
    assert trainer.model.weight.tolist() == pytest.approx([-0.03, -0.04])


def test_clipping_sees_unscaled_gradients():
    """float16's gradient scaling, which also exists for CPUs: the result is that without it."""
    precision = Precision("cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = step_trainer(Linear(), precision, max_gradient_norm=0.1)
    trainer.train(0, 1)
    assert trainer.model.weight.tolist() == pytest.approx([-0.06, -0.08])


def test_overflow_of_float16_skips_the_step():
    precision = Precision("cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    trainer = step_trainer(Linear(), precision, max_gradient_norm=0.1)
    trainer.train(0, 1)
    assert trainer.model.weight.tolist() == [0.0, 0.0]
    assert precision.scaler.get_scale() == pytest.approx(1.5e38)


class FiniteLoss(Linear):
    """Its loss is 0, its gradient NaN: infinity, of the root, times 0, of the absolute value."""

    def forward(self, batch, object_counts=None):
        return {"loss_a": self.weight.abs().sqrt().sum()}


def test_float16_that_skips_every_step_is_stopped(monkeypatch):
    """Each halves the scale until nothing is left of it."""

    def fail(trainer, batches, reason):
        raise FloatingPointError(reason)

    monkeypatch.setattr("detr_d2.engine.step.explain_non_finite", fail)
    precision = Precision("cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer = step_trainer(FiniteLoss(), precision)
    with pytest.raises(FloatingPointError, match="no scale of float16's gradients is left"):
        trainer.train(0, 100)
    assert trainer.iter == 40  # after 27 skipped steps it is below 0.001
    assert trainer.storage.history("grad_scale").values()[0] == (2.0**15, 0)


def test_a_failed_last_step_is_not_evaluated():
    """detectron2 takes the last iteration for the end, however it ended."""
    trainer, evaluated = step_trainer(Linear(slope=(float("nan"), 1.0))), []
    trainer.register_hooks([hooks.EvalHook(0, lambda: evaluated.append(1))])
    trainer.model.prepare_targets = lambda batch: None
    trainer.model.predict_all = lambda batch, targets: Predictions([])
    with pytest.raises(DivergedError, match="iteration 0, .*: the loss is not finite"):
        trainer.train(0, 1)
    assert evaluated == []
    trainer = step_trainer(Linear())
    trainer.register_hooks([hooks.EvalHook(0, lambda: evaluated.append(1))])
    trainer.train(0, 1)
    assert evaluated == [1]


def test_random_numbers_of_a_step_depend_on_seed_and_iteration():
    def weight_after(seed, *spans):
        trainer = step_trainer(Linear(noise=1.0), seed=seed)
        for start, stop in spans:
            torch.manual_seed(start)
            trainer.train(start, stop)
        return trainer.model.weight.tolist()

    expected = weight_after(3, (0, 5))
    assert weight_after(3, (0, 2), (2, 5)) == expected
    assert weight_after(4, (0, 5)) != expected
    assert weight_after(3, (0, 2), (0, 3)) != expected
    # Processes draw other numbers, too: dropout would be the same everywhere.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_d2.engine.step.comm.get_rank", lambda: 1)
        assert weight_after(3, (0, 5)) != expected


def test_gradient_scaler_is_restored():
    def scaled_trainer(scale=None):
        precision = Precision("cpu")
        if scale is not None:
            precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return step_trainer(Linear(), precision)

    state = scaled_trainer(64.0).state_dict()
    resumed = scaled_trainer(2.0)
    resumed.load_state_dict(state)
    assert resumed.precision.scaler.get_scale() == 64.0
    # Mixed precision switched on or off in between.
    resumed = scaled_trainer(2.0)
    resumed.load_state_dict(scaled_trainer().state_dict())
    assert resumed.precision.scaler.get_scale() == 2.0
    resumed = scaled_trainer()
    resumed.load_state_dict(state)
    assert not resumed.precision.scaler.is_enabled()


# What is logged


def test_losses_and_diagnostics_are_logged(rectangles, tmp_path):
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path))
    trainer.train()
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert sorted(name for name in latest if name.startswith("loss_")) == sorted(LOSSES)
    total = sum(latest[name] for name in LOSSES)
    assert latest["total_loss"] == pytest.approx(total, rel=1e-9)
    [first, last] = read_metrics(tmp_path)
    assert first["iteration"] == 0 and 0 <= first["class_error"] <= 100
    assert first["cardinality_error"] >= 0
    assert last["iteration"] == 3 and set(LOSSES) < set(last)
    assert math.isfinite(last["gradient_norm"])


def test_recipe_is_logged_once(rectangles, tmp_path, caplog):
    options = ("SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.STEPS", (3,))
    options += ("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 0.002)
    DetrTrainer(training_cfg(rectangles, tmp_path, *options)).train()
    [recipe] = [text for text in caplog.messages if text.startswith("Images per optimizer step")]
    assert recipe == (
        "Images per optimizer step: 4 = 1 process(es) x 2 batch(es) x 2 image(s). AdamW, learning "
        "rates before warm-up and drops: 0.002, 0.0002; 4 iterations, float32."
    )


def test_learning_rate_drops_and_warms_up(rectangles, tmp_path):
    """Warm-up over 2 iterations from a thousandth, linear; a tenth from iteration 3 on."""
    rates = []

    class Record(HookBase):
        def before_step(self):
            rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    options = ("SOLVER.BASE_LR", 1e-3, "SOLVER.STEPS", (3,), "SOLVER.WARMUP_FACTOR", 0.001)
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path, *options))
    trainer.register_hooks([Record()])
    trainer.train()
    assert rates == pytest.approx([1e-6, 0.5005e-3, 1e-3, 1e-4])


# Epochs and evaluation


def test_length_in_epochs(rectangles, tmp_path):
    """12 images in batches of 4: 3 iterations per epoch."""
    options = ("SOLVER.EPOCHS", 2.0, "SOLVER.STEP_EPOCHS", [1], "SOLVER.MAX_ITER", 40000)
    options = (*options, "SOLVER.WARMUP_ITERS", 0)
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path, *options))
    assert (trainer.max_iter, tuple(trainer.cfg.SOLVER.STEPS)) == (6, (3,))
    trainer.train()
    assert trainer.iter == 6
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.0003)
    assert (tmp_path / "model_final.pth").exists()


def test_evaluation_during_training(rectangles, tmp_path):
    options = ("DATASETS.TEST", (rectangles,), "TEST.EVAL_PERIOD", 2)
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path, *options))
    trainer.train()
    evaluated = [line for line in read_metrics(tmp_path) if "bbox/AP" in line]
    assert [line["iteration"] for line in evaluated] == [1, 4]  # the last one after the training
    assert all(0 <= line["bbox/AP"] <= 100 for line in evaluated)
    assert {"bbox/AP50", "bbox/AP-red", "bbox/AP-green", "bbox/AP-blue"} < set(evaluated[-1])
    assert trainer.model.training


def test_tests_of_ones_own(rectangles, tmp_path, monkeypatch):
    """As in detectron2, `build_evaluator` need not exist, nor be used."""

    class Without(DetrTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            raise NotImplementedError

    class Own(DetrTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"own": {"metric": 3.0}}

    cfg = training_cfg(rectangles, tmp_path, "DATASETS.TEST", (rectangles,), "TEST.EVAL_PERIOD", 2)
    assert Without.test(cfg, Without(cfg).model) == {}
    monkeypatch.delattr(MetadataCatalog.get(rectangles), "evaluator_type")
    trainer = Own(cfg)
    trainer.train()
    assert trainer.storage.latest()["own/metric"][0] == 3.0


def test_a_forgotten_comma_is_named(rectangles, tmp_path):
    cfg = training_cfg(rectangles, tmp_path)
    cfg.defrost()
    cfg.DATASETS.TRAIN = "balloons"
    with pytest.raises(
        UserError, match=r"DATASETS.TRAIN is the text 'balloons': write \('ball.*,\)"
    ):
        DetrTrainer(cfg)


def test_checkpoints_in_epochs_where_the_batch_is_scaled(rectangles, tmp_path):
    """detectron2 scales its own default, too, which then looks like a period that was asked for."""
    options = ("SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.CHECKPOINT_EPOCHS", 1)
    options = (*options, "SOLVER.CHECKPOINT_PERIOD", 5000)
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path, *options))
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 2  # 12 images: 6 iterations
    assert trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 6
    with pytest.raises(UserError, match="The length is given twice, SOLVER.EPOCHS 1.0"):
        DetrTrainer(training_cfg(rectangles, tmp_path, *options, "SOLVER.EPOCHS", 1.0))


def test_a_test_set_that_cannot_be_evaluated_is_refused_at_once(rectangles, tmp_path, monkeypatch):
    monkeypatch.delattr(MetadataCatalog.get(rectangles), "evaluator_type")
    with pytest.raises(UserError, match=f"'{rectangles}' has the evaluator_type None"):
        DetrTrainer(training_cfg(rectangles, tmp_path, "DATASETS.TEST", (rectangles,)))


def test_evaluation_changes_nothing(rectangles, tmp_path):
    def final_weights(folder, *options):
        trainer = DetrTrainer(training_cfg(rectangles, tmp_path / folder, *options))
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            nn.init.normal_(parameter, std=0.05)
        trainer.train()
        return trainer.model.state_dict()

    options = ("DATASETS.TEST", (rectangles,), "TEST.EVAL_PERIOD", 1)
    assert_equal(final_weights("a"), final_weights("b", *options))


# Resuming


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("seed", [7, -1])
def test_resumed_training_ends_as_the_uninterrupted_one(rectangles, tmp_path, seed):
    """With a seed of -1 the one drawn at the start is in the checkpoint."""
    options = ("SEED", seed, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2)
    options += ("SOLVER.ACCUMULATION_STEPS", 2, "DATALOADER.NUM_WORKERS", 1)
    options += ("SOLVER.STEPS", (3,))
    whole = DetrTrainer(training_cfg(rectangles, tmp_path / "whole", *options))
    whole.train()

    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", tmp_path / "rest")
    (tmp_path / "rest" / "last_checkpoint").write_text("model_0000001.pth")
    rest = DetrTrainer(training_cfg(rectangles, tmp_path / "rest", *options))
    rest.resume_or_load(resume=True)
    assert (rest.start_iter, rest.seed) == (2, whole.seed)
    rest.train()

    assert_equal(rest.model.state_dict(), whole.model.state_dict())
    assert rest.storage.latest()["total_loss"] == whole.storage.latest()["total_loss"]
    moments = [t.optimizer.state_dict()["state"][0]["exp_avg"] for t in (rest, whole)]
    assert torch.equal(*moments)


def test_resuming_a_finished_training(rectangles, tmp_path):
    cfg = training_cfg(rectangles, tmp_path)
    DetrTrainer(cfg).train()
    before = torch.load(tmp_path / "model_final.pth")["model"]
    trainer = DetrTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert_equal(trainer.model.state_dict(), before)


@pytest.mark.parametrize("iterations", [0, -1])
def test_a_training_has_iterations(rectangles, tmp_path, iterations):
    with pytest.raises(UserError, match=f"SOLVER.MAX_ITER is {iterations}; it must be 1 or more"):
        DetrTrainer(training_cfg(rectangles, tmp_path, "SOLVER.MAX_ITER", iterations))


def test_a_script_without_logging_sees_what_is_trained(rectangles, tmp_path, monkeypatch):
    """As DefaultTrainer's; detectron2's `default_setup` knows nothing of this package's."""
    for name in ("detectron2", "detr_d2"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    logging.getLogger("detr_d2").manager._clear_cache()
    DetrTrainer(training_cfg(rectangles, tmp_path)).train()
    text = (tmp_path / "log.txt").read_text()
    assert "Images per optimizer step: 4" in text and "total_loss" in text


def test_resume_without_checkpoint_starts(rectangles, tmp_path):
    trainer = DetrTrainer(training_cfg(rectangles, tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
