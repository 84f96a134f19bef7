"""Compile the kernel that reads one row for a GPU that need not be there, and print how much it takes of one.

Run as a script, for in the tests' own process Triton interprets: python compile_resident.py CAPABILITY
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paragraph_ocr.model import resident
from paragraph_ocr.model.decoder import Decoder

NUMBERS = {
    "first": "i32",
    "steps": "i32",
    "end": "i32",
    "last": "i32",
    "scale": "fp32",
    "root": "fp32",
}
WHOLE = {"arrived": "*i32", "mask": "*i1", "written": "*i64"}
FULL = ("stream", "parts", "scores")
"""Tensors that are float32 whatever is read in, beside those of `resident._WEIGHTS`."""


def compiled(capability, dtype):
    """Return the kernel for the reference's decoder and page, launched as the module launches it."""
    decoder = Decoder(
        num_tokens=84, depth=4, width=256, heads=4, feed_forward=1024, dropout=0.0, norm="pre",
        tied=True, max_length=682,
    )  # fmt: skip
    steps = resident.ResidentSteps(
        decoder, cells=360, masked=True, length=682, end=2, dtype=dtype, device=torch.device("cpu")
    )
    kernel = resident._read
    constants = {**steps._constants, "BLOCK": resident._LAUNCH["BLOCK"]}
    kinds = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    weights = zip(kernel.arg_names, steps._weights, strict=False)
    types = {name: kinds[weight.dtype] for name, (weight, _) in weights}
    types |= dict.fromkeys(("pasts", "crosses"), kinds[dtype])
    types |= NUMBERS | WHOLE | dict.fromkeys(FULL, "*fp32")
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": resident._LAUNCH["num_warps"], "launch_cooperative_grid": True},
    )


if __name__ == "__main__":
    capability = int(sys.argv[1])
    largest = max(compiled(capability, t).metadata.shared for t in (torch.bfloat16, torch.float32))
    sys.stdout.write(str(largest))
