"""The account of loading a checkpoint: what was loaded, left at its initial value, or ignored."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tabulate import tabulate

from ..errors import UserError

logger = logging.getLogger(__name__)

# Rows of the log's table: the first that matches an own name has it.
_PARTS = {
    "backbone": r"backbone\.",
    "neck": r"neck\.",
    "encoder": r"transformer\.encoder\.",
    "queries": r"transformer\.queries\.",
    "class head": r"transformer\..*\bclass_head\.",
    "box head": r"transformer\..*\bbox_head\.",
    "denoising": r"transformer\.denoising\.",
    "decoder": r"transformer\.",
    "mask head": r"mask_head\.",
    "other": "",
}


@dataclass
class LoadReport:
    """What became of every tensor of the model and of the checkpoint.

    Attributes:
        title: the format of the checkpoint.
        loaded, initial, ignored: names; those of ``ignored`` are the checkpoint's.
        fitted: those of ``loaded`` that were mapped or resized.
        notes: sentences on what was mapped, resized or left out.
        new_classes: how many of the model's classes start at their initial value although the
            checkpoint has a class head.
    """

    title: str
    loaded: list[str] = field(default_factory=list)
    initial: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    new_classes: int = 0

    @property
    def transformer_untrained(self) -> bool:
        return not any(name.startswith("transformer.") for name in self.loaded)

    @property
    def exact(self) -> bool:
        """Whether the model now equals the checkpoint, tensor by tensor."""
        return not (self.initial or self.ignored or self.fitted)

    def refuse_untrained(self, path: str, key: str = "MODEL.WEIGHTS") -> None:
        """
        Raises:
            UserError: predictions would come from initial values.
        """
        if self.transformer_untrained:
            raise UserError(
                f"'{path}' is a backbone without a trained transformer: name the weights of a "
                f"trained detector in {key}, or train first."
            )
        if self.new_classes:
            raise UserError(
                f"{self.new_classes} of the model's classes were never trained in '{path}': name "
                f"other weights in {key}, use a data set with their classes, or train first."
            )

    def table(self) -> str:
        whole = [name for name in self.loaded if name not in self.fitted]
        columns = [
            Counter(map(_part, names)) for names in (whole, self.fitted, self.initial, self.ignored)
        ]
        headers = ("tensors of", "loaded", "loaded in part", "initial value", "ignored")
        rows = [
            (part, *(column[part] for column in columns))
            for part in _PARTS
            if any(column[part] for column in columns)
        ]
        return tabulate(rows, headers=headers)

    def log(self, path: str) -> None:
        logger.info("Loaded '%s' (%s):\n%s", path, self.title, self.table())
        for note in self.notes:
            logger.warning(note)
        initial = self.initial
        if self.transformer_untrained:
            logger.warning(
                "THE TRANSFORMER IS UNTRAINED: '%s' holds a backbone only. Train the model before "
                "you evaluate it.",
                path,
            )
            initial = [name for name in initial if name.startswith("backbone.")]
        if initial:
            logger.warning("Left at their INITIAL value: %s", abbreviate(initial))
        if self.ignored:
            logger.warning("Ignored, no place in the model: %s", abbreviate(self.ignored))


def _part(name: str) -> str:
    return next(part for part, regex in _PARTS.items() if re.match(regex, name))


def abbreviate(names: Iterable[str], limit: int | None = None) -> str:
    """``a.0.weight, a.0.bias, a.1.weight, b`` -> ``a.#.* (3), b``; `limit`: at most so many."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name.rpartition(".")[0]), []).append(name)
    shown = [f"{key}.* ({len(group)})" if group[1:] else group[0] for key, group in groups.items()]
    more = f" and {len(shown) - limit} more" if limit and len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
