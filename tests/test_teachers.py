"""Teachers: their maps, their counts, public checkpoints, and what is refused."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from odn_fast.models import teachers
from odn_fast.models.resnet import CifarResNet, ImageNetResNet50
from odn_fast.models.teachers import block_names, load_teacher, teacher_of


def trained_looking(network):
    """Running statistics and affine parameters that are not the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("depth, params, flops", [(20, 269_722, 40.93), (56, 853_018, 126.55), (110, 1_727_962, 254.98)])
def test_counts_are_those_of_the_papers(depth, params, flops):
    """ResNet-56 and ResNet-110 as in SEArch's tables: 126.6 and 255.0 M FLOPs."""
    teacher = teacher_of(CifarResNet(depth, 10), None, (3, 32, 32), f"ResNet-{depth}")
    assert (teacher.params, round(teacher.flops / 1e6, 2)) == (params, pytest.approx(flops, abs=0.011))
    assert len(teacher.map_shapes) == (depth - 2) // 2
    assert teacher.map_shapes[0] == (16, 32, 32) and teacher.map_shapes[-1] == (64, 8, 8)


def test_resnet50_by_structure():
    teacher = teacher_of(ImageNetResNet50(), None, (3, 64, 64), "ResNet-50")
    assert teacher.params == 25_557_032 and len(teacher.map_shapes) == 16
    assert teacher.map_shapes[0] == (256, 16, 16) and teacher.map_shapes[-1] == (2048, 2, 2)


def test_maps_and_logits_are_those_of_the_network_in_eval_mode():
    network = trained_looking(CifarResNet(20, 7, in_channels=1)).double()
    x, outputs = torch.rand(3, 1, 9, 11, dtype=torch.float64), []
    hooks = [network.get_submodule(name).register_forward_hook(lambda *args: outputs.append(args[2])) for name in block_names(network)]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    teacher = teacher_of(network.float(), None, (1, 9, 11), "small").double()
    torch.testing.assert_close(teacher(x), logits, atol=1e-5, rtol=1e-5)
    for q, output in enumerate(outputs, 1):
        torch.testing.assert_close(teacher.maps(x, [q])[0], output, atol=1e-5, rtol=1e-5)
    some = teacher.maps(x, [5, 2])
    assert torch.equal(some[0], teacher.maps(x, [5])[0]) and torch.equal(some[1], teacher.maps(x, [2])[0])
    assert not some[0].requires_grad and not teacher(x).requires_grad
    assert [tuple(output.shape[1:]) for output in outputs] == list(teacher.map_shapes)


def test_nothing_beyond_the_last_map_wanted_is_computed():
    teacher = teacher_of(CifarResNet(20, 10), None, (3, 8, 8), "small")
    used = {node.target for node in teacher._part((2,)).graph.nodes if node.op == "call_module"}
    assert any(name.startswith("layer1.1") for name in used)
    assert not any(name.startswith(("layer1.2", "layer2", "layer3", "linear")) for name in used)


def test_it_stays_frozen_and_the_network_as_it_was():
    network = CifarResNet(20, 10).train()
    teacher = teacher_of(network, None, (3, 8, 8), "small").train()
    assert network.training and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_made_where_its_network_lies(device):
    given = []
    network = CifarResNet(20, 10).to(device)
    teacher = teacher_of(network, None, (3, 8, 8), "t", mean=(0.5,) * 3, std=(0.2,) * 3)
    assert {tensor.device.type for tensor in teacher.state_dict().values()} == {device}
    teacher._input = lambda x: given.append(x.device.type) or x
    assert teacher._map_shapes(block_names(network), network.conv1.weight.device) == teacher.map_shapes and given == [device]


def test_any_module_with_named_maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.BatchNorm2d(6),
                            nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(2, 3, 9, 9))
    trained_looking(network)
    teacher = teacher_of(network, ["2", "4"], (3, 9, 9), "own", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 9, 9)
    standardised = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    assert teacher.map_shapes == ((4, 9, 9), (6, 4, 4))
    torch.testing.assert_close(teacher.maps(x, [2])[0], network[:5](standardised), atol=1e-5, rtol=1e-5)  # a folded batch norm
    torch.testing.assert_close(teacher(x), network(standardised), atol=1e-5, rtol=1e-5)


