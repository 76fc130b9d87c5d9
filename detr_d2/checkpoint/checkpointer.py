"""Loading any known format, saving atomically: detectron2's checkpointer for DETR."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..errors import UserError
from .adapt import fit_checkpoint
from .read import read_checkpoint
from .report import LoadReport
from .write import metadata_of, write_atomically

logger = logging.getLogger(__name__)


def load_weights(
    model: nn.Module,
    path: str,
    class_names: Sequence[str] | None = None,
    new_class_head: bool = False,
) -> tuple[LoadReport, dict[str, Any]]:
    """Loads the weights of a checkpoint of any known format into a model, and logs what it did.

    Args:
        model: a `Detr`.
        path: see `read_checkpoint`.
        class_names: names of the model's classes; needed where their number differs from the
            checkpoint's and is not one of COCO's.
        new_class_head: leave every class at its initial value.

    Returns:
        the account, and what the checkpoint holds besides weights.

    Raises:
        UserError: see `read_checkpoint` and `fit_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    # What has no criterion is taken to have the classes of the original DETR.
    classes = getattr(getattr(model, "criterion", None), "classification", None)
    state, report = fit_checkpoint(
        checkpoint,
        model.state_dict(),
        path,
        class_names,
        new_class_head,
        no_object=classes is None or classes.num_logits > classes.num_classes,
    )
    model.load_state_dict(state, strict=False)
    report.log(path)
    del checkpoint["model"]
    return report, checkpoint


def _rates(checkpointable: Any) -> list[tuple[float, float]]:
    """Learning rates, before schedule, and weight decays of an optimizer; [] of anything else."""
    if not isinstance(checkpointable, torch.optim.Optimizer):
        return []
    groups = checkpointable.param_groups
    return sorted({(g.get("initial_lr", g["lr"]), g.get("weight_decay", 0.0)) for g in groups})


class DetrCheckpointer(DetectionCheckpointer):
    """A detectron2 checkpointer that loads every format of `FORMATS` and saves atomically.

    Only public methods of its bases are overridden. Every process reads the file itself; only the
    main process writes.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] | None = None,
        config: str | None = None,
        new_class_head: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model: a `Detr`, wrapped for data parallelism or not.
            save_dir: folder of the checkpoints.
            class_names: names of the model's classes, saved with every checkpoint and used to map
                the class head of others.
            config: yaml of the config, saved with every checkpoint.
            new_class_head: leave every class at its initial value, except when resuming.
            kwargs: ``save_to_disk`` and the checkpointables, see detectron2's.
        """
        super().__init__(model, save_dir, **kwargs)
        self.class_names = class_names
        self.config = config
        self.new_class_head = new_class_head
        # What became of the last checkpoint that was loaded.
        self.report: LoadReport | None = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As the base class's: goes on from the last checkpoint of `save_dir`, where there is one.

        Raises:
            UserError: see `load` and `last_checkpoint`.
        """
        file = self.last_checkpoint() if resume else None
        if file is None:
            return super().resume_or_load(path, resume=False)
        return self.load(file, checkpointables=list(self.checkpointables) or None)

    def last_checkpoint(self) -> str | None:
        """The file that ``--resume`` goes on from; None where no training has saved one.

        Raises:
            UserError: it is not there, or not the same on all processes.
        """
        file = self.get_checkpoint_file() if self.has_checkpoint() else None
        everywhere = comm.all_gather(file and os.path.basename(file))
        if len(set(everywhere)) > 1:
            seen = ", ".join(str(name) for name in everywhere)
            raise UserError(
                f"--resume finds other checkpoints in '{self.save_dir}' on other machines (process "
                f"by process: {seen}): use a folder that all of them share, or copy it to each."
            )
        if file is not None and not PathManager.isfile(file):
            names = [os.path.basename(f) for f in self.get_all_checkpoint_files()]
            there = f": {', '.join(sorted(names))}" if names else ", or start without --resume"
            raise UserError(
                f"'{os.path.join(self.save_dir, 'last_checkpoint')}' names "
                f"{os.path.basename(file)!r}, which does not exist: write the name of another "
                f"checkpoint into it{there}."
            )
        return file

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads weights, and from a training of this package the checkpointables too.

        Args:
            path: see `read_checkpoint`; empty to load nothing.
            checkpointables: names to restore, which must be there; None for all that are. With any
                of them the weights must fit exactly.

        Returns:
            what the checkpoint holds besides, ``class_names`` and ``config`` among it.

        Raises:
            UserError: see `read_checkpoint` and `fit_checkpoint`; also when training is to go on
                from weights alone or such that do not fit exactly, or with an optimizer of other
                groups.
        """
        if not path:
            logger.warning("MODEL.WEIGHTS is empty: the whole model is at its initial value.")
            return {}
        resuming = checkpointables != []
        report, checkpoint = load_weights(
            self.model, path, self.class_names, self.new_class_head and not resuming
        )
        self.report = report
        wanted = list(self.checkpointables) if checkpointables is None else checkpointables
        # A foreign file's "optimizer" is not ours.
        restored = [name for name in wanted if name in checkpoint and "package" in checkpoint]
        if checkpointables and restored != wanted:
            missing = ", ".join(name for name in wanted if name not in restored)
            raise UserError(
                f"'{path}' holds weights, but of this package's training no state that could go on "
                f"({missing}): start anew with MODEL.WEIGHTS {path} and without --resume."
            )
        if restored and not report.exact:
            raise UserError(
                f"Training cannot go on from '{path}': its weights do not fit the model exactly "
                "(see the table above). Keep the config as it was, or start anew with "
                f"MODEL.WEIGHTS {path} and without --resume."
            )
        for name in restored:
            before = _rates(self.checkpointables[name])
            try:
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
            except ValueError as error:
                raise UserError(
                    f"Training cannot go on from '{path}': its {name} does not fit ({error}). Keep "
                    "the config as it was, SOLVER's factors and what is frozen included, or start "
                    f"anew with MODEL.WEIGHTS {path} and without --resume."
                ) from error
            if (now := _rates(self.checkpointables[name])) != before:
                logger.warning(
                    f"The training goes on with the checkpoint's learning rates and weight decays "
                    f"{now}, not with the config's {before}: to change them, start anew with "
                    f"MODEL.WEIGHTS {path} and without --resume."
                )
        return checkpoint

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``name``.pth with everything, then makes it the last checkpoint.

        Args:
            name: of the file, without ``.pth``.
            kwargs: further plain values to save.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        self.save_weights(name, **states, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Writes ``name``.pth without the state of the training, beside the last checkpoint.

        Args, Raises: as of `save`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= metadata_of(self.class_names, self.config) | kwargs
        file = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", file)
        write_atomically(file, lambda stream: torch.save(data, stream))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file of ``save_dir`` the one that ``--resume`` goes on from."""
        file = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(file, lambda stream: stream.write(last_filename_basename.encode()))
