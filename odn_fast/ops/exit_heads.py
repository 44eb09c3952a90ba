"""Losses and top-1 counts of all exit heads of one shared backbone pass.

Backward gives each feature map an expanded gradient (one value per image and channel, stride 0 over
positions), which costs nothing until autograd adds it to the gradient of the next block. Autograd adds in
place only into a dense gradient that arrived first, and it runs nodes latest first. So call `exit_heads` on
one depth right after its block and before the next block: the addition then reads and writes the gradient
once, and the feature is pooled while it is still in cache. One call over all depths after the backbone is
as correct; it pays one more pass over memory per feature map and saves a call per depth. bench_exit_heads
measures both on the CPU: the first is ahead in float32, the second in bfloat16, where PyTorch's addition is
bound by arithmetic.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from odn_fast.ops._choose import register_cuda, triton
from odn_fast.ops._library import contiguous_like, define, library, refuse_second_derivative
from odn_fast.reference import exit_heads as reference


def exit_heads(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor], target: Tensor
) -> tuple[Tensor, Tensor]:
    """Global average pool, linear layer, mean cross-entropy and top-1 count for D depths.

    features: D feature maps (N, C_d, H_d, W_d), any strides, all float32, bfloat16 or float64.
    weights: D matrices (K, C_d); biases: D vectors (K,); each float32, bfloat16 or float64.
    target: (N,) int64, class indices in [0, K).

    Returns losses (D,), differentiable once, in float32 (float64 for float64 features), also under autocast;
    and correct (D,) int64, the number of images whose largest logit (the first of equals) is the target's.
    A row of logits holding NaN counts as wrong. An empty batch has loss NaN and 0 correct.

    Features of one call share their dtype. For `torch.autograd`; `torch.func` transforms do not see through it.

    Raises ValueError on shapes, dtypes, devices or counts that do not fit, and on the CPU on targets outside [0, K).
    """
    reference.check_counts(features, weights, biases)
    if not features[0].is_cuda:  # where the op checks
        reference.check(features, weights, biases, target)
    losses, correct, _, _ = _exit_heads(features, weights, biases, target)
    return losses, correct


def _fake(features, weights, biases, target):
    reference.check(features, weights, biases, target)
    depths, batch, classes = len(features), features[0].shape[0], weights[0].shape[0]
    losses = features[0].new_empty(depths, dtype=reference.compute_dtype(features[0]))
    return (
        losses,
        target.new_empty(depths),
        losses.new_empty(batch, sum(feature.shape[1] for feature in features)),
        losses.new_empty(depths, batch, classes),
    )


def _fake_backward(grad_losses, pooled, logit_gradients, weights, positions, feature_dtype):
    depths, batch, classes = logit_gradients.shape
    return (
        [pooled.new_empty(batch, weight.shape[1], 1, 1, dtype=feature_dtype) for weight in weights],
        [contiguous_like(weight) for weight in weights],
        pooled.new_empty(depths, classes),
    )


_exit_heads = define(
    "exit_heads(Tensor[] features, Tensor[] weights, Tensor[] biases, Tensor target)"
    " -> (Tensor losses, Tensor correct, Tensor pooled, Tensor logit_gradients)",
    reference.exit_heads,
    _fake,
)
_exit_heads_backward = define(
    "exit_heads_backward(Tensor grad_losses, Tensor pooled, Tensor logit_gradients, Tensor[] weights,"
    " SymInt[] positions, ScalarType feature_dtype)"
    " -> (Tensor[] pooled_gradients, Tensor[] weight_gradients, Tensor bias_gradients)",
    reference.exit_heads_backward,
    _fake_backward,
)


class _ExitHeads(torch.autograd.Function):
    """Takes the three lists flattened, because a Function sees only tensors that are arguments of their own."""

    @staticmethod
    def forward(ctx, depths, target, *tensors):
        features, weights, biases = tensors[:depths], tensors[depths : 2 * depths], tensors[2 * depths :]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _exit_heads(features, weights, biases, target)
        losses, correct, pooled, logit_gradients = outputs
        ctx.mark_non_differentiable(correct, pooled, logit_gradients)
        ctx.save_for_backward(pooled, logit_gradients, *weights)
        ctx.feature_shapes = [feature.shape for feature in features]
        ctx.feature_dtype = features[0].dtype
        ctx.bias_dtypes = [bias.dtype for bias in biases]
        return outputs

    @staticmethod
    def backward(ctx, grad_losses, *_):
        refuse_second_derivative("exit_heads")
        pooled, logit_gradients, *weights = ctx.saved_tensors
        positions = [height * width for _, _, height, width in ctx.feature_shapes]
        pooled_gradients, weight_gradients, bias_gradients = _exit_heads_backward(
            grad_losses, pooled, logit_gradients, weights, positions, ctx.feature_dtype
        )
        return (
            None,
            None,
            *(gradient.expand(shape) for gradient, shape in zip(pooled_gradients, ctx.feature_shapes, strict=True)),
            *weight_gradients,
            *(gradient.to(dtype) for gradient, dtype in zip(bias_gradients, ctx.bias_dtypes, strict=True)),
        )


def _autograd(features, weights, biases, target):
    return _ExitHeads.apply(len(features), target, *features, *weights, *biases)


library.impl("exit_heads", _autograd, "Autograd")


@register_flop_formula(torch.ops.odn_fast.exit_heads)
def _flops(feature_shapes, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """As the linear layers alone, 2 N C K per depth: PyTorch counts no pooling and no loss."""
    batch = feature_shapes[0][0]
    return sum(2 * batch * classes * channels for classes, channels in weight_shapes)


@register_flop_formula(torch.ops.odn_fast.exit_heads_backward)
def _flops_backward(grad_shape, pooled_shape, logit_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """Two products per depth: one for the pooled gradient, one for the weight gradient."""
    batch = pooled_shape[0]
    return sum(4 * batch * classes * channels for classes, channels in weight_shapes)


register_cuda("exit_heads", [triton("exit_heads", "exit_heads")], reference.check)
register_cuda("exit_heads_backward", [triton("exit_heads", "exit_heads_backward")], reference.check_backward)
