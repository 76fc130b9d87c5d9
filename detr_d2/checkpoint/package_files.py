"""Weights inside installed Python packages, as ``package://NAME/path/in/package``.

Where no other network than a package index is reached, ImageNet weights come from there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..errors import UserError

PREFIX = "package://"


class PackageFileHandler(PathHandler):
    """Resolves ``package://`` paths. The package is looked up, never imported."""

    prefix = PREFIX

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """
        Raises:
            UserError: the package is not installed, or has no such file.
        """
        root, inside = self._locate(path)
        file = (root / inside).resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise UserError(f"'{path}': {root} has no file {inside!r}.")
        return str(file)

    def _locate(self, path: str) -> tuple[Path, str]:
        """The folder, and the rest of the path inside it."""
        package, _, inside = path.removeprefix(PREFIX).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"'{path}' lies in the package {package!r}, which is not installed: "
                f"pip install {package.replace('_', '-')}"
            )
        return Path(spec.submodule_search_locations[0]).resolve(), inside

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if "w" in mode or "a" in mode or "+" in mode:
            raise UserError(f"'{path}' is part of an installed package and is only read.")
        return open(self._get_local_path(path), mode, buffering)  # noqa: SIM115


PathManager.register_handler(PackageFileHandler())
