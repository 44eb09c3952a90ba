"""One small call of every op on each of its GPU implementations, forward and backward: what a sanitizer is given.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python bench/small_calls.py [op ...]
"""

import sys

import torch

from odn_fast import tune
from odn_fast.ops._choose import CannotRun, implemented

SHAPES = {
    "augment": (3, 3, 9),
    "batch_norm_act": (3, 40, 7, True),
    "channel_attention": (3, 20, 24, 7),
    "exit_heads": (5, 10, (24, 7), (40, 3)),
    "separable_conv": (3, 24, 40, 9),
    "separable_unit": (3, 24, 9),
}


def main(names: list[str]) -> None:
    for op, make in dict.fromkeys((workload.op, workload.make) for workload in tune.WORKLOADS):
        if names and op not in names:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            in_cuda = [name for name in implemented("cuda") if name.startswith(op)]
            for implementation in [["triton"], *([["cuda", *in_cuda]] if in_cuda else [])]:
                workload = tune.Workload(op, SHAPES[op], dtype, make)
                try:
                    workload.call(*implementation)()
                except CannotRun as reason:
                    print(f"{workload}: {reason}")
                    continue
                torch.cuda.synchronize()
                print(f"{workload} on {implementation[0]}: called", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
