"""Fill torch.compile's cache on disk with all that the GPU benches compile, many graphs at a time.

    python bench/compile_ahead.py [separable_conv ...]

The benches then wait a second for a graph instead of ten. How long each took here, with so many at a time, goes into the
results beside the benches' figures: "first_call_s" there is read from this cache.
"""

import importlib
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

BENCHES = ("augment", "batch_norm_act", "channel_attention", "separable_conv", "separable_unit")


def compile_case(bench: str, index: int) -> tuple[str, dict[str, float]]:
    """Seconds that the first call of each phase of the compiled arm takes, by the case's name."""
    import torch

    import harness_cuda

    torch.backends.cudnn.benchmark = True  # as the benches have it
    case = importlib.import_module(f"bench_{bench}").cuda_cases(torch.bfloat16)[index]()
    return case.name, {phase: harness_cuda.seconds(f) for phase, f in case.arms["compiled"].items()}


def count(bench: str) -> int:
    import torch

    return len(importlib.import_module(f"bench_{bench}").cuda_cases(torch.bfloat16))


def main(benches: list[str]) -> None:
    import harness_cuda

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # for the workers, of which there are enough
    begin, took = time.monotonic(), {bench: {} for bench in benches}
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(compile_case, bench, index): bench for bench in benches for index in range(count(bench))}
        for done in as_completed(jobs):
            try:
                name, seconds = done.result()
            except Exception as failure:  # the bench itself will say why, at its own case
                print(f"{jobs[done]}: {type(failure).__name__}: {failure}", file=sys.stderr)
                continue
            took[jobs[done]][name] = seconds
            print(f"{time.monotonic() - begin:4.0f} s  {jobs[done]} {name}: {sum(seconds.values()):.1f} s", flush=True)
    harness_cuda.report("compile_ahead", {"workers": workers, "seconds": time.monotonic() - begin, "first_call_s": took})


if __name__ == "__main__":
    main(sys.argv[1:] or list(BENCHES))
