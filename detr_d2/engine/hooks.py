"""Hooks of the training loop beyond detectron2's."""

from __future__ import annotations

import json
import logging
import os
import re

from detectron2.engine import HookBase, hooks
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from ..checkpoint import DetrCheckpointer
from ..checkpoint.write import write_atomically

logger = logging.getLogger(__name__)

BEST = "model_best"


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's; of the checkpoints that stay, those from before an interruption count, too."""

    def before_train(self) -> None:
        super().before_train()
        files = self.checkpointer.get_all_checkpoint_files() if self.trainer.start_iter else []
        name = re.compile(rf"{self.file_prefix}_(\d+)\.pth")
        numbers = {file: name.fullmatch(os.path.basename(file)) for file in files}
        self.recent_checkpoints = sorted(
            file for file, at in numbers.items() if at and int(at[1]) < self.trainer.start_iter
        )


class BestCheckpointer(HookBase):
    """Keeps the weights of the best evaluation as ``model_best.pth``, and says in
    ``model_best.json`` which one it was. To be registered after `EvalHook`.

    detectron2's hook of this name forgets the best value when a training is resumed, and makes
    the best checkpoint the one that ``--resume`` goes on from.
    """

    def __init__(self, checkpointer: DetrCheckpointer, metric: str):
        """
        Args:
            checkpointer: writes the weights, in the main process.
            metric: name in detectron2's event storage, of which more is better, e.g. "bbox/AP".
        """
        self.checkpointer = checkpointer
        self.metric = metric
        self.file = os.path.join(checkpointer.save_dir, f"{BEST}.json")
        self.best = float("-inf")
        self.seen_iteration = -1

    def before_train(self) -> None:
        """A resumed training has to be better than what there was before it stopped."""
        if not self.trainer.start_iter or not PathManager.isfile(self.file):
            return
        with PathManager.open(self.file) as stream:
            found = json.load(stream)
        if found["metric"] == self.metric:
            self.best = found["value"]

    def after_step(self) -> None:
        self.keep_if_better()

    def after_train(self) -> None:
        self.keep_if_better()
        is_whole = self.trainer.iter >= self.trainer.max_iter
        if is_whole and self.seen_iteration < 0 and self.checkpointer.save_to_disk:
            logger.warning(f"No evaluation gave a {self.metric} to choose {BEST}.pth by.")

    def is_resumed_from(self) -> bool:
        """Whether the file is another hook's: detectron2's has the same name, and makes it the one
        to resume from, which weights alone could not be."""
        checkpointer = self.checkpointer
        if not checkpointer.has_checkpoint():
            return False
        if os.path.basename(checkpointer.get_checkpoint_file()) != f"{BEST}.pth":
            return False
        log_first_n(
            logging.WARNING,
            f"Another hook writes {BEST}.pth, which is left to it: set TEST.BEST_METRIC '' to have "
            "that one only.",
            name=logger.name,
        )
        return True

    def keep_if_better(self) -> None:
        """Where there was an evaluation since the last call, and no better one before."""
        value, iteration = self.trainer.storage.latest().get(self.metric, (None, -1))
        if iteration <= self.seen_iteration:
            return
        self.seen_iteration = iteration
        if not value > self.best:  # also NaN
            return
        if self.is_resumed_from():
            return
        self.best = value
        logger.info(f"The best {self.metric} so far, {value:.2f}, is kept as {BEST}.pth.")
        self.checkpointer.save_weights(BEST)
        known = {"metric": self.metric, "value": value, "iteration": iteration}
        if self.checkpointer.save_to_disk:
            write_atomically(self.file, lambda s: s.write(json.dumps(known).encode()))
