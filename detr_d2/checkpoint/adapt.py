"""Fitting a checkpoint to a model: formats, heads, classes and numbers of queries.

Tensors are never dropped in silence: everything is loaded, left at its initial value or ignored,
and `LoadReport` says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import UserError
from .class_rows import UnknownNamesError, match_classes
from .formats import FORMATS, TIMM_BODY, recognise_format, timm_names, with_body_of
from .names import Format, StateDict
from .report import LoadReport, abbreviate

# Beyond this share of unknown tensors a file is taken to be of another model. A few are tolerated,
# as forks add a tensor here and there.
_MAX_UNKNOWN = 0.1
# Tensors with a row for each class, and those with one for each query.
_CLASSES = re.compile(r"transformer\..*(\bclass_head\.(weight|bias)|\.label_embedding\.weight)")
_QUERIES = re.compile(r"transformer\.queries\.(position|content|anchors)\.weight")
# Of the encoder's proposals. Beside a projection of their position (Deformable DETR), only the
# first row counts, which stands for an object of any class.
_PROPOSALS = "transformer.queries.head."
_CLASS_AGNOSTIC = "transformer.queries.position_proj.weight"


def fit_checkpoint(
    checkpoint: dict[str, Any],
    model_state: StateDict,
    path: str,
    class_names: Sequence[str] | None = None,
    new_class_head: bool = False,
    no_object: bool = True,
) -> tuple[StateDict, LoadReport]:
    """Makes a checkpoint of any format a state dict of a model.

    Args:
        checkpoint: what `read_checkpoint` returned.
        model_state: the model's ``state_dict()``, with its initial values.
        path: name of the file, for messages.
        class_names: names of the model's classes, or None where they are not known.
        new_class_head: leave every class at its initial value.
        no_object: whether the last row of the model's class heads stands for no-object.

    Returns:
        tensors for the model (only those the checkpoint has), and the account.

    Raises:
        UserError: the checkpoint is one of another model, of another width, or has another number
            of classes that cannot be mapped by their names.
    """
    theirs = _without_counters(checkpoint["model"], model_state)
    found, unknown, strange, recognised = _in_own_names(theirs, model_state, path)
    report = LoadReport(recognised.title, ignored=unknown)
    _fit_number_of_heads(found, model_state, report)
    state: StateDict = {}
    differing = {}
    for name, tensor in found.items():
        if name not in model_state:
            report.ignored.append(name)
            continue
        same_width = tensor.shape[1:] == model_state[name].shape[1:]
        if same_width and _CLASSES.fullmatch(name):
            continue
        if tensor.shape == model_state[name].shape:
            state[name] = tensor
        elif same_width and _QUERIES.fullmatch(name):
            state[name] = _fit_queries(name, tensor, model_state[name], report)
        else:
            differing[name] = (tuple(tensor.shape), tuple(model_state[name].shape))
    _refuse_another_shape("backbone", differing, state, path)
    _refuse_another_model(found, strange, model_state, path, recognised.title)
    _refuse_another_shape("transformer", differing, state, path)
    names = (checkpoint.get("class_names"), class_names)
    no_objects = (recognised.no_object, no_object)
    state |= _fit_classes(found, model_state, path, names, no_objects, new_class_head, report)
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
) -> tuple[StateDict, list[str], list[str], Format]:
    """Own state dict, names in the file without an own one, the unexpected of those, the format."""
    if pairs := timm_names(state, model_state):
        own = {ours: state[theirs] for theirs, ours in pairs.items()}
        return own, [name for name in state if name not in pairs], [], TIMM_BODY
    recognised = recognise_format(state)
    if recognised is None:
        raise UserError(
            f"'{path}' is not a checkpoint of this model: its {len(state)} tensors "
            f"({abbreviate(state, limit=4)}) have names of no known format. Known are "
            f"{', '.join(f.title for f in FORMATS)}, and the timm model the backbone is built from."
        )
    own, unknown = recognised.to_own(state, f"'{path}'")
    strange = [name for name in unknown if not recognised.is_not_ours(name)]
    return with_body_of(own, model_state), unknown, strange, recognised


def _refuse_another_model(
    found: StateDict, strange: list[str], model_state: StateDict, path: str, title: str
) -> None:
    """Layers may be more or fewer; tensors of a kind that no layer of the model has may not."""

    def kind(name: str) -> str:
        return re.sub(r"\.\d+\.", ".#.", name)

    kinds = set(map(kind, model_state))
    # A model without masks is a part of one with them.
    strange = [
        name for name in found if kind(name) not in kinds and not name.startswith("mask_head.")
    ] + strange
    # All variants have the same backbones, which say nothing about what a detector is.
    telling = [name for name in found if not name.startswith("backbone.")] or found
    if len(strange) > _MAX_UNKNOWN * (len(telling) + len(strange)):
        raise UserError(
            f"'{path}' is a checkpoint of another model: named like {title}, but {len(strange)} of "
            f"its tensors have no place in this one ({abbreviate(strange, limit=4)}); choose a "
            "config of that model."
        )


_SHAPES = {
    # What sets the shapes, and the share of tensors that may differ: a few of the transformer may,
    # a backbone fits or is another.
    "backbone": ("MODEL.BACKBONE, MODEL.RESNETS and MODEL.TIMM", 0.0),
    "transformer": ("MODEL.DETR.HIDDEN_DIM and MODEL.DETR.DIM_FEEDFORWARD", 0.5),
}


def _refuse_another_shape(
    module: str, differing: dict[str, tuple], state: StateDict, path: str
) -> None:
    keys, tolerated = _SHAPES[module]
    names = [name for name in differing if name.startswith(module)]
    fitting = sum(name.startswith(module) for name in state)
    if len(names) > tolerated * (len(names) + fitting):
        theirs, ours = differing[names[0]]
        raise UserError(
            f"'{path}' does not fit the model: {len(names)} tensors of the {module} have another "
            f"shape, first '{names[0]}' with {theirs} in the file and {ours} in the model. "
            f"Set {keys} as they were in training."
        )


def _fit_number_of_heads(found: StateDict, model_state: StateDict, report: LoadReport) -> None:
    """One head for all decoder layers on one side, one for each of them on the other; in place."""
    theirs, ours = _by_layer(found), _by_layer(model_state)
    for part, layers in theirs.items():
        first, wanted = found[layers[0]], ours.get(part, [])
        if len(layers) == 1 < len(wanted):
            found |= {name: first for name in wanted}
            report.fitted += [name for name in wanted if name not in layers]
            report.notes.append(
                "The model has a head for each decoder layer, the checkpoint one for all: each "
                "starts as a copy of it."
            )
        elif len(wanted) == 1 < len(layers):
            if all(torch.equal(found[name], first) for name in layers):
                for name in layers[1:]:
                    del found[name]
                continue
            report.notes.append(
                f"The checkpoint has another head for each of {len(layers)} decoder layers, the "
                "model one for all (MODEL.DETR.SHARED_HEADS): only that of the FIRST layer is "
                "loaded."
            )


def _by_layer(state: StateDict) -> dict[str, list[str]]:
    """Tensors of the decoder's heads by what they are, in the order of the layers."""
    groups: dict[str, dict[int, str]] = {}
    for name in state:
        if match := re.fullmatch(r"transformer\.decoder\.heads\.(\d+)\.(.+)", name):
            groups.setdefault(match[2], {})[int(match[1])] = name
    return {part: [names[layer] for layer in sorted(names)] for part, names in groups.items()}


