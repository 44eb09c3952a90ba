"""Batch norm, residual and ReLU of dense networks by the fused op, against the same modules run by PyTorch."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import ON_CPU, use_implementation
from odn_fast import _extension
from odn_fast.models import BasicBlock, Bottleneck, FoldedNetwork, create, resnet
from odn_fast.models.resnet import CifarResNet
from odn_fast.nn import ResidualSeparableUnit, deferred_statistics, norm_act
from odn_fast.reference import batch_norm_act as reference

needs_kernels = pytest.mark.skipif(not _extension.available, reason="the extension is not built, so plain modules run everywhere")


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with use_implementation(request.param, reference):
        yield request.param


def is_fused(y):
    return type(y.grad_fn).__name__.startswith("_BatchNormAct")


def plain(norm, x, relu, residual):
    y = norm(x) if residual is None else norm(x) + residual()
    return y if relu is None else relu(y)


def inputs(dtype=torch.float64):
    """x and what is added, (4, 6, 5, 3), channels_last."""
    return [torch.randn(4, 6, 5, 3, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]


def check_equal(results, expected, tolerance=1e-12):
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


def run(function, norm, relu, with_residual, steps=2):
    """y, gradients of inputs and parameters, and buffers, of the last of some steps."""
    torch.manual_seed(1)
    for _ in range(steps):
        x, added = inputs()
        norm.zero_grad()
        y = function(norm, x, relu, (lambda: added) if with_residual else None)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
    gradients = [x.grad, added.grad, *(parameter.grad for parameter in norm.parameters())]
    return y, [y.detach(), gradients, dict(norm.named_buffers())]


@needs_kernels
@pytest.mark.parametrize("relu", [None, F.relu, nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_it_is_the_modules(implementation, relu, with_residual, momentum):
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=momentum).double()
    nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
    twin = copy.deepcopy(norm)
    y, results = run(norm_act, norm, relu, with_residual)
    assert is_fused(y)
    check_equal(results, run(plain, twin, relu, with_residual)[1])


def evaluated():
    return nn.BatchNorm2d(6).eval(), nn.ReLU()


def without_parameters():
    return nn.BatchNorm2d(6, affine=False), nn.ReLU()


def of_a_subclass():
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(6)).eval(), nn.ReLU()


def with_another_activation():
    return nn.BatchNorm2d(6), nn.SiLU()


@pytest.mark.parametrize("change", [evaluated, without_parameters, of_a_subclass, with_another_activation])
def test_what_the_op_does_not_do_is_left_to_the_modules(change):
    norm, relu = change()
    norm.double()
    twin = copy.deepcopy(norm)
    y, results = run(norm_act, norm, relu, with_residual=True)
    assert not is_fused(y)
    check_equal(results, run(plain, twin, relu, with_residual=True)[1], 0)


def test_hooks_run():
    for hooked in ("norm", "relu"):
        modules, calls = {"norm": nn.BatchNorm2d(6).double(), "relu": nn.ReLU()}, []
        handle = modules[hooked].register_forward_hook(lambda module, given, result: calls.append(result.shape))
        norm_act(modules["norm"], inputs()[0], modules["relu"])
        assert calls == [(4, 6, 5, 3)]
        handle.remove()
        assert is_fused(norm_act(modules["norm"], inputs()[0], modules["relu"])) == _extension.available
        assert len(calls) == 1


def test_running_statistics_may_be_missing_or_left_alone():
    for norm in (nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(6)):
        norm.double().track_running_stats = False
        twin = copy.deepcopy(norm)
        check_equal(run(norm_act, norm, F.relu, True)[1], run(plain, twin, F.relu, True)[1])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_reduced_precision_keeps_its_dtypes(precision):
    """bfloat16 by the op; float16, which the op does not know, by the modules."""
    model, x = create("resnet18", 1, 10).at_depth(3), torch.randn(8, 1, 8, 8)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    with torch.autocast("cpu", dtype=precision):
        model(x).sum().backward()
    assert seen == [precision] * 3
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())


# ---- networks


def trained(network, steps=3, context=nullcontext, dtype=torch.float64):
    """Gradients of the last of some steps, and the state after them."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    channels = next(network.parameters()).shape[1]
    for _ in range(steps):
        x, y = torch.randn(6, channels, 8, 8, dtype=dtype), torch.randint(0, 5, (6,))
        optimizer.zero_grad()
        with context():
            F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in network.named_parameters()}, network.state_dict()


