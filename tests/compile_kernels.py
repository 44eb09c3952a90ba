"""Compiles kernels for a GPU that is not there and prints one line of JSON about each; test_kernel_compilation reads it.

    python tests/compile_kernels.py CAPABILITY few|all|grown STEM...

"grown" compiles networks' calls of two sizes, with the same channels, instead of STEMs' cases.

A process of its own: Triton compiles or interprets, but not both in one.
"""

import json
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import triton

import compilation_cases
from odn_fast.kernels._common import compiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def describe(kernel) -> dict:
    """What was compiled, and what of the GPU it uses."""
    names = kernel.src.fn.arg_names
    usage = tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", tool("nvdisasm", kernel.asm["cubin"], "-c"), re.M)

    def count(pattern):
        return sum(re.match(pattern, instruction) is not None for instruction in instructions)

    return {
        "kernel": kernel.metadata.name,
        "types": {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"},
        "constants": {names[path[0]]: str(value) for path, value in kernel.src.constants.items()},
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": count("STL|LDL"),
        "shared": kernel.metadata.shared,
        "dots": kernel.asm["ttir"].count("tt.dot "),
        "tensor_core": count("HMMA|HGMMA|UTC.*MMA"),
        "wide_loads": count(r"(LDG|LDGSTS)\b.*\.(64|128|256)"),
        "instructions": len(instructions),
        "hash": kernel.hash,
    }


def network(batch: int, size: int) -> None:
    """A separable convolution, a distillation loss, a batch norm and an exit head, forward and backward.

    With the channels of the cases' few, whose kernels Triton then has on disk.
    """
    from odn_fast.kernels.batch_norm_act import batch_norm_act_train, batch_norm_act_train_backward
    from odn_fast.kernels.channel_attention import channel_attention_loss
    from odn_fast.kernels.exit_heads import exit_heads, exit_heads_backward
    from odn_fast.kernels.separable_conv import separable_conv_train
    from odn_fast.kernels.separable_conv_backward import separable_conv_train_backward

    x, student = (compilation_cases.feature_map("meta", batch, c, size, size, torch.bfloat16) for c in (64, 16))
    weights = compilation_cases.separable_parameters("meta", 64, 64)
    y, _, var, z, z_mean = separable_conv_train(x, *weights, None, 1, 1e-5, True)
    separable_conv_train_backward(y, x, *weights, None, z, z_mean, var, 1, 1e-5, True, True)
    channel_attention_loss(student, y, None, None, None, True, True)
    y, mean, var = batch_norm_act_train(x, *weights[2:], None, 1e-5, True)
    batch_norm_act_train_backward(y, x, *weights[2:], None, mean, var, 1e-5, True, True)
    weight, bias = torch.empty(10, 64, device="meta"), torch.empty(10, device="meta")
    losses, _, pooled, logits = exit_heads([x], [weight], [bias], torch.empty(batch, dtype=torch.int64, device="meta"))
    exit_heads_backward(losses, pooled, logits, [weight], [size * size], x.dtype)


def main(capability: int, what: str, stems: list[str]) -> None:
    if what == "grown":
        runs = {f"{batch} images of {size}x{size}": (network, batch, size) for batch, size in ((200, 8), (260, 7))}
    else:
        cases = [case for case in compilation_cases.CASES if case.__name__ in stems]
        runs = {case.__name__: (case, "meta", what == "all") for case in cases}
    for name, (function, *arguments) in runs.items():
        with compiling(capability) as compiled:
            try:
                function(*arguments)
            except Exception:
                print(json.dumps({"of": name, "error": traceback.format_exc()}))
        for kernel in {kernel.hash: kernel for kernel in compiled}.values():
            print(json.dumps({"of": name, "capability": capability, **describe(kernel)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
