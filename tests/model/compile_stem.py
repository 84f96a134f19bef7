"""Compile the stem's kernels for GPUs that need not be there, and print what each takes of one.

Run as a script, for in the tests' own process Triton interprets: python compile_stem.py CAPABILITY...
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paragraph_ocr.model import stem_kernels

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_all(capability, dtype):
    """Yield each kernel's name and its shared memory in bytes, launched as the module launches it."""
    options = stem_kernels._blocks(torch.empty(0, dtype=dtype), 64)
    pages = f"*{TYPES[dtype]}"
    types = dict.fromkeys(("padded", "kernel", "pooled", "gradient"), pages)
    types |= dict.fromkeys(("scale", "shift", "sums", "products"), "*fp32") | {"taps": "*u8"}
    for kernel in (stem_kernels._moments, stem_kernels._pool, stem_kernels._spread):
        constants = {n: options[n] for n in kernel.arg_names if n in options}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        # the first of them: addresses of tensors, and sizes in pixels, are multiples of 16
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name in types or name == "COLUMNS_PADDED"
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={name: options[name] for name in ("num_warps", "num_stages")},
        )
        yield kernel.__name__, compiled.metadata.shared


if __name__ == "__main__":
    found = {
        f"{name} {TYPES[dtype]} {capability}": shared
        for capability in map(int, sys.argv[1:])
        for dtype in TYPES
        for name, shared in compile_all(capability, dtype)
    }
    sys.stdout.write(json.dumps(found))