def small(block):
    """Blocks with and without a convolution in their shortcut; 64 and 128 channels."""
    return resnet(block, [1, 2], 2, 5).double()


NETWORKS = {
    "basic": lambda: small(BasicBlock).at_depth(),
    "bottleneck": lambda: small(Bottleneck).at_depth(),
    "cifar": lambda: CifarResNet(20, 5).double(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_that_of_plain_modules(name):
    network = NETWORKS[name]().train()
    twin = fx.symbolic_trace(copy.deepcopy(network))  # of PyTorch's modules alone
    ours, theirs = trained(network), trained(twin)
    check_equal(ours, theirs, 1e-10)
    assert (ours[1]["bn1.running_var" if name == "cifar" else "stem.1.running_var"] != 1).all()


@needs_kernels
@pytest.mark.parametrize("name, norms", [("basic", 8), ("bottleneck", 12), ("cifar", 19)])
def test_every_batch_norm_of_a_training_network_is_fused(name, norms):
    network, ops = NETWORKS[name](), Ops()
    with ops:
        network(torch.randn(2, next(network.parameters()).shape[1], 8, 8, dtype=torch.float64))
    assert sum("batch_norm_act_train" in op for op in ops.called) == norms
    assert not any(op.startswith(("aten.native_batch_norm", "aten.relu", "aten._native_batch_norm")) for op in ops.called)


class Ops(TorchDispatchMode):
    """The names of all ops called inside."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def targets(graph):
    return [node.target if node.op == "call_module" else node.name for node in graph.nodes]


BASIC = ["x", "stem.0", "stem.1", "stem.2",
         *(f"blocks.0.{part}" for part in ("conv1", "bn1", "relu", "conv2", "bn2", "shortcut")), "add", "blocks.0.relu",
         *(f"blocks.1.{part}" for part in ("conv1", "bn1", "relu", "conv2", "bn2", "shortcut.0", "shortcut.1")), "add_1",
         "blocks.1.relu", "pool", "flatten", "head", "output"]  # fmt: skip
BOTTLENECK = [*BASIC[:4], *(f"blocks.0.{part}" for part in ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3",
                                                            "shortcut.0", "shortcut.1")),
              "add", "blocks.0.relu", *BASIC[-4:]]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block, depth, expected", [(BasicBlock, 2, BASIC), (Bottleneck, 1, BOTTLENECK)])
def test_extraction_and_folding_see_plain_modules(block, depth, expected, training):
    model = small(block).float().train(training)
    network = model.extract(depth)
    assert targets(network.graph) == expected
    assert list(network.state_dict()) == list(model.at_depth(depth).state_dict())
    trained(network.train(), dtype=torch.float32)  # so that running statistics are some
    model.at_depth(depth).load_state_dict(network.state_dict())
    folded = FoldedNetwork(model.at_depth(depth))
    assert targets(folded.graph.graph) == [target for target in expected if not is_norm(target)]
    x = torch.randn(3, 2, 8, 8)
    check_equal(folded(x), network.eval()(x), 1e-5)


def is_norm(target):
    return target.endswith(("bn1", "bn2", "bn3", "stem.1", "shortcut.1"))


def test_it_compiles_in_one_graph():
    network = small(BasicBlock).at_depth(2)
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    network.compile(fullgraph=True, backend="aot_eager")
    check_equal(trained(network, context=deferred_statistics), trained(twin), 1e-10)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    check_equal(network.eval()(x), twin.eval()(x))


def test_shared_pass_with_warm_up_momentum_is_training_every_depth_on_its_own():
    from odn_fast.search.expansion_phases import warm_up_momentum
    model = small(BasicBlock)
    alone = copy.deepcopy(model)
    x, y = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.randint(0, 5, (7,))
    with warm_up_momentum(model), deferred_statistics():
        model.exit_losses(x, y)[0].sum().backward()
    for depth in range(alone.max_depth, 0, -1):
        F.cross_entropy(alone(x, depth), y).backward()
    check_equal([parameter.grad for parameter in model.parameters()], [parameter.grad for parameter in alone.parameters()])
    for name, value in model.state_dict().items():
        if "running" in name:
            check_equal(value, alone.state_dict()[name])


# ---- statistics brought up to date together


class Mixed(nn.Module):
    """Dense and separable layers, momenta of several kinds, one batch norm that runs twice."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(2, 8, 2)
        self.unit = ResidualSeparableUnit(8, 4, 2)
        self.twice = nn.BatchNorm2d(4, momentum=None)
        self.classifier = nn.Linear(4, 5)
        self.block.bn1.momentum, self.block.bn2.momentum, self.unit.first.bn.momentum = 0.4686, None, None

    def forward(self, x):
        x = self.unit(self.block(x))
        x = norm_act(self.twice, norm_act(self.twice, x, F.relu, lambda: x))
        return self.classifier(x.mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deferred_statistics_are_the_same_to_the_bit(dtype):
    torch.manual_seed(4)
    networks = [Mixed().to(dtype) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    at_once, deferred = (trained(network, context=context, dtype=dtype)
                         for network, context in zip(networks, (nullcontext, deferred_statistics)))
    check_equal(deferred, at_once, 0)
    assert deferred[1]["twice.num_batches_tracked"] == 6 and deferred[1]["block.bn2.num_batches_tracked"] == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_deferred_statistics_are_those_of_plain_modules(name):
    network = NETWORKS[name]().train()
    twin = fx.symbolic_trace(copy.deepcopy(network))
    check_equal(trained(network, context=deferred_statistics), trained(twin), 1e-10)


def test_they_wait_for_the_end_of_the_outermost_block_of_their_thread():
    norm, other = nn.BatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    thread = threading.Thread(target=norm_act, args=(other, inputs()[0]))
    with deferred_statistics():
        with deferred_statistics():
            norm_act(norm, inputs()[0])
        thread.start(), thread.join()
        assert norm.num_batches_tracked == (0 if _extension.available else 1) and other.num_batches_tracked == 1
    assert norm.num_batches_tracked == 1
    norm_act(norm, inputs()[0])
    assert norm.num_batches_tracked == 2


@needs_kernels
def test_a_block_that_raises_leaves_them_as_they_were():
    norm = nn.BatchNorm2d(6).double()
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(KeyboardInterrupt), deferred_statistics():
        norm_act(norm, inputs()[0])
        raise KeyboardInterrupt
    check_equal(dict(norm.state_dict()), dict(before), 0)
    with deferred_statistics():
        pass
    check_equal(dict(norm.state_dict()), dict(before), 0)


@needs_kernels
def test_deferring_takes_three_calls_for_all_layers():
    network, ops = small(BasicBlock).at_depth(), Ops()
    with ops, deferred_statistics():
        network(torch.randn(4, 2, 8, 8, dtype=torch.float64))
        before = len(ops.called)
    assert ops.called[before:] == ["aten._foreach_add_.Scalar", "aten._foreach_mul.ScalarList", "aten._foreach_lerp_.ScalarList"]


@pytest.mark.gpu
def test_on_a_gpu_statistics_are_the_same_at_once_deferred_and_captured():
    with torch.device("cuda"):
        x = torch.randn(8, 6, 5, 3).contiguous(memory_format=torch.channels_last)
        layers = nn.ModuleList([nn.BatchNorm2d(6, momentum=momentum) for momentum in (0.1, 0.5)])

    def step(function, first, second):
        y = function(first, x, F.relu, None)
        function(first, function(second, y, F.relu, lambda: x), None, lambda: y)

    def deferred_step(*norms):
        with deferred_statistics():
            step(norm_act, *norms)

    unfused, at_once, deferred, captured, first = (copy.deepcopy(layers) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        deferred_step(*first)  # kernels are compiled before a capture
        with torch.cuda.graph(graph):
            deferred_step(*captured)
        for _ in range(3):
            step(plain, *unfused)
            step(norm_act, *at_once)
            deferred_step(*deferred)
            graph.replay()
    check_equal(at_once.state_dict(), unfused.state_dict(), 1e-5)
    check_equal(deferred.state_dict(), at_once.state_dict(), 0)
    check_equal(captured.state_dict(), at_once.state_dict(), 0)
    assert captured[0].num_batches_tracked == 6
