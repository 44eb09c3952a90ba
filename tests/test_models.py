"""Networks split by depth: the paper's table, one pass for all exits, extraction, and the meaning of warm-up."""

import copy

import pytest
import torch
from torch import nn

import odn_fast
from odn_fast.engine import accuracy, confusion, exit_confusions
from odn_fast.models import DepthNetwork, FoldedNetwork, NetworkAtAllDepths, create, profile
from odn_fast.search.expansion_phases import warm_up_momentum

# network, input, classes, depth, parameters, state bytes, multiply-adds M, Table I "FLOPs" M (as counted)
TABLE_1 = [
    ("resnet18", (1, 28, 28), 10, 8, 11_172_810, 44_729_800, 455.80, 458.21),
    ("resnet18", (1, 28, 28), 10, 2, 149_322, 599_888, 116.06, 117.36),
    ("resnet18", (1, 28, 28), 26, 3, 382_170, 1_534_376, 161.02, 162.67),
    ("resnet34", (1, 28, 28), 10, 16, 21_280_970, 85_192_264, 935.92, 939.91),
    ("resnet34", (1, 28, 28), 10, 6, 1_044_938, 4_190_616, 334.42, 337.08),
    ("resnet34", (3, 32, 32), 10, 5, 750_666, 3_011_464, 362.48, 365.63),
    ("resnet34", (3, 32, 32), 10, 16, 21_282_122, 85_196_872, 1159.40, 1164.53),
    ("resnet50", (3, 32, 32), 10, 16, 23_520_842, 94_296_272, 1297.83, 1315.02),
    ("resnet50", (3, 32, 32), 10, 11, 6_311_498, 25_344_080, 890.97, 906.19),
]


def tiny(num_classes: int = 5, dtype: torch.dtype = torch.float64) -> DepthNetwork:
    """Three blocks over (N, 2, 6, 6): small enough for float64 comparisons."""
    def block(c_in, c_out, stride):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return DepthNetwork(stem, [block(4, 4, 1), block(4, 6, 2), block(6, 8, 1)], [4, 6, 8], num_classes).to(dtype)


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: f"{row[0]}-{row[3]}-{row[2]}")
def test_profile_gives_the_papers_table(row):
    name, shape, classes, depth, params, state_bytes, macs, flops = row
    counted = odn_fast.profile(create(name, shape[0], classes), shape, depth)
    assert (counted.params, counted.state_bytes) == (params, state_bytes)
    assert (round(counted.macs / 1e6, 2), round(counted.paper_flops / 1e6, 2)) == (macs, flops)


@pytest.mark.parametrize("name, depths", [("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("resnet101", 33)])
def test_number_of_depths(name, depths):
    assert create(name).max_depth == depths


def test_profile_counts_the_extracted_network_alike_and_leaves_the_model_alone():
    model = create("resnet18", 1, 10).train()
    before = copy.deepcopy(model.state_dict())
    assert profile(model, (1, 28, 28), 3) == profile(model.extract(3), (1, 28, 28))
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_profile_names_what_does_not_fit():
    with pytest.raises(ValueError, match="depth: expected 1 to 8, got 9"):
        profile(create("resnet18"), (3, 32, 32), 9)
    with pytest.raises(ValueError, match="Linear has no depths"):
        profile(nn.Linear(3, 2), (3,), 1)
    with pytest.raises(ValueError, match="input_shape"):
        profile(create("resnet18", in_channels=1), (3, 32, 32))


def test_create_refuses_unknown_names_and_counts():
    with pytest.raises(ValueError, match="expected one of resnet18, .*got 'resnet19'"):
        create("resnet19")
    with pytest.raises(ValueError, match="at least 1"):
        create("resnet18", num_classes=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_one_pass_gives_the_logits_of_every_depth(name):
    model, x = create(name, 1, 10).eval(), torch.randn(2, 1, 12, 12)
    exits = model.forward_exits(x)
    assert len(exits) == model.max_depth
    for depth, logits in enumerate(exits, 1):
        torch.testing.assert_close(logits, model(x, depth), rtol=0, atol=0)
    torch.testing.assert_close(model(x), exits[-1], rtol=0, atol=0)


@pytest.mark.parametrize("depth", [0, 9, -1])
def test_impossible_depths_raise(depth):
    with pytest.raises(ValueError, match="depth: expected 1 to 8"):
        create("resnet18")(torch.zeros(1, 3, 8, 8), depth)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_extract_is_plain_pytorch_and_shares_nothing(depth):
    model, x = create("resnet18", 1, 10).eval(), torch.randn(2, 1, 8, 8)
    network = model.extract(depth)
    torch.testing.assert_close(network(x), model(x, depth), rtol=0, atol=0)
    submodules = [module for name, module in network.named_modules() if name]
    assert submodules and all(type(module).__module__.startswith("torch.nn") for module in submodules)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in network.state_dict().values()}
    keys = list(network.state_dict())
    assert keys[0] == "stem.0.weight" and keys[-2:] == ["head.weight", "head.bias"]
    assert {key.split(".")[1] for key in keys if key.startswith("blocks.")} == {str(i) for i in range(depth)}


def test_shared_pass_gives_the_gradients_of_every_depth_on_its_own():
    """DESIGN of warm-up: the sum of all exits' losses from one pass, in float64 to 1e-12."""
    model = tiny()
    alone = copy.deepcopy(model)
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (7,))
    losses, correct = model.exit_losses(x, y)
    losses.sum().backward()
    for depth in range(1, alone.max_depth + 1):
        logits = alone(x, depth)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        torch.testing.assert_close(losses[depth - 1], loss, rtol=1e-12, atol=1e-12)
        assert correct[depth - 1] == (logits.argmax(1) == y).sum()
    for (name, shared), own in zip(model.named_parameters(), alone.parameters()):
        torch.testing.assert_close(shared.grad, own.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_shared_pass_gives_the_weights_after_one_step_too():
    model = tiny()
    alone = copy.deepcopy(model)
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (7,))
    for network in (model, alone):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        if network is model:
            network.exit_losses(x, y)[0].sum().backward()
        else:
            for depth in range(network.max_depth, 0, -1):
                nn.functional.cross_entropy(network(x, depth), y).backward()
        optimizer.step()
    for shared, own in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(shared, own, rtol=1e-12, atol=1e-12)


def test_warm_up_momentum_gives_the_running_statistics_of_every_depth_on_its_own():
    model = tiny()
    alone = copy.deepcopy(model)
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (7,))
    with warm_up_momentum(model):
        momenta = [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        model.exit_losses(x, y)
    assert momenta == pytest.approx([1 - 0.9 ** k for k in (3, 3, 2, 1)])
    assert all(layer.momentum == 0.1 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    for depth in range(alone.max_depth, 0, -1):
        alone(x, depth)
    for name, value in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)


def test_depth_network_wants_one_width_per_block():
    with pytest.raises(ValueError, match="1 blocks and 2 widths"):
        DepthNetwork(nn.Identity(), [nn.Identity()], [3, 4], 2)


def test_all_depths_are_evaluated_from_one_folded_pass():
    torch.manual_seed(0)
    model = create("resnet18", 1, 10).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    x, y = torch.randn(40, 1, 12, 12), torch.randint(0, 10, (40,))
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    together = exit_confusions(FoldedNetwork(NetworkAtAllDepths(model)), batches, 10)
    assert together.shape == (8, 10, 10)
    for depth in range(1, 9):
        assert torch.equal(together[depth - 1], confusion(FoldedNetwork(model.at_depth(depth)), batches, 10)), depth
    assert len({accuracy(counts) for counts in together}) > 1
