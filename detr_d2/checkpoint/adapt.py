"""Fitting a checkpoint to a model: formats, class heads, numbers of queries, and the account of it.

Tensors are never dropped in silence: everything is loaded, left at its initial value or ignored,
and `LoadReport` says which.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from ..errors import UserError
from .class_rows import UnknownNamesError, match_rows
from .formats import FORMATS, recognise_format, timm_names, with_body_of
from .names import StateDict

logger = logging.getLogger(__name__)

# Rows of the log's table: the first that matches an own name has it.
_PARTS = {
    "backbone": r"backbone\.",
    "neck": r"neck\.",
    "encoder": r"transformer\.encoder\.",
    "queries": r"transformer\.queries\.",
    "class head": r"transformer\..*\bclass_head\.",
    "box head": r"transformer\..*\bbox_head\.",
    "decoder": r"transformer\.",
    "other": "",
}
# Beyond this share of unknown tensors a file is taken to be of another model. A few are tolerated,
# as forks add a tensor here and there.
_MAX_UNKNOWN = 0.1


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


def fit_checkpoint(
    checkpoint: dict[str, Any],
    model_state: StateDict,
    path: str,
    class_names: Sequence[str] | None = None,
    new_class_head: bool = False,
) -> tuple[StateDict, LoadReport]:
    """Makes a checkpoint of any format a state dict of a model.

    Args:
        checkpoint: what `read_checkpoint` returned.
        model_state: the model's ``state_dict()``, with its initial values.
        path: name of the file, for messages.
        class_names: names of the model's classes, or None where they are not known.
        new_class_head: leave every class at its initial value.

    Returns:
        tensors for the model (only those the checkpoint has), and the account.

    Raises:
        UserError: the checkpoint is one of another model, of another width, or has another number
            of classes that cannot be mapped by their names.
    """
    theirs = _without_counters(checkpoint["model"], model_state)
    found, unknown, strange, title = _in_own_names(theirs, model_state, path)
    report = LoadReport(title, ignored=unknown)
    state: StateDict = {}
    differing = {}
    class_heads = {}
    for name, tensor in found.items():
        if name not in model_state:
            report.ignored.append(name)
            continue
        same_width = tensor.shape[1:] == model_state[name].shape[1:]
        if same_width and name.endswith(("class_head.weight", "class_head.bias")):
            class_heads[name] = tensor
        elif tensor.shape == model_state[name].shape:
            state[name] = tensor
        elif same_width and ".queries." in name:
            state[name] = _fit_queries(name, tensor, model_state[name], report)
        else:
            differing[name] = (tuple(tensor.shape), tuple(model_state[name].shape))
    _refuse_another_shape(differing, state, path)
    _refuse_another_model(found, strange, model_state, path, title)
    names = (checkpoint.get("class_names"), class_names)
    for name, tensor in class_heads.items():
        rows = _class_rows(path, len(tensor), len(model_state[name]), names, new_class_head)
        state[name] = _fit_classes(name, tensor, model_state[name], rows, report)
    if differing:
        report.notes.append("Left at their INITIAL value for their shape: " + abbreviate(differing))
    report.loaded = list(state)
    report.initial = [name for name in model_state if name not in state]
    report.notes = list(dict.fromkeys(report.notes))
    return state, report


def _without_counters(state: StateDict, model_state: StateDict) -> StateDict:
    """Batch norms count their steps, frozen ones do not: nothing of value is lost."""
    counter = "num_batches_tracked"
    if any(name.endswith(counter) for name in model_state):
        return state
    return {name: tensor for name, tensor in state.items() if not name.endswith(counter)}


def _in_own_names(
    state: StateDict, model_state: StateDict, path: str
) -> tuple[StateDict, list[str], list[str], str]:
    """Own state dict, names in the file without an own one, the unexpected of those, the title."""
    if pairs := timm_names(state, model_state):
        own = {ours: state[theirs] for theirs, ours in pairs.items()}
        return own, [name for name in state if name not in pairs], [], "timm (backbone only)"
    recognised = recognise_format(state)
    if recognised is None:
        raise UserError(
            f"'{path}' is not a checkpoint of this model: its {len(state)} tensors "
            f"({abbreviate(state, limit=4)}) have names of no known format. Known are "
            f"{', '.join(f.title for f in FORMATS)}, and the timm model the backbone is built from."
        )
    own, unknown = recognised.to_own(state)
    strange = [name for name in unknown if not recognised.is_not_ours(name)]
    return with_body_of(own, model_state), unknown, strange, recognised.title


def _refuse_another_model(
    found: StateDict, strange: list[str], model_state: StateDict, path: str, title: str
) -> None:
    """Layers may be more or fewer; tensors of a kind that no layer of the model has may not."""

    def kind(name: str) -> str:
        return re.sub(r"\.\d+\.", ".#.", name)

    kinds = set(map(kind, model_state))
    strange = [name for name in found if kind(name) not in kinds] + strange
    if len(strange) > _MAX_UNKNOWN * (len(found) + len(strange)):
        raise UserError(
            f"'{path}' is a checkpoint of another model: named like {title}, but {len(strange)} of "
            f"its tensors have no place in this one: {abbreviate(strange, limit=4)}."
        )


def _refuse_another_shape(differing: dict[str, tuple], state: StateDict, path: str) -> None:
    """A few tensors of the transformer may differ in shape; a backbone fits or is another."""
    for room, keys, tolerated in (
        ("backbone", "MODEL.BACKBONE, MODEL.RESNETS and MODEL.TIMM", 0.0),
        ("transformer", "MODEL.DETR.HIDDEN_DIM and MODEL.DETR.DIM_FEEDFORWARD", 0.5),
    ):
        names = [name for name in differing if name.startswith(room)]
        fitting = sum(name.startswith(room) for name in state)
        if len(names) > tolerated * (len(names) + fitting):
            theirs, ours = differing[names[0]]
            raise UserError(
                f"'{path}' does not fit the model: {len(names)} tensors of the {room} have another "
                f"shape, first '{names[0]}' with {theirs} in the file and {ours} in the model. "
                f"Set {keys} as they were in training."
            )


def _class_rows(
    path: str,
    source: int,
    target: int,
    names: tuple[Sequence[str] | None, Sequence[str] | None],
    new_class_head: bool,
) -> tuple[list[int | None] | None, str]:
    if new_class_head:
        note = f"MODEL.DETR.NEW_CLASS_HEAD: all {target - 1} classes are at their INITIAL value."
        return [None] * (target - 1) + [source - 1], note
    try:
        return match_rows(source, target, *names)
    except UnknownNamesError as error:
        raise UserError(
            f"'{path}' has {source - 1} classes, the model {target - 1}, and they cannot be mapped "
            f"because the names of {error} are not known: set MODEL.DETR.NUM_CLASSES to "
            f"{source - 1}, or start a new class head with MODEL.DETR.NEW_CLASS_HEAD True."
        ) from error


def _fit_classes(
    name: str,
    tensor: torch.Tensor,
    initial: torch.Tensor,
    rows_and_note: tuple[list[int | None] | None, str],
    report: LoadReport,
) -> torch.Tensor:
    rows, note = rows_and_note
    if note:
        report.notes.append(note)
    if rows is None:
        return tensor
    report.fitted.append(name)
    report.new_classes = rows.count(None)
    fitted = initial.detach().clone()
    for row, source in enumerate(rows):
        if source is not None:
            fitted[row] = tensor[source].to(fitted)
    return fitted


def _fit_queries(
    name: str, tensor: torch.Tensor, initial: torch.Tensor, report: LoadReport
) -> torch.Tensor:
    report.fitted.append(name)
    fitted, kept = initial.detach().clone(), min(len(tensor), len(initial))
    fitted[:kept] = tensor[:kept].to(fitted)
    report.notes.append(
        f"The checkpoint has {len(tensor)} object queries, the model {len(initial)}: the first "
        f"{kept} are loaded"
        + (", the others left at their INITIAL value." if kept < len(initial) else ".")
    )
    return fitted
