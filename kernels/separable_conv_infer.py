"""Separable convolution at inference in Triton: one launch."""

import triton
import triton.language as tl

from . import _common
from ._common import cdiv, dense, dot_dtype, jit, launch, relu, rounded
from ._tuned import blocks
from .separable_conv import (
    default_tiles,
    dense_weight,
    depthwise,
    empty_map,
    input_block,
    operand,
    padded,
    pointwise_weight,
    split,
    tap_major,
    tile_candidates,
    too_large,
)


@triton.jit
def _activation(value, NAME: tl.constexpr):
    if NAME == "relu":
        value = relu(value)
    elif NAME == "relu6":
        value = relu(tl.where(value > 6.0, 6.0, value))
    elif NAME == "hard_swish":
        value *= relu(tl.where(value > 3.0, 6.0, value + 3.0)) * (1.0 / 6.0)
    elif NAME == "silu":
        value = value / (1.0 + tl.exp(-value))
    return value


@jit
def _infer(
    x_ptr, dw_ptr, taps_ptr, dw_bias_ptr, pw_ptr, pw_bias_ptr, residual_ptr, y_ptr,
    pixels, height, width, out_height, out_width, tiles, tiles_each,
    CI: tl.constexpr, CO: tl.constexpr, STRIDE: tl.constexpr, ACT_DW: tl.constexpr, ACT_PW: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = act_pw(pw . act_dw(dw * x + dw_bias) + pw_bias + residual), in the sizes of `_forward`."""
    CHUNKS: tl.constexpr = (CI + BK - 1) // BK
    dtype = x_ptr.dtype.element_ty
    outputs = tl.program_id(1) * BN + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    inside, outputs_inside = channels < CI, outputs < CO
    pw = pointwise_weight(pw_ptr, channels, inside, outputs, outputs_inside, CI, dtype, DOT)
    weights_ptr = tap_major(dw_ptr, taps_ptr, CI, BK)
    nothing = tl.zeros([BK], tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=1):
        pixel = tile * BM + tl.arange(0, BM)
        valid = pixel < pixels
        y = tl.zeros([BM, BN], tl.float32)
        for chunk in tl.range(0, CHUNKS, num_stages=1):
            if CHUNKS > 1:
                channels = chunk * BK + tl.arange(0, BK)
                inside = channels < CI
                pw = pointwise_weight(pw_ptr, channels, inside, outputs, outputs_inside, CI, dtype, DOT)
            between = depthwise(
                x_ptr, weights_ptr, nothing, nothing, pixel, valid, channels, inside,
                height, width, out_height, out_width, CI, STRIDE, False,
            )  # fmt: skip
            if dw_bias_ptr is not None:
                between += tl.load(dw_bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
            between = _activation(between, ACT_DW)
            y = tl.dot(operand(between, dtype, DOT), pw, y, input_precision="tf32x3")
        mask = valid[:, None] & outputs_inside[None, :]
        offset = pixel[:, None] * CO + outputs[None, :]
        if pw_bias_ptr is not None:
            y += tl.load(pw_bias_ptr + outputs, mask=outputs_inside, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, rounded(_activation(y, ACT_PW), dtype), mask=mask)


def separable_conv_infer(x, dw, dw_bias, pw, pw_bias, residual, stride, act_dw, act_pw):
    """As `odn_fast.reference.separable_conv.separable_conv_infer`, in one launch."""
    x, pw = dense(x), dense(pw)
    dw_bias, pw_bias, residual = (None if t is None else dense(t) for t in (dw_bias, pw_bias, residual))
    outputs, inputs = pw.shape[:2]
    height, width = x.shape[2:]
    y = empty_map(x, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
    pixels = y.numel() // outputs
    if pixels == 0:
        return y
    same = (inputs, outputs, stride, 0, 0)
    sizes = blocks("separable_infer", x, same=same, size=pixels, default=default_tiles(same, x))
    output_block = padded(outputs, 64)
    tiles = cdiv(pixels, sizes["BM"])
    each, programs = split(x, tiles, sizes["waves"])
    launch(
        _infer, (programs, cdiv(outputs, output_block)),
        x, *dense_weight(dw), dw_bias, pw, pw_bias, residual, y, pixels, height, width, *y.shape[2:], tiles, each,
        num_warps=sizes["num_warps"], num_stages=1, CI=inputs, CO=outputs, STRIDE=stride, ACT_DW=act_dw, ACT_PW=act_pw,
        DOT=dot_dtype(x.dtype), BM=sizes["BM"], BN=output_block, BK=input_block(x),
    )  # fmt: skip
    return y


CANDIDATES = {"separable_infer": tile_candidates}


def why_not(function, x, dw, dw_bias, pw, pw_bias, residual, stride, *activations):
    """Reasons why `function` of this file cannot take its arguments; [] if it can."""
    reasons = _common.why_not(x=x, dw=dw, dw_bias=dw_bias, pw=pw, pw_bias=pw_bias, residual=residual)
    return reasons + too_large(x, pw.shape[0], stride)
