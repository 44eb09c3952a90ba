"""A network split by depth: stem, blocks, one exit head per block (Optimally Deep Networks, section III-A)."""

import copy

import torch
from torch import Tensor, fx, nn

from ..ops import exit_heads


class DepthNetwork(nn.Module):
    """A backbone with one exit head per block, to be trained, evaluated and extracted at any depth.

    Args:
        stem: maps the input (N, C, H, W) to the first block's input.
        blocks: the units of depth; block d maps (N, C_{d-1}, ., .) to (N, widths[d-1], ., .).
        widths: channels of every block's output.
        num_classes: number of logits K of every exit head.

    Depth d is the network made of the stem, blocks 1..d and exit head d. Any sequential backbone fits; the blocks
    must be traceable by `torch.fx` for `extract`.

    Raises:
        ValueError: no block, or not one width per block.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], widths: list[int], num_classes: int):
        super().__init__()
        if not blocks or len(blocks) != len(widths):
            raise ValueError(f"blocks and widths: expected one width per block and at least one block, "
                             f"got {len(blocks)} blocks and {len(widths)} widths")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)
        self.num_classes = num_classes

    @property
    def max_depth(self) -> int:
        return len(self.blocks)

    def at_depth(self, depth: int | None = None) -> "NetworkAtDepth":
        """The network of this depth (default: the full one), sharing parameters and buffers with this one."""
        depth = self._checked(depth)
        return NetworkAtDepth(self.stem, list(self.blocks)[:depth], self.heads[depth - 1])

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Logits (N, K) of x (N, C, H, W) at `depth` (default: full). Raises ValueError for an impossible depth."""
        depth = self._checked(depth)
        x = self.stem(x)
        for block in self.blocks[:depth]:
            x = block(x)
        return self.heads[depth - 1](pooled(x))

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Logits (N, K) of every depth 1..max_depth from one pass through the backbone."""
        x, logits = self.stem(x), []
        for block, head in zip(self.blocks, self.heads):
            x = block(x)
            logits.append(head(pooled(x)))
        return logits

    def exit_losses(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and number of correct images at every depth from one pass through the backbone.

        Returns (losses (D,), correct (D,)). Each exit is taken before the next block runs: its feature map is still in
        cache, and in the backward pass autograd adds the exit's gradient in place to the one from the next block.
        """
        x, losses, correct = self.stem(x), [], []
        for block, head in zip(self.blocks, self.heads):
            x = block(x)
            loss, hits = exit_heads([x], [head.weight], [head.bias], target)
            losses.append(loss)
            correct.append(hits)
        return torch.cat(losses), torch.cat(correct)

    def extract(self, depth: int | None = None) -> fx.GraphModule:
        """A copy of the network of this depth as plain PyTorch.

        The result is a `torch.fx.GraphModule` made of `torch.nn` modules alone, with the state-dict keys `stem.*`,
        `blocks.<i>.*`, `head.*`; it shares nothing with this network.
        """
        network = fx.symbolic_trace(copy.deepcopy(self.at_depth(depth)))
        return network.train(self.training)

    def _checked(self, depth: int | None) -> int:
        if depth is None:
            return self.max_depth
        if not 1 <= depth <= self.max_depth:
            raise ValueError(f"depth: expected 1 to {self.max_depth}, got {depth}")
        return depth


class NetworkAtDepth(nn.Module):
    """Stem, blocks 1..d and exit head d: what a search trains at depth d."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Linear):
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(self.pool(x), 1))


class NetworkAtAllDepths(nn.Module):
    """The same network, whose output is the logits (N, K) of every depth; to be folded or traced."""

    def __init__(self, model: DepthNetwork):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_exits(x)


def pooled(x: Tensor) -> Tensor:
    """Global average pool: (N, C, H, W) -> (N, C)."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
