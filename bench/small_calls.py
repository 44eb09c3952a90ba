"""One small call of every op on each of its GPU implementations, forward and backward: what a sanitizer is given.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python bench/small_calls.py [op ...]
"""

import itertools
import sys
import time

import torch

from odn_fast import tune
from odn_fast.ops._choose import CannotRun, implemented

SHAPES = {  # what every way through the launchers takes: one program or many, at once or in sweeps, fused or not
    "augment": [(3, 3, 9)],
    "batch_norm_act": [(3, 40, 7, True), (16, 40, 24, True), (16, 40, 24, False)],
    "channel_attention": [(3, 20, 24, 7), (2, 20, 24, 40)],
    "exit_heads": [(5, 10, (24, 7), (40, 3)), (5, 1000, (136, 3))],
    "separable_conv": [(3, 24, 40, 9)],
    "separable_unit": [(3, 24, 9)],
}
SHAPES_CUDA = {"separable_conv": [(3, 32, 48, 9)], "separable_unit": [(3, 32, 9)]}  # multiples of 16 channels


def main(names: list[str]) -> bool:
    """Whether all went well; what fails is told, and the next one called."""
    well = True
    for op, make in dict.fromkeys((workload.op, workload.make) for workload in tune.WORKLOADS):
        if names and op not in names:
            continue
        in_cuda = [name for name in implemented("cuda") if name.startswith(op)]
        shapes = [(["triton"], shape) for shape in SHAPES[op]] + [(["cuda", *in_cuda], shape) for shape in SHAPES_CUDA.get(op, ())]
        for dtype, (implementation, shape) in itertools.product((torch.bfloat16, torch.float32), shapes):
            workload = tune.Workload(op, shape, dtype, make)
            begin = time.monotonic()
            try:
                workload.call(*implementation)()
                torch.cuda.synchronize()
                said = f"called in {time.monotonic() - begin:.1f} s"
            except CannotRun as reason:
                said = str(reason)
            except Exception as failure:
                said, well = f"FAILED: {type(failure).__name__}: {str(failure).strip()[:500]}", False
            print(f"{workload} on {implementation[0]}: {said}", flush=True)
    return well


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
