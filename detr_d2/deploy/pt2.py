"""`.pt2` files as data.

`torch.export.load` unpickles objects and evaluates expressions, so a file may do anything. Here
only what `save_program` writes is read: numbers, and a graph of PyTorch's operators.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError

# Below the folder that has the archive's name.
_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)"
)
_NAME = re.compile(r"-?\w*|(?!torch|math|_operator|#)\w+(\.\w+)+")
# `from_file` is the one operator that opens files.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)(_?[a-z]\w*|__(and|or|xor)__)\.\w+|torch\.sym_[a-z]+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
# Sizes are expressions that are evaluated. No other strings: SymPy would evaluate these, too.
_EXPRESSION = re.compile(
    r"(Symbol\('[a-z]+\d+'|L\['\w+'\]\.size\(\)|torch\.sym_[a-z]+\(|\d|[ ()\[\],=+\-*/%<>!]"
    r"|\b(Add|Mul|Pow|Integer|Rational|Min|Max|Mod|PythonMod|ModularIndexing|FloorDiv|CeilDiv"
    r"|CleanDiv|IntTrueDiv|FloatTrueDiv|PowByNatural|ToFloat|TruncToInt|CeilToInt|FloorToInt"
    r"|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|and|or|not|positive|nonnegative|integer|True|False)\b)+"
)
_TREE = re.compile(
    r'([\d \[\]{},:]|null|"(type|context|children_spec|null|\[\]|builtins\.(tuple|list|dict))")+'
)
# These are handed on as they are.
_TEXTS = ("as_string", "torch_version")


def save_program(program: Any, path: Path) -> None:
    """Writes a `torch.export.ExportedProgram` without examples, which would be pickled, and without
    the places in the source that its operators come from."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack"):
                node.meta.pop(key, None)
    torch.export.save(program, path)


def load_program(path: Path) -> tuple[nn.Module, int]:
    """Reads what `save_program` wrote.

    Returns:
        The function, and what its images' sides must have at least: strided convolutions of maps of
        one pixel are other programs.

    Raises:
        UserError: the file holds something that reading might execute.
    """
    # From memory, so that what is read is what was checked.
    content = io.BytesIO(path.read_bytes())
    if suspect := find_code(content):
        raise UserError(
            f"'{path}' is refused: PyTorch might run code from its {suspect}; export the model "
            "again with this version of detr_d2 and PyTorch, as .pt2 or as .onnx."
        )
    content.seek(0)
    program = torch.export.load(content)
    ranges = [int(each.lower) for each in program.range_constraints.values()]
    return program.module(), max(ranges, default=1)


def find_code(content: io.BytesIO) -> str | None:
    """What in an archive is none of the things that are known to be data."""
    for entry in zipfile.ZipFile(content).namelist():
        if not _FILES.fullmatch(entry.partition("/")[2]):
            return f"entry {entry!r}"
    content.seek(0)
    archive = torch._C.PyTorchFileReader(content)  # whose view of the file is the one that counts
    for entry in archive.get_all_records():
        if not _FILES.fullmatch(entry):
            return f"entry {entry!r}"
    if archive.get_record("data/sample_inputs/model.pt"):
        return "example inputs, which are pickled"
    for kind in ("weights", "constants"):
        described = json.loads(archive.get_record(f"data/{kind}/model_{kind}_config.json"))
        for name, payload in described["config"].items():
            if payload["use_pickle"] is not False:
                return f"{name!r}, which is pickled"
    for text in _strings(json.loads(archive.get_record("models/model.json"))):
        if not any(kind.fullmatch(text) for kind in (_NAME, _OPERATOR, _EXPRESSION, _TREE)):
            return f"graph, which holds {text[:60]!r}"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for key, child in value.items():
            if key not in _TEXTS or not isinstance(child, str):
                yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)
