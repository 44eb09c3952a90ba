"""Exit heads: global average pool, linear layer, cross-entropy and top-1 count of every depth.

One launch forward and one backward, for any number of depths; with many classes, PyTorch's matrix products between two
launches forward. A kernel finds the tensors of its depth in tuples of pointers. Those are kernel arguments: a table in
memory would have to be copied to the GPU before a launch, which is a launch of its own and, captured in a CUDA graph,
would read host memory at every replay. Tuples are padded to a power of two, so few lengths are ever compiled.

    z = W mean(x) + b        loss = mean over images of log sum exp(z) - z[target]        dloss/dz = (softmax(z) - onehot) / N
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import cdiv, counter, dense, is_last, jit, launch, next_power_of_2, rounded
from ._tuned import blocks

MOST_CLASSES = 4096
LARGEST_FUSED = 1 << 16  # elements of a head: each program of the fused launch reads the head of its depth
MOST_DEPTHS = 64  # pointers and sizes of more do not fit the 4 KB of a kernel's arguments


def why_not(function: str, *args) -> list[str]:
    """Reasons why `function` of this module cannot take these arguments; [] if it can."""
    if function == "exit_heads":
        features, weights, biases, target = args
        if not features:
            return ["features is empty"]
        classes, reasons = weights[0].shape[0], _same_dtype(weights, "weights") + _same_dtype(biases, "biases")
        reasons += _same_dtype(features, "features")
        logits = len(weights) * target.shape[0] * classes
        pooled = target.shape[0] * sum(feature.shape[1] for feature in features)
        for count, name in ((logits, "logits"), (pooled, "pooled channels of all depths and images")):
            if count > _common.LARGEST:
                reasons.append(f"there are {count} {name}; the Triton kernels index at most {_common.LARGEST}")
        reasons += _common.why_not(features=max(features, key=Tensor.numel), weights=weights[0], biases=biases[0])
    else:
        grad_losses, pooled, logit_gradients, weights, positions, feature_dtype = args
        classes, reasons = logit_gradients.shape[2], _same_dtype(weights, "weights")
        reasons += _common.why_not(pooled=pooled, logit_gradients=logit_gradients, weights=weights[0])
        if feature_dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"feature_dtype is {feature_dtype}; the Triton kernels take torch.float32 and torch.bfloat16")
    if classes > MOST_CLASSES:
        reasons.append(f"there are {classes} classes; the Triton kernels take at most {MOST_CLASSES}")
    if len(weights) > MOST_DEPTHS:
        reasons.append(f"there are {len(weights)} depths; the Triton kernels take at most {MOST_DEPTHS}")
    return reasons


def _same_dtype(tensors: list[Tensor], name: str) -> list[str]:
    first = tensors[0].dtype
    different = [tensor for tensor in tensors if tensor.dtype != first]
    return [f"{name} has several dtypes; the Triton kernels take one"] if different else []


def _forward_candidates(same: tuple[int, ...]) -> list[dict]:
    _, classes, _ = same
    sizes = [(8192, 4, 8), (8192, 1, 8), (16384, 1, 8), (16384, 1, 16), (16384, 3, 8), (8192, 4, 16), (32768, 1, 16), (4096, 4, 4)]
    return [
        {"TILE": tile, "STAGES": stages, "WEIGHT_TILE": max(8192, classes), "num_warps": warps}
        for tile, stages, warps in sizes
    ]


def _backward_candidates(same: tuple[int, ...]) -> list[dict]:
    sizes = [(32, 16, 64, 4), (16, 16, 64, 4), (32, 16, 128, 4), (64, 16, 128, 8), (64, 32, 64, 4), (32, 16, 32, 4)]
    return [
        {"CHANNELS": channels, "CLASSES": classes, "IMAGES": images, "num_warps": warps}
        for channels, classes, images, warps in sizes
    ]


CANDIDATES = {"exit_heads_forward": _forward_candidates, "exit_heads_backward": _backward_candidates}


# ---- forward


def exit_heads(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor], target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses (D,), correct (D,), pooled (N, sum of C_d), logit_gradients (D, N, K); targets are not checked.

    features: D maps (N, C_d, H_d, W_d) of one dtype; weights: D matrices (K, C_d); biases: D vectors (K,), each
    list of one dtype; target: (N,) int64.
    """
    features, weights, biases = [[dense(x) for x in tensors] for tensors in (features, weights, biases)]
    target = dense(target)
    depths, batch, classes = len(features), target.shape[0], weights[0].shape[0]
    channels = [weight.shape[1] for weight in weights]
    exact = {"dtype": torch.float32, "device": target.device}
    losses = torch.empty(depths, **exact)
    correct = torch.empty(depths, dtype=torch.int64, device=target.device)
    pooled = torch.empty((batch, sum(channels)), **exact)
    logit_gradients = torch.empty((depths, batch, classes), **exact)
    if batch == 0:
        return losses.fill_(math.nan), correct.zero_(), pooled, logit_gradients

    vector = math.gcd(8, *channels)
    block = next_power_of_2(classes)
    padded = next_power_of_2(depths)
    positions = [feature.shape[2] * feature.shape[3] for feature in features]
    choice = blocks(
        "exit_heads_forward",
        features[0],
        same=(padded, block, vector),
        size=max(c * p for c, p in zip(channels, positions, strict=True)),
        default={"TILE": 8192, "STAGES": 4 if depths == 1 else 2, "WEIGHT_TILE": max(8192, block), "num_warps": 8},
    )
    arguments = (
        _padded(features, padded),
        _padded(weights, padded),
        _padded(biases, padded),
        _sizes([c // vector for c in channels], padded),
        _sizes(positions, padded),
        target,
        pooled,
        logit_gradients,
        torch.empty(2 * depths * batch, **exact),
        losses,
        correct,
        counter(target),
        batch,
        classes,
        depths,
        pooled.shape[1] // vector,
    )
    constants = {"DEPTHS": padded, "VECTOR": vector, "CLASSES": block}
    if classes * max(channels) <= LARGEST_FUSED:
        launch(_forward, (batch, depths), *arguments, STEPS="all", **constants, **choice)
    else:
        launch(_forward, (batch, depths), *arguments, STEPS="pool", **constants, **choice)
        for depth, pool in enumerate(pooled.split(channels, 1)):
            weight, bias = weights[depth].float(), biases[depth].float()
            torch.addmm(bias, pool, weight.t(), out=logit_gradients[depth])
        launch(_forward, (batch, depths), *arguments, STEPS="loss", **constants, **choice)
    return losses, correct, pooled, logit_gradients


@jit
def _forward(
    features_ptr,  # DEPTHS maps (N, H_d, W_d, C_d)
    weights_ptr,  # DEPTHS matrices (K, C_d)
    biases_ptr,  # DEPTHS vectors (K,)
    channels,  # C_d / VECTOR, as _sizes writes them
    positions,  # H_d * W_d, as _sizes writes them
    target_ptr,  # (N,)
    pooled_ptr,  # (N, sum of C_d)
    logit_gradients_ptr,  # (D, N, K)
    parts_ptr,  # (2, D, N) scratch: losses and hits
    losses_ptr,  # (D,)
    correct_ptr,  # (D,)
    counter_ptr,
    batch,
    classes,
    depths,
    all_channels,  # sum of C_d / VECTOR
    STEPS: tl.constexpr,
    DEPTHS: tl.constexpr,
    VECTOR: tl.constexpr,
    CLASSES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_TILE: tl.constexpr,
):
    """Program (n, d): image n at depth d. The last program takes the means over the images.

    STEPS: "all"; "pool" alone; or "loss" of the logits found in place of their gradients.
    """
    image, depth = tl.program_id(0), tl.program_id(1)
    row = depth * batch + image
    k = tl.arange(0, CLASSES)
    is_class = k < classes
    if STEPS == "loss":
        logits = tl.load(logit_gradients_ptr + row * classes + k, mask=is_class, other=float("-inf"))
    else:
        C = _size_of(channels, depth, DEPTHS) * VECTOR
        P = _size_of(positions, depth, DEPTHS)
        x_ptr = _of(features_ptr, depth, DEPTHS) + image * P * C
        pool_ptr = pooled_ptr + (image * all_channels + _sum_before(channels, depth, DEPTHS)) * VECTOR
        # Loads of all channels of a position are in flight together, up to 512 channels.
        if C <= 64:
            _pool(x_ptr, pool_ptr, C, P, TILE // 64, 64, STAGES)
        elif C <= 256:
            _pool(x_ptr, pool_ptr, C, P, TILE // 256, 256, STAGES)
        else:
            _pool(x_ptr, pool_ptr, C, P, TILE // 512, 512, STAGES)
        if STEPS == "pool":
            return
        tl.debug_barrier()  # the pooled channels are read by other threads than wrote them
        w_ptr, bias_ptr = _of(weights_ptr, depth, DEPTHS), _of(biases_ptr, depth, DEPTHS)
        logits = _logits(pool_ptr, w_ptr, bias_ptr, k, classes, C, WEIGHT_TILE // CLASSES)

    largest = tl.max(logits, 0)
    exponentials = tl.where(is_class, tl.exp(logits - largest), 0.0)
    total = tl.sum(exponentials, 0)
    target = tl.load(target_ptr + image)
    is_target = k == target
    gradient = (exponentials / total - tl.where(is_target, 1.0, 0.0)) / batch
    tl.store(logit_gradients_ptr + row * classes + k, gradient, mask=is_class)

    loss = largest + tl.log(total) - tl.sum(tl.where(is_target, logits, 0.0), 0)
    predicted = tl.min(tl.where(logits != logits, -1, tl.where(logits == largest, k, CLASSES)), 0)  # -1 with a NaN
    hit = tl.where((predicted == target) & (predicted >= 0), 1.0, 0.0)
    tl.store(parts_ptr + row, loss)
    tl.store(parts_ptr + depths * batch + row, hit)
    if is_last(counter_ptr, batch * depths):
        _mean(parts_ptr, losses_ptr, correct_ptr, batch, depths, DEPTHS, max(64, 2048 // DEPTHS))


@triton.jit
def _pool(x_ptr, pool_ptr, channels, positions, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr):
    """Means over the positions of one image (positions, channels)."""
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        sums = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        for position in tl.range(0, positions, POSITIONS, num_stages=STAGES):
            p = position + tl.arange(0, POSITIONS)
            inside = (p < positions)[:, None] & (c < channels)[None, :]
            sums += tl.load(x_ptr + p[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(pool_ptr + c, tl.sum(sums, 0) / positions, mask=c < channels)


@triton.jit
def _logits(pool_ptr, w_ptr, bias_ptr, k, classes, channels, CHANNELS: tl.constexpr):
    """Of one image, [k.shape[0]]; minus infinity beyond the classes."""
    products = tl.zeros([k.shape[0], CHANNELS], tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        p = tl.load(pool_ptr + c, mask=c < channels, other=0.0)
        inside = (k < classes)[:, None] & (c < channels)[None, :]
        w = tl.load(w_ptr + k[:, None] * channels + c[None, :], mask=inside, other=0.0)
        products += w.to(tl.float32) * p[None, :]
    bias = tl.load(bias_ptr + k, mask=k < classes, other=0.0)
    return tl.where(k < classes, tl.sum(products, 1) + bias.to(tl.float32), float("-inf"))


@triton.jit
def _mean(parts_ptr, losses_ptr, correct_ptr, batch, depths, DEPTHS: tl.constexpr, IMAGES: tl.constexpr):
    """Sums over the images in an order that does not depend on which program this is."""
    d = tl.arange(0, DEPTHS)
    losses, hits = tl.zeros([DEPTHS, IMAGES], tl.float32), tl.zeros([DEPTHS, IMAGES], tl.int32)
    for start in range(0, batch, IMAGES):
        n = start + tl.arange(0, IMAGES)
        inside = (d < depths)[:, None] & (n < batch)[None, :]
        rows = parts_ptr + d[:, None] * batch + n[None, :]
        losses += tl.load(rows, mask=inside, other=0.0, cache_modifier=".cg")
        hits += tl.load(rows + depths * batch, mask=inside, other=0.0, cache_modifier=".cg").to(tl.int32)
    tl.store(losses_ptr + d, tl.sum(losses, 1) / batch, mask=d < depths)
    tl.store(correct_ptr + d, tl.sum(hits, 1).to(tl.int64), mask=d < depths)


# ---- backward


def exit_heads_backward(
    grad_losses: Tensor,
    pooled: Tensor,
    logit_gradients: Tensor,
    weights: list[Tensor],
    positions: list[int],
    feature_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """D pooled gradients (N, C_d, 1, 1) in feature_dtype, D weight gradients (K, C_d), bias gradients (D, K).

    grad_losses: (D,), any stride; pooled, logit_gradients: from `exit_heads`; positions: H_d * W_d of every depth.
    """
    pooled, logit_gradients = dense(pooled), dense(logit_gradients)
    weights = [dense(weight) for weight in weights]
    depths, batch, classes = logit_gradients.shape
    channels = [weight.shape[1] for weight in weights]
    pooled_gradients = [torch.empty((batch, c, 1, 1), dtype=feature_dtype, device=pooled.device) for c in channels]
    weight_gradients = [torch.empty_like(weight) for weight in weights]
    bias_gradients = torch.empty((depths, classes), dtype=torch.float32, device=pooled.device)

    vector = math.gcd(8, *channels)
    padded = next_power_of_2(depths)
    choice = blocks(
        "exit_heads_backward",
        pooled_gradients[0],
        same=(padded, next_power_of_2(classes), vector),
        size=max(channels),
        default={"CHANNELS": 32, "CLASSES": 16 if classes <= 64 else 64, "IMAGES": 64, "num_warps": 4},
    )
    image_blocks = cdiv(batch, choice["IMAGES"])
    launch(
        _backward,
        (
            max(1, cdiv(max(channels), choice["CHANNELS"])),
            image_blocks + cdiv(classes, choice["CLASSES"]),
            depths,
        ),
        _padded(weights, padded),
        _padded(pooled_gradients, padded),
        _padded(weight_gradients, padded),
        _sizes([c // vector for c in channels], padded),
        _sizes(positions, padded),
        grad_losses,
        pooled,
        logit_gradients,
        bias_gradients,
        grad_losses.stride(0),
        batch,
        classes,
        image_blocks,
        pooled.shape[1] // vector,
        DEPTHS=padded,
        VECTOR=vector,
        **choice,
    )
    return pooled_gradients, weight_gradients, bias_gradients


@jit
def _backward(
    weights_ptr,  # DEPTHS matrices (K, C_d)
    pooled_gradients_ptr,  # DEPTHS matrices (N, C_d)
    weight_gradients_ptr,  # DEPTHS matrices (K, C_d)
    channels,  # C_d / VECTOR, as _sizes writes them
    positions,  # H_d * W_d, as _sizes writes them
    grad_losses_ptr,  # (D,)
    pooled_ptr,  # (N, sum of C_d)
    logit_gradients_ptr,  # (D, N, K)
    bias_gradients_ptr,  # (D, K)
    grad_losses_stride,
    batch,
    classes,
    image_blocks,
    all_channels,  # sum of C_d / VECTOR
    DEPTHS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Program (c, b, d): a block of channels of depth d, for a block of images or, after those, of classes."""
    block, depth = tl.program_id(1), tl.program_id(2)
    C = _size_of(channels, depth, DEPTHS) * VECTOR
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    slope = tl.load(grad_losses_ptr + depth * grad_losses_stride).to(tl.float32)
    gradients_ptr = logit_gradients_ptr + depth * batch * classes
    if block < image_blocks:
        n = block * IMAGES + tl.arange(0, IMAGES)
        _pooled_gradient(
            gradients_ptr,
            _of(weights_ptr, depth, DEPTHS),
            _of(pooled_gradients_ptr, depth, DEPTHS),
            slope / _size_of(positions, depth, DEPTHS),
            n, c, batch, classes, C, CLASSES,
        )  # fmt: skip
    else:
        k = (block - image_blocks) * CLASSES + tl.arange(0, CLASSES)
        _head_gradients(
            gradients_ptr,
            pooled_ptr + _sum_before(channels, depth, DEPTHS) * VECTOR,
            _of(weight_gradients_ptr, depth, DEPTHS),
            bias_gradients_ptr + depth * classes,
            slope,
            all_channels * VECTOR, k, c, batch, classes, C, IMAGES,
        )  # fmt: skip


@triton.jit
def _pooled_gradient(gradients_ptr, w_ptr, out_ptr, slope, n, c, batch, classes, channels, CLASSES: tl.constexpr):
    sums = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    for start in range(0, classes, CLASSES):
        k = start + tl.arange(0, CLASSES)
        inside = (n < batch)[:, None] & (k < classes)[None, :]
        g = tl.load(gradients_ptr + n[:, None] * classes + k[None, :], mask=inside, other=0.0)
        inside = (k < classes)[:, None] & (c < channels)[None, :]
        w = tl.load(w_ptr + k[:, None] * channels + c[None, :], mask=inside, other=0.0)
        sums = tl.dot(g, w.to(tl.float32), sums, input_precision="tf32x3")
    inside = (n < batch)[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + n[:, None] * channels + c[None, :], rounded(slope * sums, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _head_gradients(
    gradients_ptr, pooled_ptr, out_ptr, bias_ptr, slope, stride, k, c, batch, classes, channels, IMAGES: tl.constexpr
):  # fmt: skip
    sums = tl.zeros([k.shape[0], c.shape[0]], tl.float32)
    bias = tl.zeros([k.shape[0]], tl.float32)
    for start in range(0, batch, IMAGES):
        n = start + tl.arange(0, IMAGES)
        inside = (k < classes)[:, None] & (n < batch)[None, :]
        g = tl.load(gradients_ptr + n[None, :] * classes + k[:, None], mask=inside, other=0.0)
        inside = (n < batch)[:, None] & (c < channels)[None, :]
        p = tl.load(pooled_ptr + n[:, None] * stride + c[None, :], mask=inside, other=0.0)
        sums = tl.dot(g, p, sums, input_precision="tf32x3")
        bias += tl.sum(g, 1)
    inside = (k < classes)[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + k[:, None] * channels + c[None, :], rounded(slope * sums, out_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(bias_ptr + k, slope * bias, mask=k < classes)


# ---- tuples of a pointer or size per depth


def _padded(tensors: list[Tensor], depths: int) -> tuple[Tensor, ...]:
    return (*tensors, *tensors[:1] * (depths - len(tensors)))


def _sizes(sizes: list[int], depths: int) -> tuple[int, ...]:
    """Sizes for `_size_of`. Whatever it is told, Triton compiles again for integers in tuples that are 1 or divisible by 16."""
    return (*(16 * size + 2 for size in sizes), *(2,) * (depths - len(sizes)))


@triton.jit
def _of(values, depth, DEPTHS: tl.constexpr):
    value = values[0]
    for other in tl.static_range(1, DEPTHS):
        value = tl.where(depth == other, values[other], value)
    return value


@triton.jit
def _size_of(sizes, depth, DEPTHS: tl.constexpr):
    return _of(sizes, depth, DEPTHS) >> 4


@triton.jit
def _sum_before(sizes, depth, DEPTHS: tl.constexpr):
    """Sum of the sizes of all depths before this one."""
    total = depth * 0
    for other in tl.static_range(0, DEPTHS - 1):
        total += tl.where(other < depth, sizes[other] >> 4, 0)
    return total
