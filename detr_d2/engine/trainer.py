"""The trainer of yaml configs: `StepTrainer`'s step with `DefaultTrainer`'s hooks around it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from inspect import getattr_static
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import DetrCheckpointer, LoadReport
from ..data import classes_of
from ..data.classes import dataset_names, settle_num_classes
from ..data.loader import build_test_loader, build_train_loader
from ..errors import UserError
from ..evaluation import build_evaluator
from ..processor import set_float32_precision
from .hooks import BestCheckpointer, PeriodicCheckpointer
from .optimizer import build_optimizer, full_model_clip_norm
from .precision import Precision
from .schedule import prefer_periods, resolve_epochs
from .step import Batch, StepTrainer, share_statistics

logger = logging.getLogger(__name__)


class DetrTrainer(StepTrainer, DefaultTrainer):
    """`DefaultTrainer` with gradient accumulation, bfloat16 on CPUs, epochs, full-model clipping,
    any number of CPU or GPU processes, and a resume that continues exactly.

    The constructor is its own, for DefaultTrainer's ties mixed precision to CUDA and hands device
    ids to models on a CPU. Hooks, `test`, `train` and `resume_or_load` are inherited.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            UserError: config and data disagree, or a value is not possible.
        """
        for name in ("detectron2", "detr_d2"):  # unless a script has done so already
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name=name)
        set_float32_precision(cfg.FLOAT32_PRECISION)
        cfg = DefaultTrainer.auto_scale_workers(prefer_periods(cfg), comm.get_world_size())
        cfg = settle_num_classes(cfg, dataset_names(cfg, "TRAIN", "TEST"))
        self.check_test_sets(cfg)
        model = self.build_model(cfg)
        if cfg.SOLVER.COMPILE:
            compile_for_training(model)
        optimizer = self.build_optimizer(cfg, model)

        def build_loader(seed: int) -> Iterable[Batch]:
            return self.build_train_loader(with_seed(cfg, seed))

        StepTrainer.__init__(
            self,
            model,
            build_loader,
            optimizer,
            precision=Precision.from_config(cfg),
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            max_gradient_norm=full_model_clip_norm(cfg),
            seed=cfg.SEED,
            images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        )
        cfg = resolve_epochs(cfg, self.num_images)
        if cfg.SOLVER.MAX_ITER < 1:
            raise UserError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; it must be 1 or more.")
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(
            cfg, model, cfg.DATASETS.TRAIN, trainer=weakref.proxy(self), optimizer=optimizer
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's; only the last SOLVER.MAX_CHECKPOINTS stay, and the best evaluation's.

        Raises:
            UserError: a negative number of checkpoints.
        """
        if self.cfg.SOLVER.MAX_CHECKPOINTS < 0:
            raise UserError("SOLVER.MAX_CHECKPOINTS is negative: give how many shall stay, 0: all.")
        built = super().build_hooks()
        solver = self.cfg.SOLVER
        for index, hook in enumerate(built):
            if isinstance(hook, hooks.PeriodicCheckpointer):
                built[index] = PeriodicCheckpointer(
                    self.checkpointer,
                    solver.CHECKPOINT_PERIOD,
                    max_to_keep=solver.MAX_CHECKPOINTS or None,
                )
        metric = best_metric(self.cfg)
        if metric and self.cfg.TEST.EVAL_PERIOD:
            best = BestCheckpointer(self.checkpointer, metric)
            evaluation = next(i for i, h in enumerate(built) if isinstance(h, hooks.EvalHook))
            built.insert(evaluation + 1, best)
        return built

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; where nothing is resumed, the frozen detector is loaded after it.

        Raises:
            UserError: `MODEL.DETR.FROZEN_WEIGHTS` is not that detector.
        """
        super().resume_or_load(resume)
        frozen = self.cfg.MODEL.DETR.FROZEN_WEIGHTS
        if frozen and not (resume and self.checkpointer.has_checkpoint()):
            self.checkpointer.load(frozen, checkpointables=[])
            refuse_untrained_detector(self.checkpointer.report, frozen, "MODEL.DETR.FROZEN_WEIGHTS")

    @classmethod
    def check_test_sets(cls, cfg: CfgNode) -> None:
        """Says what cannot be evaluated now, not hours later; of a subclass that tests, or builds
        evaluators, in a way of its own, nothing is known."""
        for name in ("test", "build_evaluator"):
            if getattr_static(cls, name) is not vars(DetrTrainer)[name]:
                return
        for name in cfg.DATASETS.TEST:
            cls.build_test_loader(cfg, name)
            cls.build_evaluator(cfg, name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """detectron2's, of one model on all processes."""
        share_statistics(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        logger.info(f"Built {type(model).__name__} with {size:.1f} M trainable parameters.")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As detectron2's.

        Raises:
            UserError: the schedule is not possible.
        """
        try:
            return super().build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            raise UserError(f"The schedule in SOLVER is not possible: {error}.") from error

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Batch]:
        """What to train on; `cfg.SEED` is the training's own. May be overridden as in detectron2.

        Loaders of other kinds than this package's start their images anew where a training is
        resumed, and epochs cannot be counted by them.
        """
        return build_train_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def best_metric(cfg: CfgNode) -> str:
    """Name in the event storage of what `TEST.BEST_METRIC` asks for; "" for nothing."""
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if metric == "auto":
        metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
        if cfg.MODEL.DETR.PANOPTIC.ENABLED:
            metric = "panoptic_seg/PQ"
    if not metric or not names:
        return ""
    # detectron2 puts the data set's name before the figures of several.
    return f"{names[0]}/{metric}" if len(names) > 1 else metric


def with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = seed
    seeded.freeze()
    return seeded


def compile_for_training(model: nn.Module) -> None:
    """Compiles what has all the arithmetic, in place; names of parameters stay. Sizes are left
    free, for augmentation changes them from step to step."""
    for part in (model.backbone, model.transformer.encoder, model.transformer.decoder):
        part.compile(dynamic=True)


def refuse_untrained_detector(report: LoadReport, path: str, key: str) -> None:
    """
    Args:
        path, key: of the weights that a frozen detector is to have.

    Raises:
        UserError: they are not all of them, the mask head aside.
    """
    report.refuse_untrained(path, key)
    if missing := [name for name in report.initial if not name.startswith("mask_head.")]:
        raise UserError(
            f"'{path}' leaves {len(missing)} tensors of the frozen detector untrained, first "
            f"'{missing[0]}': name its own weights in {key}."
        )


def build_checkpointer(
    cfg: CfgNode, model: nn.Module, dataset_names: Sequence[str], **checkpointables: Any
) -> DetrCheckpointer:
    """Checkpointer that knows, and saves along with the weights, the data sets' class names and
    the config's yaml."""
    classes = classes_of(dataset_names)
    return DetrCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        class_names=classes,
        config=cfg.dump(),
        new_class_head=cfg.MODEL.DETR.NEW_CLASS_HEAD,
        **checkpointables,
    )
