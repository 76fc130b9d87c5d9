"""Writing checkpoints so that a process killed at any moment leaves the previous file whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

import safetensors.torch
import torch

from ..errors import UserError

FORMAT_VERSION = 1


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` on a temporary file in the same folder, then moves it to ``path``.

    The temporary name belongs to ``path``: two writers of different files do not meet, and what a
    killed process leaves behind is overwritten when it writes the file again.

    Raises:
        UserError: the folder does not take it, most often because the disk is full.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.unfinished")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the former into the latter
        free = shutil.disk_usage(folder).free >> 20 if os.path.isdir(folder) else 0
        reason = str(error).splitlines()[0]
        raise UserError(
            f"'{path}' cannot be written ({reason}), {free} MiB are free there: "
            "make room. The file that was there before is whole, and a training goes on from its "
            "last checkpoint with --resume."
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Makes the move itself survive a power failure, where system and file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def metadata_of(class_names: Sequence[str] | None, config: str | None) -> dict[str, Any]:
    """What every checkpoint of this package carries besides tensors."""
    metadata: dict[str, Any] = {"package": "detr_d2", "version": FORMAT_VERSION}
    if class_names is not None:
        metadata["class_names"] = [str(name) for name in class_names]
    if config is not None:
        metadata["config"] = str(config)
    return metadata


def write_checkpoint(
    path: str,
    state_dict: dict[str, torch.Tensor],
    *,
    class_names: Sequence[str] | None = None,
    config: str | None = None,
) -> None:
    """Writes weights only, as safetensors or for ``torch.load`` by the ending of ``path``.

    Args:
        path: ends in ``.safetensors``, or in anything else for torch's own format.
        state_dict: tensors by name.
        class_names: names of the classes in the order of the class head's rows.
        config: the yaml of the model's config.
    """
    metadata = metadata_of(class_names, config)
    if os.path.splitext(path)[1] == ".safetensors":
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        texts = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        }
        # Readers of other libraries ask for this entry.
        content = safetensors.torch.save(tensors, {**texts, "format": "pt"})
        write_atomically(path, lambda file: file.write(content))
    else:
        data = {"model": dict(state_dict), **metadata}
        write_atomically(path, lambda file: torch.save(data, file))
