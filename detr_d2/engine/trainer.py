"""The trainer: detectron2's hooks and schedule around a training step that is plain PyTorch."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import DetrCheckpointer
from ..data import classes_of
from ..data.classes import check_num_classes
from ..data.loader import build_test_loader, build_train_loader, derive_seed, images_per_forward
from ..evaluation import build_evaluator
from .diagnose import explain_non_finite_loss
from .optimizer import build_optimizer, full_model_clip_norm
from .precision import Precision
from .schedule import resolve_epochs

logger = logging.getLogger(__name__)


class DetrTrainer(DefaultTrainer):
    """`DefaultTrainer` with gradient accumulation, bfloat16 on CPUs, epochs, full-model clipping,
    any number of CPU or GPU processes, and a resume that continues exactly.

    The constructor is its own: DefaultTrainer's ties mixed precision to CUDA and hands device
    ids to models on a CPU. Everything around the step (hooks, `test`, `train`,
    `resume_or_load`) is inherited.
    """

    # DefaultTrainer forwards these three to a trainer of its own; here they are plain attributes.
    model: nn.Module = None
    data_loader: Iterable[list[dict[str, Any]]] = None
    optimizer: torch.optim.Optimizer = None

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_num_classes(cfg)
        cfg = resolve_epochs(cfg)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()

        model = self.build_model(cfg)
        self.optimizer = self.build_optimizer(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        self.data_loader = build_train_loader(cfg, self.seed)
        self.model = distribute(model)
        self.model.train()
        self.precision = Precision(cfg, torch.device(cfg.MODEL.DEVICE))

        self.checkpointer = build_checkpointer(
            cfg, model, trainer=weakref.proxy(self), optimizer=self.optimizer
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        self._batches = None

    def train(self) -> dict | None:
        self.log_recipe()
        self.data_loader.batch_sampler.start_batch = (
            self.start_iter * self.cfg.SOLVER.ACCUMULATION_STEPS
        )
        self._batches = iter(self.data_loader)
        return super().train()

    def run_step(self) -> None:
        """One optimizer step over `SOLVER.ACCUMULATION_STEPS` batches."""
        # Dropout depends on the iteration alone, so a resumed training repeats it.
        torch.manual_seed(derive_seed(self.seed, self.iter, comm.get_rank()))
        start = time.perf_counter()
        batches = [next(self._batches) for _ in range(self.cfg.SOLVER.ACCUMULATION_STEPS)]
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        try:
            losses = accumulate_gradients(self.model, batches, self.precision)
        except FloatingPointError as error:
            explain_non_finite_loss(self, batches, str(error))
        if not torch.isfinite(sum(losses.values())):
            shown = ", ".join(f"{name} {float(loss):g}" for name, loss in losses.items())
            explain_non_finite_loss(self, batches, f"the loss is not finite ({shown})")
        self.precision.scaler.unscale_(self.optimizer)
        max_norm = full_model_clip_norm(self.cfg)
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            if self.iter % 20 == 0:
                get_event_storage().put_scalar("gradient_norm", norm)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        SimpleTrainer.write_metrics(losses, data_time, self.iter)

    def state_dict(self) -> dict[str, Any]:
        return {
            **TrainerBase.state_dict(self),
            "seed": self.seed,
            "grad_scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self.precision.scaler.load_state_dict(state_dict["grad_scaler"])
        if state_dict["seed"] != self.seed:
            self.seed = state_dict["seed"]
            self.data_loader = build_train_loader(self.cfg, self.seed)

    def log_recipe(self) -> None:
        """Says once what a step is made of, for most trainings that fail do so here."""
        solver = self.cfg.SOLVER
        processes, steps = comm.get_world_size(), solver.ACCUMULATION_STEPS
        logger.info(
            f"Images per optimizer step: {solver.IMS_PER_BATCH} = {processes} process(es) x "
            f"{steps} batch(es) x {images_per_forward(self.cfg)} image(s). {solver.OPTIMIZER}, "
            f"learning rate {solver.BASE_LR:g}, backbone "
            f"{solver.BASE_LR * solver.BACKBONE_MULTIPLIER:g}, divided by {1 / solver.GAMMA:g} "
            f"after {', '.join(map(str, solver.STEPS)) or 'no'} of {solver.MAX_ITER} iterations. "
            f"Precision: {self.precision}."
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        return build_train_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> DetrCheckpointer:
    """Checkpointer that saves a config's class names and yaml along with the weights."""
    classes = classes_of([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][:1])
    return DetrCheckpointer(
        model, cfg.OUTPUT_DIR, class_names=classes, config=cfg.dump(), **checkpointables
    )


def distribute(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else DistributedDataParallel on its device."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def accumulate_gradients(
    model: nn.Module, batches: Sequence[list[dict[str, Any]]], precision: Precision
) -> dict[str, Tensor]:
    """Forward and backward of each batch; the gradients are those of one batch of all images.

    Args:
        batches: the batches of one optimizer step.

    Returns:
        The step's losses, detached.
    """
    object_counts = [len(image["instances"]) for batch in batches for image in batch]
    totals: dict[str, Tensor] = {}
    for batch in batches:
        with precision.autocast():
            losses = model(batch, object_counts)
        precision.scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    return totals
