"""The one exception type for what a user can mend, and what often needs mending."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class UserError(ValueError):
    """A wrong file, key or number. The message is one sentence that names it and says what to do;
    the tools print it without a traceback and exit with status 1."""


def require_package(name: str, extra: str) -> ModuleType:
    """An optional package.

    Raises:
        UserError: it is not installed; names the extra that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # it is installed, and lacks something itself
        raise UserError(
            f"The package {name!r} is needed here and not installed: pip install {name}, or all "
            f"of its kind in a checkout with pip install -e '.[{extra}]'."
        ) from error
