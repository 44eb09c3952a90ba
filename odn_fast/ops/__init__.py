"""Fused operations. Each works without the compiled extension, on its PyTorch reference."""

from odn_fast.ops.exit_heads import exit_heads

__all__ = ["exit_heads"]
