"""`.pt2` files are read as data: what PyTorch would execute is refused before it reads it."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_d2.deploy.pt2 import load_program, save_program
from detr_d2.errors import UserError


class Tiny(nn.Module):
    """With a free size and a part without gradients, as detectors have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            x = x + 1
        return self.linear(x).reshape(-1) * self.scale


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program(module):
    free = ({0: torch.export.Dim.DYNAMIC},)
    return lambda: torch.export.export(module, (torch.rand(6, 4),), dynamic_shapes=free)


@pytest.fixture(scope="module")
def archive(program, tmp_path_factory):
    """Its entries, by their names without the archive's own."""
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    save_program(program(), path)
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def write_archive(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(f"tiny/{name}", content)


def test_a_program_is_the_same_after_reading(module, archive, tmp_path):
    write_archive(tmp_path / "tiny.pt2", archive)
    x = torch.rand(9, 4)
    loaded, _ = load_program(tmp_path / "tiny.pt2")
    assert torch.equal(loaded(x), module(x))
    assert str(Path(__file__)).encode() not in archive["models/model.json"]


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled_weight(entries, payload):
    key = "data/weights/model_weights_config.json"
    config = json.loads(entries[key])
    weight = config["config"]["linear.weight"]
    weight["use_pickle"] = True
    return {key: json.dumps(config).encode(), f"data/weights/{weight['path_name']}": payload}


def pickled_constant(entries, payload):
    key = "data/constants/model_constants_config.json"
    config = json.loads(entries[key])
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    config["config"]["it"] = meta | {"tensor_meta": None}
    return {key: json.dumps(config).encode(), "data/constants/opaque_obj_0": payload}


def graph_with(old, new):
    def changed(entries, payload):
        graph = entries["models/model.json"].decode()
        assert old in graph
        return {"models/model.json": graph.replace(old, new).encode()}

    return changed


CALL = "__import__('pathlib').Path('touched').touch()"
CASES = {
    "weight": (pickled_weight, "'linear.weight', which is pickled"),
    "constant": (pickled_constant, "entry 'tiny/data/constants/opaque_obj_0'"),
    "examples": (
        lambda entries, payload: {"data/sample_inputs/model.pt": payload},
        "example inputs, which are pickled",
    ),
    "legacy weights": (
        lambda entries, payload: {"data/weights/model.pt": payload},
        "entry 'tiny/data/weights/model.pt'",
    ),
    "compiled": (
        lambda entries, payload: {"data/aotinductor/model/model.so": b""},
        "entry 'tiny/data/aotinductor/model/model.so'",
    ),
    "size": (graph_with("Integer(3)", CALL), r"graph, which holds .*__import__"),
    "guard": (graph_with('"guards_code": []', f'"guards_code": ["{CALL}"]'), "__import__"),
    "operator": (graph_with("torch.ops.aten.linear.default", "torch.os.system"), "torch.os.system"),
    "other operator": (graph_with("torch.ops.aten.linear.default", "torchx.load"), "torchx.load"),
    "file": (
        graph_with("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default"),
        "torch.ops.aten.from_file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_might_be_executed_is_refused(archive, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, found = CASES[case]
    payload = pickle.dumps(Payload(tmp_path / "touched"))
    write_archive(tmp_path / "tiny.pt2", archive | change(archive, payload))
    with pytest.raises(UserError, match=f"tiny.pt2' is refused: .*{found}"):
        load_program(tmp_path / "tiny.pt2")
    assert not (tmp_path / "touched").exists()


def test_older_files_are_refused(tmp_path):
    """Until PyTorch 2.7 `torch.export.save` pickled the weights."""
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as file:
        file.writestr("version", "8.4")
        file.writestr("serialized_state_dict.pt", pickle.dumps(Payload(tmp_path / "touched")))
    with pytest.raises(UserError, match="old.pt2' is refused: .*entry 'version'; export the model"):
        load_program(tmp_path / "old.pt2")
    assert not (tmp_path / "touched").exists()
