"""The artefact of a search: a folder that rebuilds the network and holds nothing that can execute.

    model.safetensors   weights and running statistics
    network.json        the network as plain data (modules, calls), its input and its classes
    manifest.json       how it came about and what was measured
"""

import hashlib
import inspect
import json
import keyword
import math
import operator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_weights
from safetensors.torch import save
from torch import fx, nn

from .models.fold import FoldedNetwork, graph_module
from .record import write_atomically

_FORMAT = 1
_MODULES = {kind.__name__: kind for kind in (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.GELU,
    nn.Identity, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)}
_FUNCTIONS = {"add": operator.add, "mul": operator.mul, "cat": torch.cat, "flatten": torch.flatten,
              "relu": nn.functional.relu, "adaptive_avg_pool2d": nn.functional.adaptive_avg_pool2d}
_METHODS = ("flatten", "mean", "add", "mul")


class ModelError(ValueError):
    """A network that cannot be stored, or a model folder that cannot be used; the message is one line."""


@dataclass(frozen=True)
class NetworkInput:
    """What a network reads: shape (C, H, W), and x -> (x / scale - mean) / std per channel before it."""

    shape: tuple[int, int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Description:
    """What network.json says beside the graph: the input, the names of the classes, the origin of the network."""

    input: NetworkInput
    class_names: tuple[str, ...]
    model: str
    depth: int


def save_model(folder: Path, network: fx.GraphModule, description: Description, manifest: dict):
    """Write the three files; the manifest last, with the checksums of the others. Raises ModelError and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})
    structure = json.dumps({"format": _FORMAT, **asdict(description), "graph": graph_to_data(network)}, indent=1).encode()
    files = {"model.safetensors": weights, "network.json": structure}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["manifest.json"] = json.dumps({**manifest, "sha256": checksums}, indent=1).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)


def load(folder: str | Path, fold: bool = False) -> nn.Module:
    """The network in a model folder, in eval mode, on the CPU.

    Args:
        folder: `model/` of a run, or the run folder itself.
        fold: fold batch norms into convolutions: faster, and exactly what the manifest's accuracies were measured on;
            for inference only. The default is the network as it was trained, a `torch.fx.GraphModule` of `torch.nn` modules.

    Raises:
        ModelError: a file is missing, damaged, or does not fit the others.
    """
    folder = model_folder(folder)
    data = _read_json(folder / "network.json")
    weights = _read(folder / "model.safetensors")
    if (folder / "manifest.json").exists():
        _verify(folder, {"model.safetensors": weights, "network.json": _read(folder / "network.json")})
    with torch.device("meta"):
        network = graph_from_data(data.get("graph"), folder / "network.json")
    try:
        network.load_state_dict(load_weights(weights), assign=True)
        network.eval()
        return FoldedNetwork(network) if fold else network
    except Exception as error:  # whatever the files hold, one line says what is wrong
        detail = " ".join(str(error).split())
        raise ModelError(f"{folder / 'model.safetensors'}: does not hold this network's weights ({detail:.200})") from None


def describe(folder: str | Path) -> Description:
    """What network.json says of the network's input, classes and origin. Raises ModelError."""
    path = model_folder(folder) / "network.json"
    data = _read_json(path)
    try:
        given = data["input"]
        network_input = NetworkInput(tuple(int(n) for n in given["shape"]), float(given["scale"]),
                                     tuple(map(float, given["mean"])), tuple(map(float, given["std"])))
        description = Description(network_input, tuple(map(str, data["class_names"])), str(data["model"]), int(data["depth"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{path}: input, class_names, model or depth is missing or wrong ({error!r})") from None
    channels = len(network_input.mean)
    numbers = (network_input.scale, *network_input.mean, *network_input.std)
    if not all(map(math.isfinite, numbers)) or network_input.scale <= 0 or min(network_input.std, default=0) <= 0:
        raise ModelError(f"{path}: input: expected finite numbers, scale > 0 and std > 0")
    if len(network_input.shape) != 3 or channels != len(network_input.std) or channels != network_input.shape[0]:
        raise ModelError(f"{path}: input: expected a shape (C, H, W) with one mean and std per channel")
    return description


def model_folder(folder: str | Path) -> Path:
    """`folder` itself, or `model/` in it where it is a run folder. Raises ModelError if neither holds a network."""
    folder = Path(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "network.json").is_file():
            return candidate
    raise ModelError(f"model {folder}: no network.json in it; give the folder `model` of a finished run")


def graph_to_data(network: fx.GraphModule) -> dict:
    """The modules and calls of a traced network as plain data. Raises ModelError for one that is not known here."""
    modules = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            modules[node.target] = _module_to_data(node.target, network.get_submodule(node.target))
    return {"modules": modules, "nodes": [_node_to_data(node) for node in network.graph.nodes]}


def graph_from_data(data: dict, path: Path) -> fx.GraphModule:
    """The inverse of `graph_to_data`. Only known modules and functions are called. Raises ModelError naming `path`."""
    try:
        modules = {name: _module_from_data(entry) for name, entry in data["modules"].items()}
        graph, made = fx.Graph(), {}
        for entry in data["nodes"]:
            made[entry["name"]] = _node_from_data(graph, entry, made, modules)
        graph.lint()
        return graph_module(modules, graph)
    except Exception as error:  # whatever the file holds, one line says what is wrong
        raise ModelError(f"{path}: does not describe a network this version can build ({error!r:.200})") from None


def _module_to_data(name: str, module: nn.Module) -> dict:
    kind = type(module).__name__
    if _MODULES.get(kind) is not type(module):
        raise ModelError(f"module {name}: {kind} cannot be stored; the network may be made of {', '.join(_MODULES)}")
    arguments = {}
    for parameter in _parameters(type(module)):
        if hasattr(module, parameter):
            value = getattr(module, parameter)
            arguments[parameter] = value is not None if parameter == "bias" else value
    return {"type": kind, "arguments": arguments}


def _module_from_data(entry: dict) -> nn.Module:
    kind = _MODULES[entry["type"]]
    if unknown := set(entry["arguments"]) - set(_parameters(kind)):
        raise ValueError(f"unknown arguments {unknown}")
    return kind(**entry["arguments"])


def _parameters(kind: type[nn.Module]) -> list[str]:
    """What a module is made from; where its tensors lie is not part of a structure."""
    return [name for name in inspect.signature(kind).parameters if name not in ("device", "dtype")]


def _node_to_data(node: fx.Node) -> dict:
    target = node.target
    if node.op == "call_function":
        target = next((name for name, function in _FUNCTIONS.items() if function is node.target), None)
    if target is None or node.op == "get_attr" or (node.op == "call_method" and target not in _METHODS):
        raise ModelError(f"call {node.name}: {node.target} cannot be stored; "
                         f"calls may be modules, {', '.join(_FUNCTIONS)}")
    refer = {"args": list(node.args), "kwargs": dict(node.kwargs)}
    return {"name": node.name, "op": node.op, "target": target,
            **fx.node.map_arg(refer, lambda argument: {"node": argument.name})}


def _node_from_data(graph: fx.Graph, entry: dict, made: dict[str, fx.Node], modules: dict[str, nn.Module]) -> fx.Node:
    op, target = entry["op"], entry["target"]
    if op == "call_function":
        target = _FUNCTIONS[target]
    elif op == "call_module":
        if target not in modules:
            raise ValueError(f"unknown module {target!r}")
        for part in target.split("."):
            _identifier("_" + part if part.isdigit() else part)
    elif op == "call_method":
        if target not in _METHODS:
            raise ValueError(f"unknown method {target!r}")
    elif op in ("placeholder", "output"):
        _identifier(target)
    else:
        raise ValueError(f"unknown call {op!r}")

    def argument(value):
        if isinstance(value, dict):
            return made[value["node"]]
        if isinstance(value, list):
            return [argument(item) for item in value]
        if isinstance(value, (int, float)) and not abs(value) <= 2 ** 31:
            raise ValueError(f"number {value}")
        return value

    arguments = tuple(argument(value) for value in entry["args"])
    if op in ("call_function", "call_method") and not _has_node(arguments[0]):
        raise ValueError(f"{entry['name']} is not computed from the input")  # it would run while the network is read
    keywords = {_identifier(key): argument(value) for key, value in entry["kwargs"].items()}
    return graph.create_node(op, target, arguments, keywords, name=_identifier(entry["name"]))


def _has_node(argument: object) -> bool:
    return isinstance(argument, fx.Node) or isinstance(argument, list) and all(map(_has_node, argument)) and bool(argument)


def _identifier(name: object) -> str:
    """`name`, if it may stand in generated code: torch.fx writes Python from names."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise ValueError(f"name {name!r}")
    return name


def _verify(folder: Path, files: dict[str, bytes]):
    """Compare files with the checksums in the manifest."""
    expected = _read_json(folder / "manifest.json", with_format=False).get("sha256")
    for name, content in files.items():
        if not isinstance(expected, dict) or expected.get(name) != hashlib.sha256(content).hexdigest():
            raise ModelError(f"{folder / name}: is not the file that manifest.json was written for (its checksum differs)")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(f"{path}: is missing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None


def _read_json(path: Path, with_format: bool = True) -> dict:
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({error})") from None
    if not with_format and isinstance(data, dict):
        return data
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ModelError(f"{path}: expected format {_FORMAT}; it was written by another version or is damaged")
    return data