def _fit_classes(
    found: StateDict,
    model_state: StateDict,
    path: str,
    class_names: tuple[Sequence[str] | None, Sequence[str] | None],
    no_object: tuple[bool | None, bool],
    new_class_head: bool,
    report: LoadReport,
) -> StateDict:
    """Brings rows that stand for classes to where the model has them; returns what has such rows.

    Pairs are of the checkpoint and the model.
    """
    tensors = {
        name: tensor
        for name, tensor in found.items()
        if _CLASSES.fullmatch(name)
        and name in model_state
        and tensor.shape[1:] == model_state[name].shape[1:]
    }
    head = next((name for name in tensors if ".class_head." in name), None)
    if head is None:
        return {name: t for name, t in tensors.items() if t.shape == model_state[name].shape}
    theirs_has_no_object, ours_has_no_object = no_object
    if theirs_has_no_object is None:
        theirs_has_no_object = _ends_with_no_object(
            len(tensors[head]), class_names[0], ours_has_no_object
        )
    if theirs_has_no_object != ours_has_no_object:
        report.notes.append(
            "The class head was trained with {}, the model has {}: train it before you evaluate "
            "it.".format(
                *("softmax" if x else "sigmoid" for x in (theirs_has_no_object, ours_has_no_object))
            )
        )
    source, target = (
        len(tensors[head]) - theirs_has_no_object,
        len(model_state[head]) - ours_has_no_object,
    )
    classes, note = _match_classes(path, source, target, class_names, new_class_head)
    if note:
        report.notes.append(note)
    report.new_classes = classes.count(None) if classes else 0
    fitted = {}
    for name, tensor in tensors.items():
        initial = model_state[name]
        if classes is None and tensor.shape == initial.shape:
            fitted[name] = tensor
            continue
        rows = list(range(target)) if classes is None else list(classes)
        if name.startswith(_PROPOSALS) and _CLASS_AGNOSTIC in found:
            rows[0] = 0
        if len(initial) > target:
            rows.append(len(tensor) - 1 if len(tensor) > source else None)
        fitted[name] = _take_rows(tensor, initial, rows)
        report.fitted.append(name)
    return fitted


def _ends_with_no_object(rows: int, class_names: Sequence[str] | None, default: bool) -> bool:
    if class_names is not None and rows - len(class_names) in (0, 1):
        return rows > len(class_names)
    return default


def _match_classes(
    path: str,
    source: int,
    target: int,
    names: tuple[Sequence[str] | None, Sequence[str] | None],
    new_class_head: bool,
) -> tuple[list[int | None] | None, str]:
    if new_class_head:
        note = f"MODEL.DETR.NEW_CLASS_HEAD: all {target} classes are at their INITIAL value."
        return [None] * target, note
    try:
        return match_classes(source, target, *names)
    except UnknownNamesError as error:
        raise UserError(
            f"'{path}' has {source} classes, the model {target}, and they cannot be mapped "
            f"because the names of {error} are not known: set MODEL.DETR.NUM_CLASSES to "
            f"{source}, or start a new class head with MODEL.DETR.NEW_CLASS_HEAD True."
        ) from error


def _take_rows(
    tensor: torch.Tensor, initial: torch.Tensor, rows: Iterable[int | None]
) -> torch.Tensor:
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
