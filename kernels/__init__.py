"""Triton kernels and their launchers, one file per op; imported as `odn_fast.kernels`.

A launcher takes what the op's reference takes, in the same order, and returns what it returns. It may be called with
CUDA tensors; with CPU tensors under TRITON_INTERPRET=1; and with meta tensors inside `_common.compiling`, which compiles
what a call would launch. Checks of shapes are the caller's, who asks `why_not` first.
"""
