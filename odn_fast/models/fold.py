"""The inference form of a network: batch norms folded into the convolutions before them, fp32, channels_last."""

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn


class FoldedNetwork(nn.Module):
    """What a trained network computes at inference, kept beside the network under training.

    `refresh` copies the current weights over, so that one folded network serves every evaluation of a training.

    Args:
        network: a module that `torch.fx` can trace; every batch norm that follows a convolution is folded.
        tracer: what traces it, where `fx.Tracer` alone does not do. Whatever it leaves in a node's `meta` stays with the
            node, or goes from a folded batch norm to its convolution.
    """

    def __init__(self, network: nn.Module, tracer: fx.Tracer | None = None):
        super().__init__()
        self._source = [network]  # in a list: the network under training is no part of this one
        self.graph, self._folded, self._copied = _folded_graph(fx.GraphModule(network, (tracer or fx.Tracer()).trace(network)))
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> "FoldedNetwork":
        """Take over the source network's present weights and running statistics."""
        source = self._source[0]
        for conv_name, norm_name in self._folded.items():
            conv, norm = source.get_submodule(conv_name), source.get_submodule(norm_name)
            scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
            bias = 0.0 if conv.bias is None else conv.bias.double()
            target = self.graph.get_submodule(conv_name)
            target.weight.copy_(conv.weight.double() * scale[:, None, None, None])
            target.bias.copy_(norm.bias.double() + (bias - norm.running_mean.double()) * scale)
        for name in self._copied:
            self.graph.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)


def _folded_graph(traced: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str], list[str]]:
    """A copy with folded convolutions, {convolution: its batch norm}, and the other modules with weights."""
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    folded: dict[str, str] = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not _foldable_norm(modules[node.target]) or calls[node.target] > 1:
            continue
        conv = node.args[0]
        if (conv.op == "call_module" and isinstance(modules[conv.target], nn.Conv2d)
                and len(conv.users) == 1 and calls[conv.target] == 1 and "map" not in conv.meta):  # what is read stays as it is
            folded[conv.target] = node.target
            node.replace_all_uses_with(conv)
            conv.meta |= node.meta
            traced.graph.erase_node(node)
    used = {name: _with_bias(modules[name]) if name in folded else copy.deepcopy(modules[name])
            for name in calls if name not in folded.values()}
    copied = [name for name, module in used.items() if name not in folded and module.state_dict()]
    return graph_module(used, traced.graph), folded, copied


def _foldable_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats


def _with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """An empty convolution of the same shape; nothing is drawn from the global random generator."""
    return nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, bias=True, padding_mode=conv.padding_mode, device=conv.weight.device)


def graph_module(modules: dict[str, nn.Module], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that runs `graph` over `modules`, in their order; fx itself would sort them by name."""
    module = fx.GraphModule({}, fx.Graph())
    for name, child in modules.items():
        module.add_submodule(name, child)
    module.graph = graph
    return module
