"""Which class of a checkpoint belongs to which class of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from detectron2.data import MetadataCatalog

Names = Sequence[str | None]

# What Hugging Face writes for holes and where nobody gave names.
_NO_NAME = re.compile(r"N/A|LABEL_\d+")


class UnknownNamesError(ValueError):
    """Classes cannot be mapped by name; the message says whose names are missing."""


def coco_names(num_classes: int) -> list[str | None] | None:
    """Names of COCO's classes as heads of this size count them; None where no head of COCO does.

    80 contiguous classes (133 with stuff), or rows indexed by COCO's category ids, which go up to
    90 with ten holes: 91 for boxes, 250 where the ids of stuff follow (None: no such class).
    """
    metadata = MetadataCatalog.get("coco_2017_train_panoptic")
    names = metadata.stuff_classes  # of things, too: detectron2's list has all 133
    things = metadata.thing_dataset_id_to_contiguous_id
    if num_classes in (len(things), len(names)):
        return list(names[:num_classes])
    if num_classes not in (91, 250):
        return None
    contiguous = {**things, **metadata.stuff_dataset_id_to_contiguous_id}
    return [names[contiguous[i]] if i in contiguous else None for i in range(num_classes)]


def names_of_rows(names: Names | None, num_classes: int) -> list[str | None] | None:
    """The names of a head's classes: those given where they fit, else COCO's by their number.

    COCO's 80 names given for a head of 91 are spread over the category ids.
    """
    if names is not None and len(names) == num_classes:
        return [None if _NO_NAME.fullmatch(name or "N/A") else name for name in names]
    if names is None or list(names) == coco_names(80):
        return coco_names(num_classes)
    return None


def match_classes(
    source: int, target: int, source_names: Names | None, target_names: Names | None
) -> tuple[list[int | None] | None, str]:
    """Finds for each class of the model the class of the checkpoint to take.

    Args:
        source: number of the checkpoint's classes, without no-object.
        target: number of the model's.
        source_names: class names the checkpoint tells, or None.
        target_names: class names of the model's data set, or None.

    Returns:
        for each of the model's classes the checkpoint's, None where it has none; and a sentence
        for the log. No list at all means: take the classes as they are (then the sentence, if there
        is one, is a warning).

    Raises:
        UnknownNamesError: the numbers of classes differ, and one side's names are not known.
    """
    ours = names_of_rows(target_names, target)
    theirs = names_of_rows(source_names, source)
    # Names that differ in capitals are one class, unless both are there, as letters may be.
    named = [(name, row) for row, name in enumerate(theirs or ()) if name is not None]
    found = dict(named)
    alike = {name.casefold(): row for name, row in named}
    rows = [found.get(name, alike.get(name.casefold())) if name else None for name in ours or ()]
    matched, wanted = (sum(x is not None for x in side) for side in (rows, ours or ()))

    if source == target and (ours is None or theirs is None or ours == theirs):
        return None, ""
    if source == target and not matched and wanted:
        return None, (
            "Class head loaded unchanged although its classes have other names: "
            f"{_sample(theirs)} in the checkpoint, {_sample(ours)} in the model's data set."
        )
    if source == target and all(row in (None, i) for i, row in enumerate(rows)):
        return None, ""
    if ours is None or theirs is None:
        raise UnknownNamesError("the model's data set" if ours is None else "the checkpoint")
    note = (
        f"Class head mapped by class names: {matched} of the model's {wanted} classes found "
        f"among the checkpoint's {source}"
        + ("." if matched == wanted else ", the others left at their INITIAL value.")
    )
    return rows, note


def _sample(names: Names) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
