"""What to say when a loss is not finite, or a GPU's memory is full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from .precision import Precision
    from .step import StepTrainer


class DivergedError(UserError, FloatingPointError):
    """The loss became infinite or NaN."""


def explain_non_finite(
    trainer: StepTrainer, batches: Sequence[list[dict[str, Any]]], reason: str
) -> NoReturn:
    """Stops the training with all there is to know; the weights are those before the step.

    Raises:
        DivergedError: naming iteration, learning rate, the first module whose output is not
            finite, and the images of the step.
    """
    learning_rate = max(group["lr"] for group in trainer.optimizer.param_groups)
    module = find_non_finite_module(trainer.model, batches, trainer.precision)
    process = f" in process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
    images = ", ".join(str(x.get("file_name", "?")) for batch in batches for x in batch)
    raise DivergedError(
        f"Training stopped at iteration {trainer.iter}, learning rate {learning_rate:g}: {reason}. "
        f"First module with non-finite output: {module or 'none, the criterion itself'}. Images of "
        f"this step{process}: {images}. Checkpoints already saved are untouched: start anew from "
        "one (MODEL.WEIGHTS) with a lower SOLVER.BASE_LR, or look at these images and their "
        "annotations."
    )


def explain_lack_of_memory(
    trainer: StepTrainer, batches: Sequence[list[dict[str, Any]]], error: Exception
) -> NoReturn:
    """Stops the training with what the step was made of, and with the keys that make it smaller.

    Raises:
        UserError: always.
    """
    sizes = [tuple(image["image"].shape[-2:]) for batch in batches for image in batch]
    objects = [len(image["instances"]) for batch in batches for image in batch]
    raise UserError(
        f"The GPU's memory is full at iteration {trainer.iter}, with {len(batches[0])} image(s) a "
        f"forward pass, the largest of {max(sizes, key=lambda s: s[0] * s[1])} pixels (height, "
        f"width), and up to {max(objects)} objects in one: raise SOLVER.ACCUMULATION_STEPS, which "
        "changes no gradient, set MODEL.ACTIVATION_CHECKPOINTING \"['backbone', 'encoder']\", or "
        f"lower INPUT.MAX_SIZE_TRAIN. PyTorch says: {str(error).splitlines()[0]}"
    ) from error


def find_non_finite_module(
    model: nn.Module, batches: Sequence[list[dict[str, Any]]], precision: Precision
) -> str | None:
    """Name of the first module, in the order of computation, whose output is not finite."""
    # Not the distributed wrapper, the criterion, nor the statistics of synchronised norms: they
    # would wait for the other processes.
    model = getattr(model, "module", model)
    kinds = nn.SyncBatchNorm, NaiveSyncBatchNorm
    synchronised = [m for m in model.modules() if isinstance(m, kinds) and m.training]
    for norm in synchronised:
        norm.eval()
    try:
        with torch.no_grad(), watch_outputs(model) as found:
            for batch in batches:
                with precision.autocast():
                    predictions = model.predict_all(batch, model.prepare_targets(batch))
                if predictions.masks is not None:
                    first = torch.zeros(1, dtype=torch.int64, device=model.device)
                    predictions.masks(first, first)
    finally:
        for norm in synchronised:
            norm.train()
    return found[0] if found else None


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """While open, collects the names of modules that return NaN or infinity."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name or type(module).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors(vars(output))
