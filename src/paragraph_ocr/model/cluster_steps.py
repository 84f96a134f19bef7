"""Greedy reading on a Hopper GPU: all steps of a page in one kernel, a cluster of blocks for each page.

The kernel is CUDA C++ (`cluster_steps.cu`), compiled for a decoder's sizes when they are first read with, and
kept where Triton keeps its own.
"""

import ctypes
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from triton.runtime.cache import get_cache_manager

from paragraph_ocr.model.decoder import Decoder, Layer

_SOURCE = Path(__file__).with_suffix(".cu")

_THREADS = 256
"""Of a block: 128 and 512 are slower on an H200."""

_LARGEST_CLUSTER = 16
"""Blocks of a cluster at most, on any GPU so far."""

_STAGED_BYTES, _KEPT_BYTES = 200 * 1024, 24 * 1024
"""Of the 227 KiB of a block's shared memory, for weights until they are needed, and for biases and norms."""

_ROUNDS = 2
"""Times over that a GPU may be filled with pages before reading all of them step by step is faster."""


class Sizes(NamedTuple):
    """What the kernel is compiled for."""

    width: int
    heads: int
    hidden: int
    layers: int
    tokens: int
    pre: bool
    half: bool
    cluster: int

    @classmethod
    def of(cls, decoder: Decoder, *, half: bool, cluster: int) -> "Sizes":
        layer = cast(Layer, decoder.layers[0])
        return cls(
            width=decoder.width,
            heads=layer.self_attention.heads,
            hidden=layer.expand.out_features,
            layers=len(decoder.layers),
            tokens=decoder.embedding.num_embeddings,
            pre=layer.pre,
            half=half,
            cluster=cluster,
        )

    @property
    def stored(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def units(self) -> int:
        return self.hidden // self.cluster

    @property
    def choices(self) -> int:
        return math.ceil(self.tokens / self.cluster)

    @property
    def staged_bytes(self) -> int:
        """Of a block's shared memory, for weights that are not yet needed; 0 if it has too little."""
        slot = (max(self.head, self.units, self.choices) + max(self.head, self.units)) * self.width
        needed = (2 * slot + 2 * self.head * self.width) * self.stored.itemsize
        return needed if needed <= _STAGED_BYTES else 0

    @property
    def kept_bytes(self) -> int:
        """Of a block's shared memory, for biases and norms of all layers."""
        return 4 * self.layers * (4 * self.head + self.units + 9 * self.width // self.cluster)


def serves(decoder: Decoder, memory: Float[Tensor, "B M D"]) -> bool:
    """Return whether pages are read here, and faster than by `gpu_steps`."""
    kernel = _kernel_for(decoder, memory)
    return kernel is not None and len(memory) <= _ROUNDS * kernel.clusters


def read_greedily(
    decoder: Decoder,
    memory: Float[Tensor, "B M D"],
    memory_mask: Bool[Tensor, "B M"] | None,
    *,
    start: int,
    end: int | None,
    pad: int,
    max_length: int,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Return what `cpu_steps.read_greedily` does.

    Raises:
        ValueError: there is no kernel for this decoder or GPU.
    """
    kernel = _kernel_for(decoder, memory)
    if kernel is None:
        raise ValueError("a decoder of these sizes cannot be read with by clusters here")
    sizes, device = kernel.sizes, memory.device
    layers = cast(list[Layer], list(decoder.layers))
    pages, steps, clusters = len(memory), max_length - 1, min(len(memory), kernel.clusters)
    projected = [layer.cross_attention.keys_values(memory).transpose(0, 1) for layer in layers]
    cells: Float[Tensor, "B layers 2 heads M d"] = torch.stack(projected, dim=1).to(sizes.stored)
    places = math.ceil(steps / (sizes.cluster // sizes.heads))
    with torch.autocast(device.type, enabled=False), torch.device(device):
        inputs = [
            *_packed(decoder, layers, sizes),
            decoder.embedding.weight.float() * math.sqrt(decoder.width),
            cast(Tensor, decoder.positions).float(),
            cells,
            None if memory_mask is None else memory_mask.contiguous(),
        ]
        past_size = clusters, sizes.cluster, sizes.layers, 2, places, sizes.head
        past = torch.empty(past_size, dtype=sizes.stored)
        written = torch.full((pages, steps), pad)
        scores = torch.zeros(pages, steps)
    kernel.launch(
        clusters,
        [*inputs, past, written, scores],
        cast(nn.LayerNorm, layers[0].norms[0]).eps,
        [pages, memory.shape[1], steps, start, -1 if end is None else end],
    )
    return written, scores


def _kernel_for(decoder: Decoder, memory: Tensor) -> "Kernel | None":
    """Return the kernel that reads so, or None: it takes a GPU with clusters and sizes that can be shared."""
    device = memory.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return None
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return None
    autocast = torch.is_autocast_enabled(device.type)
    stored = torch.get_autocast_dtype(device.type) if autocast else memory.dtype
    if stored not in (torch.float32, torch.bfloat16):
        return None
    half, heads = stored is torch.bfloat16, cast(Layer, decoder.layers[0]).self_attention.heads
    for cluster in cluster_sizes(heads):
        sizes = Sizes.of(decoder, half=half, cluster=cluster)
        if can_be_shared(sizes) and (kernel := _loaded(sizes, device)).clusters:
            return kernel
    return None


def cluster_sizes(heads: int) -> list[int]:
    """Return how many blocks can share so many heads, the most first."""
    sizes = [heads * 2**power for power in range(5)]
    return [size for size in reversed(sizes) if size <= _LARGEST_CLUSTER]


def can_be_shared(sizes: Sizes) -> bool:
    """Return whether a cluster's blocks have the same work, and rows of weights fill their lanes."""
    lanes = 16 // sizes.stored.itemsize  # numbers in 16 bytes

    def fills(numbers: int) -> bool:
        chunks = numbers // lanes
        return numbers % lanes == 0 and (chunks in (1, 2, 4) or (chunks > 0 and chunks % 8 == 0))

    return (
        sizes.width % (4 * sizes.cluster) == 0
        and sizes.hidden % sizes.cluster == 0
        and sizes.width // sizes.cluster <= 32
        and sizes.kept_bytes <= _KEPT_BYTES
        and fills(sizes.width)
        and fills(sizes.head)
        and fills(sizes.units)
    )


def _packed(decoder: Decoder, layers: list[Layer], sizes: Sizes) -> list[Tensor]:
    """Return the weights as the kernel takes them: inward, biases, outward, shifts, norms.

    A norm's gain and shift are multiplied into the matrix that sees what it normalises.
    """
    norms = [_norm(norm) for layer in layers for norm in layer.norms]
    nothing = torch.ones_like(norms[0][0]), torch.zeros_like(norms[0][0])
    before = norms if sizes.pre else [nothing, *norms[:-1]]
    last = _norm(decoder.norm) if sizes.pre else norms[-1]
    read_out = decoder.embedding if decoder.read_out is None else decoder.read_out
    inward, outward = [], []
    for layer in layers:
        own, cross = layer.self_attention, layer.cross_attention
        by_head = [
            torch.cat(parts).unflatten(0, (3, sizes.heads, -1)).transpose(0, 1).flatten(0, 2)
            for parts in zip(own.query.parameters(), own.key_value.parameters(), strict=True)
        ]
        inward += [by_head, [*cross.query.parameters()], [*layer.expand.parameters()]]
        outward += [(own.out, sizes.heads), (cross.out, sizes.heads)]
        outward.append((layer.contract, sizes.cluster))
    inward.append([cast(Tensor, read_out.weight), decoder.bias])
    rows = [
        (weight * gain, bias + weight @ shift)
        for (weight, bias), (gain, shift) in zip(inward, [*before, last], strict=True)
    ]
    shared_out = [
        linear.weight.unflatten(1, (shares, -1)).transpose(0, 1).flatten()
        for linear, shares in outward
    ]
    return [
        torch.cat([weight for weight, _ in rows]).to(sizes.stored),
        torch.cat([bias for _, bias in rows]).float(),
        torch.cat(shared_out).to(sizes.stored),
        torch.cat([linear.bias for linear, _ in outward]).float(),
        torch.cat([part for norm in before for part in norm]).float(),
    ]


def _norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return cast(Tensor, norm.weight), cast(Tensor, norm.bias)


class Kernel:
    """The kernel, loaded on a GPU."""

    def __init__(self, function: Any, sizes: Sizes, clusters: int, device: torch.device) -> None:
        self._function, self._device = function, device
        self.sizes = sizes
        self.clusters = clusters
        """How many the GPU holds at once."""

    def launch(
        self, clusters: int, tensors: Sequence[Tensor | None], number: float, counts: Sequence[int]
    ) -> None:
        """Have so many clusters work, on the current stream, with the kernel's arguments in their order."""
        from cuda.bindings import driver

        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        types = [ctypes.c_void_p] * len(pointers) + [ctypes.c_float]
        arguments = (*pointers, number, *counts), (*types, *[ctypes.c_int] * len(counts))
        grid, block = (clusters * self.sizes.cluster, 1, 1), (_THREADS, 1, 1)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        staged = self.sizes.staged_bytes
        with torch.cuda.device(self._device):
            _checked(
                driver.cuLaunchKernel(self._function, *grid, *block, staged, stream, arguments, 0)
            )


@cache
def _loaded(sizes: Sizes, device: torch.device) -> Kernel:
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # there is a context now, if there was none
        module = _checked(driver.cuModuleLoadData(compiled(sizes, f"sm_{major}{minor}")))
        function = _checked(driver.cuModuleGetFunction(module, b"read_pages"))
        attribute = driver.CUfunction_attribute
        allowed = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _checked(driver.cuFuncSetAttribute(function, allowed, 1))
        most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuFuncSetAttribute(function, most, sizes.staged_bytes)
        fits = status == driver.CUresult.CUDA_SUCCESS
        return Kernel(function, sizes, _clusters_at_once(function, sizes) if fits else 0, device)


def _clusters_at_once(function: Any, sizes: Sizes) -> int:
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    along = attribute.value.clusterDim
    along.x, along.y, along.z = sizes.cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = sizes.cluster, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
    config.sharedMemBytes = sizes.staged_bytes
    config.attrs, config.numAttrs = [attribute], 1
    return cast(int, _checked(driver.cuOccupancyMaxActiveClusters(function, config)))


def compiled(sizes: Sizes, architecture: str) -> bytes:
    """Return the kernel's machine code, for a GPU that need not be there.

    Args:
        architecture: such as sm_90.

    Raises:
        RuntimeError: the compiler does not take the source.
    """
    from cuda.bindings import nvrtc

    defined = {name.upper(): int(value) for name, value in sizes._asdict().items()}
    defined |= {"STAGED": int(sizes.staged_bytes > 0), "THREADS": _THREADS}
    options = [f"-D{name}={value}" for name, value in defined.items()]
    options += [f"--gpu-architecture={architecture}", "--std=c++17"]
    source, version = _SOURCE.read_bytes(), _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(source + repr((options, version)).encode()).hexdigest()
    kept, name = get_cache_manager(key), f"{_SOURCE.stem}.cubin"
    if (path := kept.get_file(name)) is not None:
        return Path(path).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, _SOURCE.name.encode(), 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [one.encode() for one in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{_SOURCE.name} is not compiled: {log.decode()}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    kept.put(code, name, binary=True)
    return code


def _checked(returned: tuple[Any, ...]) -> Any:
    """Return what a function of NVIDIA's gives besides its status.

    Raises:
        RuntimeError: it has failed.
    """
    status, *given = returned
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return given[0] if len(given) == 1 else tuple(given)