def test_a_map_between_a_convolution_and_its_batch_norm():
    network = trained_looking(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
    teacher, x = teacher_of(network, ["0"], (3, 9, 9), "own"), torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(teacher.maps(x, [1])[0], network[0](x))
    torch.testing.assert_close(teacher(x), network(x))


def test_what_is_no_map_is_refused():
    network = CifarResNet(20, 10)
    with pytest.raises(ValueError, match="'layer1.7' is no submodule of CifarResNet; near it are layer1.0"):
        teacher_of(network, ["layer1.7"], (3, 8, 8), "t")
    with pytest.raises(ValueError, match="no names"):
        teacher_of(network, [], (3, 8, 8), "t")
    growing = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Upsample(scale_factor=2), nn.Flatten())
    with pytest.raises(ValueError, match="the map of 1, 6x6, is larger than the one before it, 3x3"):
        teacher_of(growing, ["0", "1"], (3, 8, 8), "t")
    with pytest.raises(ValueError, match="t: layer1.1 is computed after layer1.0; expected names in the order"):
        teacher_of(network, ["layer1.1", "layer1.0"], (3, 8, 8), "t")
    teacher = teacher_of(network, None, (3, 8, 8), "t")
    with pytest.raises(ValueError, match="there is no map 10; expected 1 to 9"):
        teacher.maps(torch.zeros(1, 3, 8, 8), [10])
    with pytest.raises(ValueError, match="depth is 18, expected one of 20, 32"):
        CifarResNet(18, 10)


def test_checkpoints_are_read_with_and_without_the_wrapper(tmp_path):
    network = trained_looking(CifarResNet(32, 10))
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}, "best_prec1": 9.0}, tmp_path / "a")
    torch.save(network.state_dict(), tmp_path / "b")
    x = torch.rand(2, 3, 16, 16)
    first, second = (load_teacher(tmp_path / name, 10, (3, 16, 16)) for name in "ab")
    assert first.name == "ResNet-32" and torch.equal(first(x), second(x))
    mean, std = (torch.tensor(values)[:, None, None] for values in (teachers.PUBLIC_MEAN, teachers.PUBLIC_STD))
    torch.testing.assert_close(first(x), network((x - mean) / std), atol=1e-4, rtol=1e-4)


def test_a_public_teacher_sees_the_images_it_was_trained_on_whatever_the_data_set_does_to_them(tmp_path):
    torch.save(trained_looking(CifarResNet(20, 10)).state_dict(), tmp_path / "file")
    x, mean, std = torch.rand(2, 3, 16, 16), (0.3, 0.5, 0.6), (0.2, 0.3, 0.1)
    given = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain, other = (load_teacher(tmp_path / "file", 10, (3, 16, 16), *how) for how in ((), ((mean, std),)))
    torch.testing.assert_close(other(given), plain(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(given), plain(x), atol=1e-2, rtol=1e-2)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/odn_fast_evil",)


def test_bad_checkpoints_are_one_clear_line(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="cannot be read .No such file"):
        load_teacher(path, 10, (3, 32, 32))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="file: is no checkpoint of tensors alone, or is damaged; give the file that torch.save wrote of a "
                                         "network's state dict$"):  # PyTorch's own words advise to run what is in it
        load_teacher(path, 10, (3, 32, 32))
    torch.save({"state_dict": _Evil()}, path)
    with pytest.raises(ValueError, match="is no checkpoint of tensors alone"):
        load_teacher(path, 10, (3, 32, 32))
    assert not Path("/tmp/odn_fast_evil").exists()
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no CIFAR ResNet"):
        load_teacher(path, 10, (3, 32, 32))
    state = CifarResNet(20, 10).state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match="has 10 classes, the data set 100"):
        load_teacher(path, 100, (3, 32, 32))
    with pytest.raises(ValueError, match="does not fit ResNet-20 on .1, 28, 28. images") as caught:
        load_teacher(path, 10, (1, 28, 28))
    assert "\n" not in str(caught.value)  # load_state_dict's has several lines
