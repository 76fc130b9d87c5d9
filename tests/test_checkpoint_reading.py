"""Reading files of strangers: no code runs, and every failure names the file."""

import collections
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from detr_d2.checkpoint import read_checkpoint
from detr_d2.errors import UserError

ROOT = Path(__file__).parents[1]


class Touch:
    """Unpickled, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class System(Touch):
    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def attack(payload, name, path):
    """A state dict with one poisoned value, as pickle, as torch file, or as old torch file."""
    data = {"model": {"weight": np.zeros(2), "bias": payload}, "__author__": "nobody"}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(data))
    else:
        data["model"]["weight"] = torch.zeros(2)
        torch.save(data, path, _use_new_zipfile_serialization="legacy" not in name)


@pytest.mark.parametrize("payload", [Touch, System, Evaluate])
@pytest.mark.parametrize(
    "name", ["m.pkl", "m.pth", "m.bin", "m.ckpt", "legacy.pth", "pytorch_model.bin"]
)
def test_malicious_file_raises_and_does_nothing(tmp_path, payload, name):
    path, mark = tmp_path / name, tmp_path / "executed"
    attack(payload(mark), name, path)
    # A directory is read through the same readers.
    source = tmp_path if name == "pytorch_model.bin" else path
    with pytest.raises(UserError, match=f"{name}.*could run code"):
        read_checkpoint(str(source))
    assert not mark.exists()


def test_the_attack_would_work_on_a_plain_reader(tmp_path):
    """Without this the test above could pass for want of an attack."""
    attack(Touch(tmp_path / "executed"), "m.pkl", tmp_path / "m.pkl")
    pickle.loads((tmp_path / "m.pkl").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "module, name",
    [("numpy", "load"), ("numpy.core.multiarray", "fromfile"), ("builtins", "getattr")],
)
def test_pickle_globals_next_to_the_allowed_ones(tmp_path, module, name):
    path = tmp_path / "m.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(UserError, match=f"m.pkl.*{name}"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol(tmp_path, protocol):
    arrays = collections.OrderedDict(
        weight=np.arange(6, dtype=np.float32).reshape(2, 3), count=np.array(7)
    )
    data = {"model": arrays, "__author__": "me", "score": np.float64(0.5), "bytes": b"\xff"}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
    checkpoint = read_checkpoint(str(tmp_path / "m.pkl"))
    assert checkpoint["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint["model"]["count"].item() == 7
    assert checkpoint["score"] == 0.5 and checkpoint["__author__"] == "me"


def test_arrays_of_numpy_1_and_numpy_2(tmp_path):
    content = pickle.dumps({"weight": np.ones(3, np.float32)}, protocol=2)
    module = b"numpy._core.multiarray" if b"numpy._core" in content else b"numpy.core.multiarray"
    for spelling in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        (tmp_path / "m.pkl").write_bytes(content.replace(module, spelling))
        state = read_checkpoint(str(tmp_path / "m.pkl"))["model"]
        assert state["weight"].tolist() == [1, 1, 1]


def test_numbers_of_numpy_in_training_checkpoints(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "best": np.float64(0.25)}, tmp_path / "m.pth")
    assert read_checkpoint(str(tmp_path / "m.pth"))["best"] == 0.25


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_where_the_state_dict_is_kept(tmp_path, key):
    state = {"weight": torch.arange(3)}
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "m.pth")
    assert read_checkpoint(str(tmp_path / "m.pth"))["model"]["weight"].tolist() == [0, 1, 2]


def truncated(path):
    torch.save({"model": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-1500])


def truncated_pickle(path):
    path.write_bytes(pickle.dumps({"model": {"weight": np.zeros(100)}})[:-50])


@pytest.mark.parametrize(
    "name, write",
    [
        ("m.pth", lambda path: path.write_bytes(b"")),
        ("m.pth", lambda path: path.write_text("<html>not found</html>")),
        ("m.pth", truncated),
        ("m.pth", lambda path: zipfile.ZipFile(path, "w").writestr("a", "b")),
        ("m.pkl", lambda path: path.write_bytes(b"")),
        ("m.pkl", lambda path: path.write_text("<html>not found</html>")),
        ("m.pkl", truncated_pickle),
        ("m.safetensors", lambda path: path.write_bytes(b"")),
        ("m.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")),
    ],
)
def test_damaged_files_are_named(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {}}])
def test_files_without_tensors_are_named(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match="m.pth"):
        read_checkpoint(str(tmp_path / "m.pth"))


@pytest.mark.parametrize("path", ["no/such/file.pth", "no/such/directory"])
def test_missing_files_are_named(tmp_path, path):
    with pytest.raises(UserError, match=f"{path}.*does not exist"):
        read_checkpoint(str(tmp_path / path))


def test_directory_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}.*model.safetensors"):
        read_checkpoint(str(tmp_path))


def test_index_may_not_lead_out_of_its_directory(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "secret.bin")
    (tmp_path / "hf").mkdir()
    index = tmp_path / "hf" / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"weight": "../secret.bin"}}')
    with pytest.raises(UserError, match="outside its directory"):
        read_checkpoint(str(tmp_path / "hf"))


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"weight": 3}}'])
def test_index_without_weight_map_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="index.json' has no weight_map"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.pkl"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(UserError, match=f"{name}' is a Git LFS pointer .*git lfs pull"):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("names", ["cat, dog", '"cat"', "[1, 2]"])
def test_class_names_of_other_kinds_are_not_used(tmp_path, names):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(1)}, path, {"class_names": names})
    assert "class_names" not in read_checkpoint(str(path))


def test_labels_that_are_a_list_are_not_used(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "m.pth")
    (tmp_path / "config.json").write_text('{"d_model": 8, "id2label": ["cat", "dog"]}')
    assert "class_names" not in read_checkpoint(str(tmp_path / "m.pth"))


def test_caffe2_files_are_refused_with_the_reason(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": np.zeros(1)}}))
    with pytest.raises(UserError, match="m.pkl.*Caffe2"):
        read_checkpoint(str(tmp_path / "m.pkl"))


def test_arrays_of_objects_are_not_tensors(tmp_path):
    data = {"weight": np.array([{"a": 1}], dtype=object)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match="m.pkl.*no tensors"):
        read_checkpoint(str(tmp_path / "m.pkl"))


def convert(*arguments) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "convert_weights.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_conversion_tool(tmp_path):
    state = {"query_embed.weight": torch.randn(2, 4), "backbone.0.body.conv1.weight": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "in.pth")
    good = convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "--to", "own")
    bad = convert(tmp_path / "missing.pth", tmp_path / "out.pth", "--to", "own")
    lost = convert(tmp_path / "in.pth", tmp_path / "in.pth" / "out.pth", "--to", "own")
    message, complaint = good.communicate()[1], bad.communicate()[1]
    unwritten = lost.communicate()[1]
    assert lost.returncode == 1
    assert "in.pth/out.pth' cannot be written" in unwritten and "Traceback" not in unwritten

    assert good.returncode == 0, message
    own = read_checkpoint(str(tmp_path / "out.safetensors"))["model"]
    assert torch.equal(own["transformer.queries.position.weight"], state["query_embed.weight"])
    assert bad.returncode == 1
    assert "missing.pth" in complaint and "Traceback" not in complaint
    assert not (tmp_path / "out.pth").exists()
