"""Renaming the tensors of a state dict by a table that reads in both directions.

One row of a table pairs a pattern of this package's names ("own") with one of a foreign format:

* ``#`` stands for a number (of a layer or block), ``*`` for the last part (``weight``, ``bias``,
  ``running_mean``, ...), ``**`` for any remainder. Both sides use them in the same order.
* ``{q,k,v}`` on the own side names tensors that the foreign format stores as one, concatenated
  along the first axis in that order.
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


def _expand(pattern: str) -> tuple[str, ...]:
    """``"a.{q,k}.b"`` -> ``("a.q.b", "a.k.b")``; a pattern without braces is its own expansion."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return (pattern,)
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return tuple(head + choice + tail for choice in match.group(1).split(","))


class _Rename:
    """One compiled row: several own patterns (usually one), one foreign pattern."""

    def __init__(self, own: str, foreign: str):
        self.own, self.foreign = _expand(own), foreign
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
        signature: regular expression of a name, in the table's spelling, that no other format has.
        rows: the table, see the head of this file; the first row that matches decides.
        spellings: (regular expression, replacement) pairs that bring what versions of the same
            format write differently to the spelling that the table uses.
        not_ours: regular expression of names, in the table's spelling, that belong to parts the
            detector does not have (a classifier, a mask head); they are ignored when loading.
    """

    key: str
    title: str
    signature: str
    rows: tuple[Row, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    not_ours: str = r"(?!)"
    _renames: tuple[_Rename, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_renames", tuple(_Rename(*row) for row in self.rows))

    def spell(self, name: str) -> str:
        for regex, replacement in self.spellings:
            name = re.sub(regex, replacement, name)
        return name

    def is_signed_by(self, name: str) -> bool:
        return re.match(self.signature, self.spell(name)) is not None

    def is_not_ours(self, name: str) -> bool:
        return re.match(self.not_ours, self.spell(name)) is not None

    def _own_names(self, name: str) -> tuple[str, ...] | None:
        name = self.spell(name)
        if re.match(self.not_ours, name):
            return None
        return next(filter(None, (rename.own_names(name) for rename in self._renames)), None)

    def to_own(self, state: StateDict) -> tuple[StateDict, list[str]]:
        """Returns the renamed state dict and the foreign names that no row knows."""
        own: StateDict = {}
        unknown = []
        for name, tensor in state.items():
            names = self._own_names(name)
            if names is None:
                unknown.append(name)
                continue
            # Cloned so that saving one of three views does not write the storage of all.
            parts = [tensor] if len(names) == 1 else [t.clone() for t in tensor.chunk(len(names))]
            own.update(zip(names, parts, strict=True))
        return own, unknown

    def from_own(self, state: StateDict) -> tuple[StateDict, list[str]]:
        """Returns the foreign state dict and the own names that no row knows.

        Raises:
            UserError: only some of the tensors are there that the format stores as one.
        """
        parts: dict[str, dict[int, torch.Tensor]] = {}
        whole: dict[str, int] = {}
        unknown = []
        for name, tensor in state.items():
            for rename in self._renames:
                if found := rename.foreign_name(name):
                    parts.setdefault(found[0], {})[found[1]] = tensor
                    whole[found[0]] = len(rename.own)
                    break
            else:
                unknown.append(name)
        foreign: StateDict = {}
        for name, pieces in parts.items():
            if len(pieces) != whole[name]:
                raise UserError(
                    f"'{name}' is made of {whole[name]} tensors, of which only {len(pieces)} are "
                    "in the state dict."
                )
            tensors = [pieces[part] for part in sorted(pieces)]
            foreign[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return foreign, unknown
