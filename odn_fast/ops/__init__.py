"""Fused operations. Each works without the compiled extension, on its PyTorch reference."""

from odn_fast.ops._choose import reasons, using
from odn_fast.ops.augment import augment, scale_and_shift
from odn_fast.ops.batch_norm_act import batch_norm_act
from odn_fast.ops.channel_attention import (
    TeacherStatistics,
    channel_attention,
    channel_attention_loss,
    teacher_statistics,
)
from odn_fast.ops.exit_heads import exit_heads
from odn_fast.ops.separable_conv import separable_conv_infer, separable_conv_train
from odn_fast.ops.separable_unit import separable_unit_train

__all__ = [
    "TeacherStatistics",
    "augment",
    "batch_norm_act",
    "channel_attention",
    "channel_attention_loss",
    "exit_heads",
    "reasons",
    "scale_and_shift",
    "separable_conv_infer",
    "separable_conv_train",
    "separable_unit_train",
    "teacher_statistics",
    "using",
]
