"""Reading checkpoints of strangers: tensors and plain values, never code.

``.pth .pt .bin .ckpt`` go through ``torch.load(weights_only=True)``, ``.pkl`` through an unpickler
that knows numpy arrays only, ``.safetensors`` hold no code by design. A directory is taken as
Hugging Face's: ``config.json`` and one or several weight files.
"""

from __future__ import annotations

import _codecs
import argparse
import io
import json
import logging
import os
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import numpy as np
import safetensors
import torch
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from . import package_files  # noqa: F401  (teaches PathManager package://)

logger = logging.getLogger(__name__)

# Single files and indices of several files that make up a Hugging Face directory, best first.
_DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where training scripts keep the state dict; a file with none of these is the state dict itself.
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")
# How the text begins that a clone without Git LFS has in place of a file.
_LFS_POINTER = b"version https://git-lfs."


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint without executing anything that is in it.

    Args:
        path: a file, a Hugging Face directory, or anything detectron2's PathManager resolves
            (``https://``, ``detectron2://``, ``package://``).

    Returns:
        ``{"model": {name: CPU tensor}}`` and what else the file holds; ``class_names`` among it
        when the file, or the ``config.json`` beside it, tells them.

    Raises:
        UserError: there is nothing at ``path``, or what is there is damaged, is no checkpoint, or
            could run code.
    """
    local = path if os.path.exists(path) else _fetch(path)
    if os.path.isdir(local):
        checkpoint = _read_directory(local)
    else:
        checkpoint = _read_file(local)
        if "class_names" not in checkpoint:
            checkpoint.update(_huggingface_metadata(os.path.dirname(local)))
    if "class_names" in checkpoint and not _are_names(checkpoint["class_names"]):
        logger.warning("The class names in '%s' are no list of names, and not used.", path)
        del checkpoint["class_names"]
    checkpoint["model"] = _tensors_of(checkpoint["model"], path)
    return checkpoint


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple))
    return is_list and all(name is None or isinstance(name, str) for name in value)


def _fetch(path: str) -> str:
    try:
        local = PathManager.get_local_path(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"Checkpoint '{path}' cannot be fetched: {error}") from error
    if not os.path.exists(local):
        raise UserError(
            f"Checkpoint '{path}' does not exist; correct the path (MODEL.WEIGHTS in a config)."
        )
    return local


def _read_file(path: str) -> dict[str, Any]:
    _refuse_pointer(path)
    reader = {".safetensors": _read_safetensors, ".pkl": _read_pickle}.get(
        os.path.splitext(path)[1], _read_torch
    )
    data = reader(path)
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds a {type(data).__name__}, not a state dict.")
    for key in _STATE_DICT_KEYS:
        if isinstance(data.get(key), dict):
            rest = {name: value for name, value in data.items() if name != key}
            return {**rest, "model": data[key]}
    return {"model": data}


def _refuse_pointer(path: str) -> None:
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from error
    if is_pointer:
        raise UserError(
            f"'{path}' is a Git LFS pointer in place of the file: run git lfs pull in its "
            "repository."
        )


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)|Can only \w+.*", str(error))
        raise _unsafe(path, found.group()) if found else _damaged(path, error) from error
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise _damaged(path, error) from error


def _numpy_function(name: str) -> Any:
    """A function of numpy that its pickles call, from wherever this numpy keeps it."""
    module = getattr(np, "_core", None) or np.core
    return getattr(module.multiarray, name)


# Official DETR checkpoints hold their command line as a Namespace, and training scripts their
# metrics as numpy numbers: plain values, which torch.load(weights_only=True) may build.
torch.serialization.add_safe_globals(
    [
        argparse.Namespace,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")},
        _numpy_function("scalar"),
        _codecs.encode,  # how numpy writes the bytes of such a number
    ]
)


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if "class_names" in metadata:
        with suppress(ValueError):  # not written by this package
            metadata["class_names"] = json.loads(metadata["class_names"])
    return {**metadata, "model": state}


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that is neither an array nor a plain value."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, strings and numpy arrays; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed `numpy.core` to `numpy._core`; files hold either.
        module = module.replace("numpy.core.", "numpy._core.")
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy._core.multiarray", "_reconstruct"): _numpy_function("_reconstruct"),
            ("numpy._core.multiarray", "scalar"): _numpy_function("scalar"),
            ("numpy._core.numeric", "_frombuffer"): lambda buffer, dtype, shape, order: (
                np.frombuffer(buffer, dtype).reshape(shape, order=order)
            ),
            # How Python 3 writes bytes in the old pickle protocols.
            ("_codecs", "encode"): str.encode,
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name} is neither an array nor a plain value")
        return allowed[module, name]


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        content = file.read()
    try:
        data = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused as error:
        raise _unsafe(path, str(error)) from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise _damaged(path, error) from error
    if isinstance(data, dict) and ("blobs" in data or "conv1_w" in data):
        raise UserError(
            f"'{path}' has the names of Caffe2, which are not read (its weights want BGR images "
            "and other statistics, too): use torchvision's weights of the same network, such as "
            "detectron2://ImageNetPretrained/torchvision/R-50.pkl."
        )
    return data


def _read_directory(path: str) -> dict[str, Any]:
    for name in _DIRECTORY_FILES:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            break
    else:
        raise UserError(f"Directory '{path}' holds none of {', '.join(_DIRECTORY_FILES)}.")
    checkpoint = _read_shards(file) if name.endswith(".index.json") else _read_file(file)
    return {**_huggingface_metadata(path), **checkpoint}


def _read_shards(index: str) -> dict[str, Any]:
    directory, state = os.path.dirname(index), {}
    content = _read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise UserError(f"'{index}' has no weight_map that names weight files: download it again.")
    for name in sorted(set(places.values())):
        # An index names its neighbours; a path that leads elsewhere is no index of a checkpoint.
        if os.path.basename(name) != name:
            raise UserError(f"'{index}' names '{name}', which is outside its directory.")
        state.update(_read_file(os.path.join(directory, name))["model"])
    return {"model": state}


def _huggingface_metadata(directory: str) -> dict[str, Any]:
    """Class names from the ``config.json`` of a Hugging Face detector; empty without one."""
    file = os.path.join(directory, "config.json")
    if not os.path.isfile(file):
        return {}
    try:
        config = _read_json(file)
    except UserError:
        return {}
    # Classifiers have labels, too, but no decoder.
    is_detector = isinstance(config, dict) and ("d_model" in config or "decoder_layers" in config)
    labels = config.get("id2label") if is_detector else None
    if not isinstance(labels, dict) or not labels:
        return {}
    return {"class_names": [labels.get(str(index), "N/A") for index in range(len(labels))]}


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise _damaged(path, error) from error


def _tensors_of(state: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(np.array(value))
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            tensors[name] = value
    if not tensors:
        found = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise UserError(f"'{path}' holds no tensors (found: {found}); it is no checkpoint.")
    return tensors


def _unsafe(path: str, found: str) -> UserError:
    return UserError(
        f"'{path}' holds more than tensors and plain values ({found}); loading that could run "
        "code, so the file is refused. If you trust its author, save its state dict alone."
    )


def _damaged(path: str, error: Exception) -> UserError:
    # torch wraps its reason in advice to load without its safeguard.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    return UserError(f"'{path}' cannot be read as a checkpoint, it may be damaged: {reason}")
