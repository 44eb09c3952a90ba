"""Sums over pixels in the backward pass of separable convolutions: those batch norm needs, and those of weights."""

import torch
import triton
import triton.language as tl

from ._common import cdiv, counter, is_last, jit, launch, next_power_of_2, rounded
from ._tuned import blocks
from .separable_conv import channel_scale, padded, split

# ---- batch norm


@jit
def _sums(
    grad_ptr, y_ptr, z_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    skip_z_ptr, skip_mean_ptr, skip_var_ptr, skip_weight_ptr,
    masked_ptr, partial_ptr, counter_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr,
    skip_coefficients_ptr, skip_grad_weight_ptr, skip_grad_bias_ptr,
    pixels, tiles, tiles_each, eps,
    C: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of g = grad where the ReLU let it through, and of g times z (and skip_z) less its mean.

    All maps: (pixels, C). With RELU the mask is y's, or that of batch norm of z if y is None. masked: g, or None.
    partial: (2 or 3, programs, C).
    """
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channels < C
    scale, shift = channel_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, inside, eps)
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0)
    sums = tl.zeros([BM, BC], tl.float32)
    products = tl.zeros([BM, BC], tl.float32)
    if skip_z_ptr is not None:
        skip_mean = tl.load(skip_mean_ptr + channels, mask=inside, other=0.0)
        skip_products = tl.zeros([BM, BC], tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=1):
        pixel = tile * BM + tl.arange(0, BM)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        offset = pixel[:, None] * C + channels[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            if y_ptr is not None:
                y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            else:
                y = z * scale[None, :] + shift[None, :]
            grad = tl.where(y <= 0, 0.0, grad)
        if masked_ptr is not None:
            stored = rounded(grad, masked_ptr.dtype.element_ty)
            tl.store(masked_ptr + offset, stored, mask=mask)
            grad = stored.to(tl.float32)
        sums += grad
        products += grad * (z - mean[None, :])
        if skip_z_ptr is not None:
            skip_z = tl.load(skip_z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            skip_products += grad * (skip_z - skip_mean[None, :])
    programs = tl.num_programs(0)
    row = partial_ptr + tl.program_id(0) * C + channels
    tl.store(row, tl.sum(sums, 0), mask=inside)
    tl.store(row + programs * C, tl.sum(products, 0), mask=inside)
    if skip_z_ptr is not None:
        tl.store(row + 2 * programs * C, tl.sum(skip_products, 0), mask=inside)

    if is_last(counter_ptr, programs * tl.num_programs(1)):
        for block in tl.range(0, C, BC, num_stages=1):
            columns = block + tl.arange(0, BC)
            total = total_of(partial_ptr, columns, programs, C, ROWS)
            finish_norm(
                total, total_of(partial_ptr + programs * C, columns, programs, C, ROWS), columns, pixels,
                var_ptr, weight_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr, eps, C,
            )  # fmt: skip
            if skip_z_ptr is not None:
                finish_norm(
                    total, total_of(partial_ptr + 2 * programs * C, columns, programs, C, ROWS), columns, pixels,
                    skip_var_ptr, skip_weight_ptr, skip_coefficients_ptr, skip_grad_weight_ptr, skip_grad_bias_ptr,
                    eps, C,
                )  # fmt: skip


@triton.jit
def total_of(partial_ptr, columns, programs, C: tl.constexpr, ROWS: tl.constexpr):
    """The sum over programs of partial (programs, C), as the last program sees it."""
    inside = columns < C
    sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for row in tl.range(0, programs, ROWS, num_stages=1):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & inside[None, :]
        sums += tl.load(
            partial_ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(sums, 0)


@triton.jit
def finish_norm(
    total, product, columns, pixels, var_ptr, weight_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr, eps,
    C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias, and a, b and c (3, C) of dz = a * g + b * (z - mean) + c.

    total, product: the sums of g and of g * (z - mean).
    """
    inside = columns < C
    inverse = tl.rsqrt(tl.load(var_ptr + columns, mask=inside, other=0.0) + eps)
    product *= inverse
    scale = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(coefficients_ptr + columns, scale, mask=inside)
    tl.store(coefficients_ptr + C + columns, -scale * inverse * product / pixels, mask=inside)
    tl.store(coefficients_ptr + 2 * C + columns, -scale * total / pixels, mask=inside)
    tl.store(grad_weight_ptr + columns, rounded(product, grad_weight_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_bias_ptr + columns, rounded(total, grad_bias_ptr.dtype.element_ty), mask=inside)


def gradient_sums(grad, y, z, norm, skip, relu, keep_masked, eps):
    """(g, norm's gradients, skip's gradients): g is grad masked if `keep_masked`, else grad itself, yet to be masked.

    norm: (mean, var, weight, bias) of the batch norm of z; skip: None, or (z, mean, var, weight, bias) of another
    whose result is added before the ReLU. The gradients of each: (coefficients, weight's, bias's), as `finish_norm` has them.
    """
    channels = z.shape[1]
    pixels = z.numel() // channels
    same = (channels, int(y is not None), int(keep_masked), int(skip is not None))
    sizes = blocks("separable_sums", z, same=same, size=pixels, default={"elements": 1024, "num_warps": 4, "waves": 4})
    block = padded(channels, 128)
    tile, warps = max(sizes["elements"] // block, 1), sizes["num_warps"]
    tiles = cdiv(pixels, tile)
    each, programs = split(z, tiles, sizes["waves"])
    masked = torch.empty_like(z) if keep_masked else None
    gradients = norm_gradients(norm)
    no_skip = (None, None, None)
    skip_gradients = no_skip if skip is None else norm_gradients(skip[1:])
    launch(
        _sums, (programs, cdiv(channels, block)),
        grad, y, z, *norm, *(skip[:4] if skip else (None, *no_skip)), masked,
        torch.empty((2 if skip is None else 3) * programs * channels, dtype=torch.float32, device=z.device), counter(z),
        *gradients, *skip_gradients, pixels, tiles, each, eps,
        num_warps=warps, num_stages=1, C=channels, RELU=relu, BM=tile, BC=block, ROWS=1024 * warps // block,
    )  # fmt: skip
    return masked if keep_masked else grad, gradients, skip_gradients


def norm_gradients(norm):
    """Memory for what `finish_norm` stores."""
    weight, bias = norm[2:]
    coefficients = torch.empty(3 * weight.shape[0], dtype=torch.float32, device=weight.device)
    return coefficients, torch.empty_like(weight), torch.empty_like(bias)


# ---- weights


@triton.jit
def _reduce_one(
    block, weight_ptr, partial_ptr, programs, size, channels, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """One block of a weight's gradient. partial: (programs, size / channels, channels); weight: transposed."""
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in tl.range(0, programs, ROWS, num_stages=1):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & inside[None, :]
        sums += tl.load(partial_ptr + rows[:, None] * size + element[None, :], mask=mask, other=0.0)
    place = (element % channels) * (size // channels) + element // channels
    tl.store(weight_ptr + place, rounded(tl.sum(sums, 0), weight_ptr.dtype.element_ty), mask=inside)


@jit
def _reduce(
    pw_ptr, pw_partial_ptr, dw_ptr, dw_partial_ptr, pw2_ptr, pw2_partial_ptr, dw2_ptr, dw2_partial_ptr,
    pw3_ptr, pw3_partial_ptr,
    pw_programs, dw_programs, pw2_programs, dw2_programs, pw3_programs, CI: tl.constexpr, CO: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the weights of one layer from CI to CO channels, and of one from CO to CO and a skip's, or None."""
    PW: tl.constexpr = (CO * CI + BLOCK - 1) // BLOCK
    DW: tl.constexpr = (9 * CI + BLOCK - 1) // BLOCK
    PW2: tl.constexpr = (CO * CO + BLOCK - 1) // BLOCK
    DW2: tl.constexpr = (9 * CO + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if block < PW:
        _reduce_one(block, pw_ptr, pw_partial_ptr, pw_programs, CO * CI, CO * CI, BLOCK, ROWS)
    elif block < PW + DW:
        _reduce_one(block - PW, dw_ptr, dw_partial_ptr, dw_programs, 9 * CI, CI, BLOCK, ROWS)
    elif block < PW + DW + PW2:
        if pw2_ptr is not None:
            _reduce_one(block - PW - DW, pw2_ptr, pw2_partial_ptr, pw2_programs, CO * CO, CO * CO, BLOCK, ROWS)
    elif block < PW + DW + PW2 + DW2:
        if dw2_ptr is not None:
            _reduce_one(block - PW - DW - PW2, dw2_ptr, dw2_partial_ptr, dw2_programs, 9 * CO, CO, BLOCK, ROWS)
    else:
        if pw3_ptr is not None:
            _reduce_one(
                block - PW - DW - PW2 - DW2, pw3_ptr, pw3_partial_ptr, pw3_programs, CO * CI, CO * CI, BLOCK, ROWS
            )


def reduce_weights(first, second, skip, inputs, outputs):
    """Write the gradients of weights of one or two layers and of a skip, in one launch.

    first, second: (grad_pw, its partial sums, grad_dw, its partial sums), the latter with a row for each program;
    second and skip may be None, and skip has only the first two.
    """
    block = min(max(next_power_of_2(outputs * inputs) // 128, 16), 64)  # more programs than multiprocessors
    last = outputs * inputs if skip else 0
    sizes = [outputs * inputs, 9 * inputs, outputs * outputs, 9 * outputs, last]
    given = [*first, *(second or (None,) * 4), *(skip or (None, None))]
    programs = [0 if partial is None else partial.shape[0] for partial in given[1::2]]
    launch(
        _reduce, (sum(cdiv(size, block) for size in (sizes if second else sizes[:2])),), *given, *programs,
        num_warps=4, num_stages=1, CI=inputs, CO=outputs, BLOCK=block, ROWS=4096 // block,
    )  # fmt: skip


def _candidates(same: tuple[int, ...]) -> list[dict[str, int]]:
    return [
        {"elements": 256 * warps * many, "num_warps": warps, "waves": waves}
        for warps, waves in ((4, 2), (4, 4), (8, 2)) for many in (1, 2)
    ]  # fmt: skip


CANDIDATES = {"separable_sums": _candidates}
