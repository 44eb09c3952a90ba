"""Exit heads in plain PyTorch: global average pool, linear layer, cross-entropy and top-1 count per depth.

`check` is the one place where arguments are validated; the public function, the fake and this
reference all call it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from odn_fast.reference._arguments import FLOATING, check_given, check_tensor, compute_dtype


def check(features: list[Tensor], weights: list[Tensor], biases: list[Tensor], target: Tensor) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `exit_heads`."""
    check_counts(features, weights, biases)
    first = features[0]
    if first.dim() != 4:
        raise ValueError(f"exit_heads: features[0] has shape {tuple(first.shape)}, expected (N, C, H, W)")
    if weights[0].dim() != 2 or weights[0].shape[0] < 1:
        raise ValueError(
            f"exit_heads: weights[0] has shape {tuple(weights[0].shape)}, expected (K, {first.shape[1]}) with K >= 1"
        )
    batch, classes = first.shape[0], weights[0].shape[0]
    check_each = partial(check_tensor, "exit_heads", device=first.device, leader="features[0]")
    for depth, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
        if feature.dim() != 4 or feature.shape[0] != batch:
            raise ValueError(
                f"exit_heads: features[{depth}] has shape {tuple(feature.shape)}, expected ({batch}, C, H, W)"
            )
        check_each(f"weights[{depth}]", weight, (classes, feature.shape[1]))
        check_each(f"biases[{depth}]", bias, (classes,))
        check_each(f"features[{depth}]", feature, feature.shape)
        if feature.dtype != first.dtype:
            raise ValueError(
                f"exit_heads: features[{depth}] has dtype {feature.dtype}, expected {first.dtype} as features[0]"
            )
    check_each("target", target, (batch,), dtypes=(torch.int64,))


def check_counts(features: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> None:
    if not features:
        raise ValueError("exit_heads: features is empty, expected one feature map per depth")
    for name, parameters in (("weights", weights), ("biases", biases)):
        if len(parameters) != len(features):
            raise ValueError(
                f"exit_heads: {name} has {len(parameters)} entries, expected {len(features)}, one per feature map"
            )


def check_backward(
    grad_losses: Tensor,
    pooled: Tensor,
    logit_gradients: Tensor,
    weights: list[Tensor],
    positions: list[int],
    feature_dtype: torch.dtype,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract of `exit_heads_backward`."""
    op, depths = "exit_heads_backward", len(weights)
    if not depths or len(positions) != depths:
        raise ValueError(f"{op}: there are {depths} weights and {len(positions)} positions, expected one of each a depth")
    if logit_gradients.dim() != 3 or feature_dtype not in FLOATING:
        raise ValueError(
            f"{op}: logit_gradients has shape {tuple(logit_gradients.shape)} and feature_dtype is {feature_dtype},"
            f" expected ({depths}, N, K) and {', '.join(map(str, FLOATING))}"
        )
    batch, classes = logit_gradients.shape[1:]
    exact = (torch.float64 if feature_dtype == torch.float64 else torch.float32,)
    channels = [weight.shape[-1] if weight.dim() else 0 for weight in weights]
    check_given(op, logit_gradients.device, (
        ("logit_gradients", logit_gradients, (depths, batch, classes), exact),
        ("pooled", pooled, (batch, sum(channels)), exact), ("grad_losses", grad_losses, (depths,), FLOATING),
        *((f"weights[{depth}]", weight, (classes, channels[depth]), FLOATING) for depth, weight in enumerate(weights)),
    ))  # fmt: skip


def exit_heads(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor], target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and top-1 count of every depth, and what the backward pass needs.

    features: D maps (N, C_d, H_d, W_d) of one dtype; weights: D matrices (K, C_d); biases: D vectors (K,);
    target: (N,) int64 in [0, K).

    Returns losses (D,) and, for backward, pooled (N, sum of C_d) and logit_gradients (D, N, K), the gradient
    of each depth's loss with respect to its logits, all in `compute_dtype`; and correct (D,) int64. The first
    of equal logits is the prediction; a row holding NaN counts as wrong. An empty batch has loss NaN.
    """
    check(features, weights, biases, target)
    classes = weights[0].shape[0]
    if target.device.type == "cpu" and target.numel() and not 0 <= target.min() <= target.max() < classes:
        raise ValueError(f"exit_heads: target holds values outside [0, {classes})")

    dtype = compute_dtype(features[0])
    one_hot = F.one_hot(target, classes).to(dtype)
    losses, correct, pooled, logit_gradients = [], [], [], []
    for feature, weight, bias in zip(features, weights, biases, strict=True):
        pooled.append(feature.to(dtype).mean((2, 3)))
        logits = F.linear(pooled[-1], weight.to(dtype), bias.to(dtype))
        log_probabilities = F.log_softmax(logits, dim=1)
        losses.append(F.nll_loss(log_probabilities, target))
        correct.append(((logits.argmax(1) == target) & ~logits.isnan().any(1)).sum())
        logit_gradients.append((log_probabilities.exp() - one_hot) / len(target))
    return torch.stack(losses), torch.stack(correct), torch.cat(pooled, 1), torch.stack(logit_gradients)


def exit_heads_backward(
    grad_losses: Tensor,
    pooled: Tensor,
    logit_gradients: Tensor,
    weights: list[Tensor],
    positions: list[int],
    feature_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of sum(grad_losses * losses).

    grad_losses: (D,); pooled, logit_gradients: from `exit_heads`; positions: H_d * W_d of every depth.

    Returns D pooled gradients (N, C_d, 1, 1) in `feature_dtype`, each equal to the gradient of any one position
    of its feature map, so that expanding it gives the feature's gradient; D weight gradients (K, C_d) in the
    dtype of the weights; the bias gradients (D, K).
    """
    check_backward(grad_losses, pooled, logit_gradients, weights, positions, feature_dtype)
    pooled_gradients, weight_gradients = [], []
    scaled = grad_losses.to(pooled.dtype)[:, None, None] * logit_gradients
    for depth, pool in enumerate(pooled.split([weight.shape[1] for weight in weights], dim=1)):
        weight = weights[depth]
        pooled_gradient = scaled[depth] @ weight.to(pooled.dtype) / positions[depth]
        pooled_gradients.append(pooled_gradient.to(feature_dtype)[:, :, None, None])
        weight_gradients.append((scaled[depth].T @ pool).to(weight.dtype))
    return pooled_gradients, weight_gradients, scaled.sum(1)
