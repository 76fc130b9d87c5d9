"""Renaming the tensors of a state dict by a table that reads in both directions.

One row of a table pairs a pattern of this package's names ("own") with one of a foreign format:

* ``#`` stands for a number (of a layer or block), ``*`` for the last part (``weight``, ``bias``,
  ``running_mean``, ...), ``**`` for any remainder. Both sides use them in the same order.
* ``{q,k,v}`` on the own side names tensors that the foreign format stores as one, concatenated
  along the first axis in that order; ``[a,b]`` the same along the second axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import UserError

Row = tuple[str, str]
StateDict = dict[str, torch.Tensor]

_WILDCARDS = {"#": r"(\d+)", "**": r"(.+)", "*": r"(\w+)"}
_TOKEN = re.compile(r"#|\*\*|\*")


def _compile(pattern: str) -> re.Pattern[str]:
    literals, wildcards = _TOKEN.split(pattern), _TOKEN.findall(pattern)
    regex = re.escape(literals[0])
    for wildcard, literal in zip(wildcards, literals[1:], strict=True):
        regex += _WILDCARDS[wildcard] + re.escape(literal)
    return re.compile(regex)


def _fill(pattern: str, groups: Iterable[str]) -> str:
    values = iter(groups)
    return _TOKEN.sub(lambda _: next(values), pattern)


def _expand(pattern: str) -> tuple[tuple[str, ...], int]:
    """``"a.{q,k}.b"`` -> ``("a.q.b", "a.k.b"), 0``; the number is the axis of concatenation. A
    pattern without brackets is its own expansion."""
    match = re.search(r"\{(.*)\}|\[(.*)\]", pattern)
    if match is None:
        return (pattern,), 0
    head, tail = pattern[: match.start()], pattern[match.end() :]
    choices = match[match.lastindex].split(",")
    return tuple(head + choice + tail for choice in choices), match.lastindex - 1


class _Rename:
    """One compiled row: several own patterns (usually one), one foreign pattern."""

    def __init__(self, own: str, foreign: str):
        self.foreign = foreign
        self.own, self.axis = _expand(own)
        self._own = [_compile(pattern) for pattern in self.own]
        self._foreign = _compile(foreign)

    def own_names(self, foreign_name: str) -> tuple[str, ...] | None:
        match = self._foreign.fullmatch(foreign_name)
        return match and tuple(_fill(pattern, match.groups()) for pattern in self.own)

    def foreign_name(self, own_name: str) -> tuple[str, int] | None:
        """The foreign name and which of its parts ``own_name`` is."""
        for part, regex in enumerate(self._own):
            if match := regex.fullmatch(own_name):
                return _fill(self.foreign, match.groups()), part
        return None


@dataclass(frozen=True)
class Format:
    """One way of naming the tensors of a detector or backbone.

    Attributes:
        key: short name, as on the command line of ``tools/convert_weights.py``.
        title: what the log calls it.
        signature: regular expressions. A file in which each of them matches some name, in the
            table's spelling, is of this format, unless it is of one that `FORMATS` has before it.
        rows: the table, see the head of this file; the first row that matches decides.
        spellings: (regular expression, replacement) pairs that bring what versions of the same
            format write differently to the spelling that the table uses.
        copies: the same for names of tensors that are in the file a second time: what they are
            replaced with is the name of the first. Only `to_own` knows them.
        last: regular expression of what comes before a number; the highest number that a file has
            there is ``last`` in the table.
        not_ours: regular expression of names, in the table's spelling, that belong to parts the
            detector does not have (a classifier, a criterion, the buffers of pixel statistics);
            they are ignored when loading.
        no_object: whether the last row of a class head stands for "no object"; None: not known.
    """

    key: str
    title: str
    signature: tuple[str, ...]
    rows: tuple[Row, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    last: str = r"(?!)"
    not_ours: str = r"(?!)"
    no_object: bool | None = None
    _renames: tuple[_Rename, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_renames", tuple(_Rename(*row) for row in self.rows))

    def spell(self, name: str) -> str:
        return _replace(self.spellings, name)

    def is_signed_by(self, names: Iterable[str]) -> bool:
        spelled = [self.spell(name) for name in names]
        return all(any(re.match(regex, name) for name in spelled) for regex in self.signature)

    def is_not_ours(self, name: str) -> bool:
        return re.match(self.not_ours, self.spell(name)) is not None

    def _in_table(self, names: Iterable[str]) -> dict[str, str]:
        """name in the file -> its spelling in the table, that of the first for copies."""
        spelled = {name: _replace(self.copies, self.spell(name)) for name in names}
        numbered = re.compile(rf"({self.last})\.(\d+)\.")
        numbers = {
            name: int(match[2])
            for name, spelling in spelled.items()
            if (match := numbered.match(spelling))
        }
        highest = max(numbers.values(), default=None)
        for name in (name for name, number in numbers.items() if number == highest):
            spelled[name] = numbered.sub(r"\1.last.", spelled[name])
        return spelled

    def _row_of(self, name: str) -> tuple[_Rename, tuple[str, ...]] | None:
        if re.match(self.not_ours, name):
            return None
        found = ((rename, rename.own_names(name)) for rename in self._renames)
        return next((pair for pair in found if pair[1]), None)

    def to_own(
        self, state: StateDict, source: str = "the state dict"
    ) -> tuple[StateDict, list[str]]:
        """Returns the renamed state dict and the foreign names that no row knows.

        Args:
            state: tensors by their foreign names.
            source: where they come from, for messages.

        Raises:
            UserError: tensors that the format has as copies of one another differ.
        """
        own: StateDict = {}
        unknown = []
        first: dict[str, str] = {}
        for name, spelling in self._in_table(state).items():
            found = self._row_of(spelling)
            if found is None:
                unknown.append(name)
                continue
            if (original := first.setdefault(spelling, name)) != name:
                self._check_copy(state, original, name, source)
                continue
            rename, names = found
            # Cloned so that saving one of three views does not write the storage of all.
            chunks = state[name].chunk(len(names), rename.axis) if names[1:] else ()
            own.update(zip(names, [t.clone() for t in chunks] or [state[name]], strict=True))
        return own, unknown

    def _check_copy(self, state: StateDict, first: str, second: str, source: str) -> None:
        if not torch.equal(state[first], state[second]):
            raise UserError(
                f"'{first}' and '{second}' differ in {source}, but are one tensor in "
                f"{self.title}: it is a checkpoint of another model."
            )

    def from_own(self, state: StateDict) -> tuple[StateDict, list[str]]:
        """Returns the foreign state dict, without copies, and the own names that no row knows.

        Of tensors that the format stores as one, none has a name unless all are there.
        """
        parts: dict[str, dict[int, str]] = {}
        renames: dict[str, _Rename] = {}
        unknown = []
        for name in state:
            for rename in self._renames:
                if found := rename.foreign_name(name):
                    parts.setdefault(found[0], {})[found[1]] = name
                    renames[found[0]] = rename
                    break
            else:
                unknown.append(name)
        foreign: StateDict = {}
        for name, pieces in parts.items():
            if len(pieces) != len(renames[name].own):
                unknown += pieces.values()
                continue
            tensors = [state[pieces[part]] for part in sorted(pieces)]
            axis = renames[name].axis
            foreign[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)
        return foreign, unknown


def _replace(pairs: Iterable[tuple[str, str]], name: str) -> str:
    for regex, replacement in pairs:
        name = re.sub(regex, replacement, name)
    return name
