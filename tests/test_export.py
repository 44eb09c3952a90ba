"""The artefact: there and back, and nothing in it that can execute or mislead."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from test_models import tiny
from torch import nn

from odn_fast import export, load
from odn_fast.export import Description, ModelError, NetworkInput, describe, save_model
from odn_fast.models import DepthNetwork, create

DESCRIPTION = Description(NetworkInput((1, 8, 8), 16.0, (0.0,), (1.0,)), tuple("0123456789"), "resnet18", 2)


@pytest.fixture
def saved(tmp_path):
    model = create("resnet18", 1, 10)
    model.train()(torch.randn(4, 1, 8, 8), 2)
    network = model.extract(2).eval()
    save_model(tmp_path / "model", network, DESCRIPTION, {"seed": 0})
    return tmp_path / "model", network


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_any_depth_comes_back_bit_for_bit(tmp_path, name):
    model = create(name, 1, 10).eval()
    x = torch.randn(2, 1, 8, 8)
    for depth in (1, 4, model.max_depth):
        network = model.extract(depth)
        save_model(tmp_path / str(depth), network, DESCRIPTION, {})
        back = load(tmp_path / str(depth))
        assert torch.equal(back(x), network(x)) and list(back.state_dict()) == list(network.state_dict())
        assert all(type(module).__module__.startswith("torch.nn") for path, module in back.named_modules() if path)


def test_folded_agrees_and_run_folders_work_too(saved):
    folder, network = saved
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(load(folder.parent, fold=True)(x), network(x))
    assert not load(folder).training


def test_description_and_checksums(saved):
    folder, _ = saved
    assert describe(folder) == DESCRIPTION
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 0 and set(manifest["sha256"]) == {"model.safetensors", "network.json"}


def test_a_trained_network_can_be_trained_on(saved):
    network = load(saved[0]).train()
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def damaged(folder: Path, change) -> Path:
    """The folder with a changed network.json, and a manifest that vouches for it."""
    path = folder / "network.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["network.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("change", [
    lambda data: data["graph"]["nodes"].pop(2),
    lambda data: data["graph"]["nodes"][1].update(op="call_function", target="system"),
    lambda data: data["graph"]["nodes"][1].update(op="call_method", target="__class__"),
    lambda data: data["graph"]["nodes"][1].update(op="get_attr"),
    lambda data: data["graph"]["nodes"][0].update(target="x=__import__('os').mkdir('executed')"),
    lambda data: data["graph"]["nodes"][0].update(name="x): pass\nimport os\nos.mkdir('executed')\ndef f("),
    lambda data: data["graph"]["nodes"][1].update(kwargs={"a=__import__('os').mkdir('executed'), b": 1}),
    lambda data: data["graph"]["nodes"][1].update(target="stem.9"),
    lambda data: data["graph"]["modules"]["stem.0"].update(type="Sequential"),
    lambda data: data["graph"]["modules"]["stem.0"]["arguments"].update(in_channels=3),
    lambda data: data["graph"]["modules"]["stem.0"]["arguments"].update(out_channels=2 ** 40),
    lambda data: data["graph"]["modules"]["stem.0"]["arguments"].update(device="cpu"),
    lambda data: data["graph"]["nodes"].insert(1, {**data["graph"]["nodes"][0], "name": "other"}),
    lambda data: data["graph"]["nodes"].insert(1, {"name": "huge", "op": "call_function", "target": "mul", "args": [[0], 50000000],
                                                   "kwargs": {}}),
    lambda data: data["graph"]["nodes"][1].update(args=[{"node": "x"}, 10 ** 30]),
    lambda data: data["graph"].pop("nodes"),
    lambda data: data.pop("graph"),
    lambda data: data.update(format=2)])
def test_a_changed_structure_is_refused(saved, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = damaged(saved[0], change)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_a_changed_weight_is_refused(saved):
    path = saved[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="its checksum differs"):
        load(saved[0])


@pytest.mark.parametrize("change, words", [
    (lambda data: data["input"].update(scale=float("nan")), "finite"),
    (lambda data: data["input"].update(shape=[1, 8, float("inf")]), "input"),
    (lambda data: data.pop("input"), "input"), (lambda data: data["input"].update(shape=[1, 8]), "shape"),
    (lambda data: data["input"].update(mean=[0.0, 1.0]), "mean"), (lambda data: data.update(class_names=3), "class_names")])
def test_a_changed_description_is_refused(saved, change, words):
    with pytest.raises(ModelError, match=words):
        describe(damaged(saved[0], change))


@pytest.mark.parametrize("name", ["model.safetensors", "network.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, None])
def test_damaged_and_missing_files(saved, name, content):
    path = saved[0] / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        load(saved[0])
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(saved, tmp_path):
    other = tmp_path / "other"
    save_model(other, create("resnet18", 1, 10).extract(1), DESCRIPTION, {})
    (saved[0] / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    (saved[0] / "manifest.json").unlink()
    with pytest.raises(ModelError, match="does not hold this network's weights"):
        load(saved[0])


def test_no_model_folder(tmp_path):
    with pytest.raises(ModelError, match="no network.json"):
        load(tmp_path)


def test_a_network_from_python_is_stored_or_refused_by_name(tmp_path):
    model = tiny(dtype=torch.float32)
    save_model(tmp_path / "model", model.extract(2), DESCRIPTION, {})
    x = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(load(tmp_path / "model")(x), copy.deepcopy(model).eval()(x, 2), rtol=0, atol=0)
    odd = DepthNetwork(nn.Identity(), [nn.PReLU()], [2], 3)
    with pytest.raises(ModelError, match="module blocks.0: PReLU cannot be stored"):
        export.graph_to_data(odd.extract(1))
