"""Fused operations. Each works without the compiled extension, on its PyTorch reference."""

from odn_fast.ops.channel_attention import (
    TeacherStatistics,
    channel_attention,
    channel_attention_loss,
    teacher_statistics,
)
from odn_fast.ops.exit_heads import exit_heads

__all__ = ["TeacherStatistics", "channel_attention", "channel_attention_loss", "exit_heads", "teacher_statistics"]
