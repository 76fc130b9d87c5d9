"""One optimizer step in plain PyTorch, under detectron2's hooks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import ResumableBatchSampler, derive_seed
from ..errors import UserError
from .diagnose import explain_lack_of_memory, explain_non_finite
from .precision import Precision

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
# Reading the scale of float16's gradients waits for the device. It begins at 65,536; where it comes
# to less than a thousandth, hardly any gradient is finite.
SCALE_PERIOD = 20
SMALLEST_SCALE = 1e-3


class StepTrainer(TrainerBase):
    """Forward, loss, backward, clip, step; each step over one or more batches.

    Everything random in a step depends on the seed and the iteration alone, so a training that was
    interrupted goes on exactly as it would have.
    """

    # Class attributes, so that they come before properties of the same names in other bases.
    model: nn.Module = None
    data_loader: Iterable[Batch] = None
    optimizer: torch.optim.Optimizer = None

    def __init__(
        self,
        model: nn.Module,
        build_loader: Callable[[int], Iterable[Batch]],
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        accumulation_steps: int = 1,
        max_gradient_norm: float | None = None,
        seed: int | None = None,
        images_per_step: int | None = None,
    ):
        """
        Args:
            model: takes a batch, returns weighted losses by name; where batches are accumulated,
                it also takes the object counts of all of them.
            build_loader: seed -> batches without end. A resumed training goes on where it stopped
                if they come from `detr_d2.data.loader.build_train_loader`.
            precision: autocast and gradient scaling.
            accumulation_steps: batches per optimizer step.
            max_gradient_norm: of all gradients taken as one vector; None does not clip.
            seed: None or negative draws one, the same on all processes.
            images_per_step: of all processes and accumulated batches, which loaders of other kinds
                than this package's may not know of; None does not look.
        """
        TrainerBase.__init__(self)  # not super(): in DetrTrainer that is DefaultTrainer's
        self.model = distribute(model)
        self.model.train()
        self.optimizer = optimizer
        self.precision = precision
        self.accumulation_steps = accumulation_steps
        self.max_gradient_norm = max_gradient_norm
        is_given = seed is not None and seed >= 0
        self.seed = seed if is_given else comm.shared_random_seed()
        self.build_loader = build_loader
        self.data_loader = build_loader(self.seed)
        self._batches: Iterator[Batch] | None = None
        self.images_per_step = images_per_step
        self.is_stepping = False  # true where a step was begun and not finished

    @property
    def batch_sampler(self) -> ResumableBatchSampler | None:
        """The loader's; None where it is of another kind than this package's."""
        sampler = getattr(self.data_loader, "batch_sampler", None)
        return sampler if isinstance(sampler, ResumableBatchSampler) else None

    @property
    def num_images(self) -> int | None:
        """In the training data; None where the loader does not tell."""
        return len(self.data_loader.dataset) if self.batch_sampler else None

    def before_train(self) -> None:
        if self.batch_sampler:
            self.batch_sampler.start_batch = self.start_iter * self.accumulation_steps
        elif self.start_iter:
            logger.warning("The loader cannot go on where it stopped: it starts its images anew.")
        if self.start_iter >= self.max_iter:
            logger.warning(
                f"Nothing is left to train: {self.start_iter} iterations are done, of "
                f"{self.max_iter} (SOLVER.MAX_ITER, or train.max_iter of a LazyConfig)."
            )
        self._batches = iter(self.data_loader)
        self.log_recipe()
        super().before_train()

    def log_recipe(self) -> None:
        """Says once what a step is made of: most trainings that fail do so here."""
        processes, steps = comm.get_world_size(), self.accumulation_steps
        images, total = "?", "?"
        if self.batch_sampler:
            images = self.batch_sampler.batch_size
            total = processes * steps * images
        groups = self.optimizer.param_groups
        rates = sorted({group.get("initial_lr", group["lr"]) for group in groups}, reverse=True)
        logger.info(
            f"Images per optimizer step: {total} = {processes} process(es) x {steps} batch(es) x "
            f"{images} image(s). "
            f"{type(self.optimizer).__name__}, learning rates before warm-up and drops: "
            f"{', '.join(f'{rate:g}' for rate in rates)}; {self.max_iter} iterations, "
            f"{self.precision}."
        )

    def run_step(self) -> None:
        self.is_stepping = True
        torch.manual_seed(derive_seed(self.seed, self.iter, comm.get_rank()))
        start = time.perf_counter()
        batches = [next(self._batches) for _ in range(self.accumulation_steps)]
        data_time = time.perf_counter() - start
        if self.iter == self.start_iter:
            self.check_images(batches)

        self.optimizer.zero_grad()
        losses = self.backward(batches)
        self.after_backward()
        self.precision.scaler.unscale_(self.optimizer)
        self.clip_gradients(batches)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.watch_scale(batches)
        SimpleTrainer.write_metrics(losses, data_time, self.iter)
        self.is_stepping = False

    def check_images(self, batches: Sequence[Batch]) -> None:
        """
        Raises:
            UserError: a step has other images than it should, by a loader that makes its batches
                without regard to accumulation.
        """
        wanted, processes = self.images_per_step, comm.get_world_size()
        found = sum(map(len, batches)) * processes
        if self.batch_sampler or wanted is None or len(batches) == 1 or found == wanted:
            return
        raise UserError(
            f"A step has {found} images, not the {wanted} of SOLVER.IMS_PER_BATCH: "
            f"SOLVER.ACCUMULATION_STEPS makes it of {len(batches)} batches, so let "
            f"build_train_loader give {wanted // (processes * len(batches))} images a batch."
        )

    def watch_scale(self, batches: Sequence[Batch]) -> None:
        """Stops float16 that skips step after step: each halves the scale.

        Raises:
            DivergedError: hardly any scale is left.
        """
        if not self.precision.scaler.is_enabled() or self.iter % SCALE_PERIOD:
            return
        scale = self.precision.scaler.get_scale()
        get_event_storage().put_scalar("grad_scale", scale)
        if scale < SMALLEST_SCALE:
            explain_non_finite(
                self, batches, f"no scale of float16's gradients is left ({scale:g})"
            )

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Losses of the step, detached.

        Raises:
            DivergedError: they are not finite.
            UserError: the GPU's memory is full.
        """
        try:
            losses = accumulate_gradients(self.model, batches, self.precision)
        except FloatingPointError as error:
            explain_non_finite(self, batches, str(error).rstrip("."))
        except torch.cuda.OutOfMemoryError as error:
            explain_lack_of_memory(self, batches, error)
        # One transfer for all losses; what follows reads them on the host.
        values = torch.stack(list(losses.values())).cpu()
        losses = dict(zip(losses, values, strict=True))
        if not values.isfinite().all():
            shown = ", ".join(f"{name} {loss:g}" for name, loss in losses.items())
            explain_non_finite(self, batches, f"the loss is not finite ({shown})")
        return losses

    def clip_gradients(self, batches: Sequence[Batch]) -> None:
        """Scales the gradients down to `max_gradient_norm`.

        Raises:
            DivergedError: their norm is not finite (left to the scaler in float16).
        """
        if self.max_gradient_norm is None:
            return
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        if self.precision.scaler.is_enabled():
            return  # overflow is part of float16; the scaler skips such a step
        norm = norm.item()
        if norm != norm or norm == float("inf"):
            explain_non_finite(self, batches, f"the norm of the gradients is {norm}")
        get_event_storage().put_scalar("gradient_norm", norm)

    def after_train(self) -> None:
        """Runs the hooks' `after_train`. After a failed step `max_iter` is raised by one: otherwise
        detectron2's EvalHook could take it for the end and evaluate, processes would wait for each
        other, and the reason would be lost.
        """
        self.max_iter += self.is_stepping
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        return {
            **TrainerBase.state_dict(self),
            "seed": self.seed,
            "grad_scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        if state_dict["grad_scaler"]:  # empty where it was saved without float16
            self.precision.scaler.load_state_dict(state_dict["grad_scaler"])
        if state_dict["seed"] != self.seed:
            self.seed = state_dict["seed"]
            self.data_loader = self.build_loader(self.seed)


def distribute(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else DistributedDataParallel on its device."""
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None
    return create_ddp_model(model, device_ids=device_ids, broadcast_buffers=False)


def share_statistics(model: nn.Module) -> None:
    """Gives every process the main process's running statistics of trained batch norms, which each
    has gathered from its own images: what is evaluated is then what is saved."""
    if comm.get_world_size() == 1:
        return
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            for statistic in norm.buffers(recurse=False):
                torch.distributed.broadcast(statistic, 0)


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], precision: Precision
) -> dict[str, Tensor]:
    """Forward and backward of each batch; the gradients are those of one batch of all images.

    Args:
        batches: the batches of one optimizer step.

    Returns:
        The step's losses, detached.
    """
    counts: list[list[int]] = []
    if len(batches) > 1:  # a single one counts its own: any model of detectron2's kind will do
        counts.append([len(image["instances"]) for batch in batches for image in batch])
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        # Processes exchange gradients once per step, after the last batch.
        distributed = isinstance(model, DistributedDataParallel)
        with model.no_sync() if distributed and not is_last else nullcontext():
            with precision.autocast():
                losses = model(batch, *counts)
            precision.scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    return totals
