"""A peer for packed products: ggml, the library under llama.cpp, out of llama-cpp-python.

Its C functions are called through ctypes. A weight lies in the layout that llama.cpp itself would
choose on this processor: the first of the CPU backend's extra buffer types (AMX tiles, interleaved
rows) that supports the product, else plain blocks. ggml rounds activations to 8 bits, 32 of them
with a scale.

    Q4_0   32 weights in 18 bytes: float16 d; byte j holds code j low and code j + 16 high
    Q8_0   32 weights in 34 bytes: float16 d, then a signed byte each
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

import tilewright
from tilewright import PackedWeight
from tilewright.ops.common.packed import unpack_codes, unpack_rows

PACKAGE = "llama-cpp-python"
GROUP = 32  # weights that share a scale
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8}  # of ggml.h
KINDS = {"int4": "Q4_0", "int8": "Q8_0"}  # of our formats, those that ggml has as well

_P, _N = ctypes.c_void_p, ctypes.c_size_t
SIGNATURES: dict[str, tuple] = {  # name: (result, arguments...)
    "ggml_new_tensor_2d": (_P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_get_data": (_P, _P),
    "ggml_nbytes": (_N, _P),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (_N,),
    "ggml_graph_overhead": (_N,),
    "ggml_backend_cpu_init": (_P,),
    "ggml_backend_cpu_buffer_type": (_P,),
    "ggml_backend_cpu_set_n_threads": (None, _P, ctypes.c_int),
    "ggml_backend_get_device": (_P, _P),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, ctypes.c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buft_name": (ctypes.c_char_p, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _N, _N),
    "ggml_backend_graph_compute": (ctypes.c_int, _P, _P),
    "ggml_log_set": (None, _P, _P),
}
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
silent = LOG(lambda level, text, data: None)  # kept here, because C holds its address
Result = TypeVar("Result")


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _N), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


def why_not() -> str | None:
    if importlib.util.find_spec(PACKAGE.removesuffix("-python").replace("-", "_")) is None:
        return f"it is not installed; install it with `pip install --no-deps {PACKAGE}`"
    return _why_broken()


@functools.cache
def _why_broken() -> str | None:
    """What becomes of two small products in a process of their own, which may die of them."""
    command = [sys.executable, "-m", "tilewright.bench.peers_ggml"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    said = tried.stderr.strip().splitlines()[-1:] or [f"exit status {tried.returncode}"]
    # _tile_loadconfig of GCC 12 names 8 of the 64 bytes that it reads, so that stores to the others
    # are dropped; check again when GCC's amxtileintrin.h changes
    return (
        f"its products fail here ({said[0]}); if a GCC compiled it for AMX, build it again with "
        "`CXXFLAGS='-fno-tree-dse -fno-dse' pip install --no-deps --no-cache-dir "
        f"--force-reinstall {PACKAGE}`"
    )


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ggml")


def apart(work: Callable[[], Result]) -> Result:
    """Do it on a thread that ggml has to itself.

    ggml configures the AMX tiles once a thread; torch's and our kernels, on a thread that they
    share with it, would leave it without.
    """
    return _thread().submit(work).result()


def _end_thread() -> None:
    """End ggml's thread, and its OpenMP threads with it.

    While there are more of those than processors, they sleep after each product instead of waiting
    for the next one, torch's and ours as well: a call of 0.4 ms then takes 0.7.
    """
    if _thread.cache_info().currsize:
        _thread().shutdown()
        _thread.cache_clear()


def apart_for_once(work: Callable[[], Result]) -> Result:
    """The same for work that is long beside the start of some threads, which then end with it."""
    with ThreadPoolExecutor(1, "ggml") as thread:
        return thread.submit(work).result()


@functools.cache
def library() -> ctypes.CDLL:
    """libggml of the package, its functions with their types; nothing of Python is imported."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"bench: llama.cpp cannot run: {why_not()}")
    loaded = ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml.so"))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.ggml_init.restype, loaded.ggml_init.argtypes = _P, [_InitParams]
    loaded.ggml_log_set(ctypes.cast(silent, _P), None)
    return loaded


@functools.cache
def _backend() -> tuple[int, int, tuple[int, ...]]:
    """The CPU backend, its device, and its buffer types, best first."""
    lib = library()
    backend = lib.ggml_backend_cpu_init()
    device = lib.ggml_backend_get_device(backend)
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    found: list[int] = []
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        while extra[len(found)]:
            found.append(extra[len(found)])
    return backend, device, (*found, lib.ggml_backend_cpu_buffer_type())


def blocks_of(packed: PackedWeight) -> tuple[str, torch.Tensor]:
    """The same weight as ggml keeps it: the name of its type, and (O, bytes of a row) uint8.

    Codes are the same; a scale is rounded to float16 and repeated for every 32 weights.
    ValueError: a format that ggml does not have, or groups that are no multiple of 32.
    """
    kind = KINDS.get(packed.format)
    n_out, n_in = packed.shape
    plain = packed.offsets is None and packed.nested is None and packed.input_order is None
    if kind is None or not plain or n_in % GROUP or packed.group_size % GROUP:
        raise ValueError(
            f"blocks_of: packed is {packed.format} {packed.shape} in groups of "
            f"{packed.group_size}, need {' or '.join(KINDS)} in groups of a multiple of {GROUP}, "
            "with scales alone"
        )
    codes = unpack_codes(packed.codes, packed.format, n_out, n_in).view(n_out, -1, GROUP)
    scales = unpack_rows(packed.scales, n_out).half()
    scales = scales.repeat_interleave(packed.group_size // GROUP, 1)[:, : n_in // GROUP]
    if kind == "Q4_0":
        half = GROUP // 2
        codes = codes[..., :half] | codes[..., half:] << 4
    parts = [scales[..., None].contiguous().view(torch.uint8), codes.view(torch.uint8)]
    return kind, torch.cat(parts, -1).flatten(1)


class Product:
    """y = x W^T, as a graph of one node.

    kind      "Q4_0" or "Q8_0"
    blocks    W (O, bytes of a row) uint8, from `blocks_of`
    x         (T, I); copied as float32
    threads   of the product
    layout    the name of ggml's buffer type that W is kept in
    """

    def __init__(self, kind: str, blocks: torch.Tensor, x: torch.Tensor, threads: int):
        lib = self._lib = library()
        backend, device, layouts = _backend()
        n_tokens, n_in = x.shape
        n_out = blocks.shape[0]
        self.threads, self.shape = threads, (n_tokens, n_out)
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        weakref.finalize(self, _free, lib, self._buffers, self._contexts)
        weakref.finalize(self, _end_thread)
        for layout in layouts:
            weights, tensors = self._context(), self._context()
            weight = lib.ggml_new_tensor_2d(weights, TYPES[kind], n_in, n_out)
            given = lib.ggml_new_tensor_2d(tensors, TYPES["F32"], n_in, n_tokens)
            self._y = lib.ggml_mul_mat(tensors, weight, given)
            self._allocate(weights, layout)
            self._allocate(tensors, layouts[-1])
            if lib.ggml_backend_dev_supports_op(device, self._y):
                break
            _free(lib, self._buffers, self._contexts)
        else:
            raise NotImplementedError(f"ggml has no product of {kind} on this processor")
        self.layout = lib.ggml_backend_buft_name(layout).decode()
        if lib.ggml_nbytes(weight) != blocks.nbytes:
            raise ValueError(
                f"Product: blocks has {blocks.nbytes} bytes, need {lib.ggml_nbytes(weight)} "
                f"for {kind} ({n_out}, {n_in})"
            )
        for tensor, values in ((weight, blocks.contiguous()), (given, x.float().contiguous())):
            lib.ggml_backend_tensor_set(tensor, values.data_ptr(), 0, values.nbytes)
        self._graph = lib.ggml_new_graph(tensors)
        lib.ggml_build_forward_expand(self._graph, self._y)
        self._backend = backend

    def __call__(self) -> torch.Tensor:
        """(T, O) float32 in ggml's memory: the next call overwrites it."""
        # one row takes no tiles, and handing it over would be a part of its time
        status = self._compute() if self.shape[0] == 1 else apart(self._compute)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute failed with status {status}")
        n = self.shape[0] * self.shape[1]
        memory = (ctypes.c_float * n).from_address(self._lib.ggml_get_data(self._y))
        memory.owner = self  # type: ignore[attr-defined]  # lives as long as the tensor does
        return torch.frombuffer(memory, dtype=torch.float32).view(self.shape)

    def _compute(self) -> int:
        self._lib.ggml_backend_cpu_set_n_threads(self._backend, self.threads)
        return self._lib.ggml_backend_graph_compute(self._backend, self._graph)

    def _context(self) -> int:
        """Room for a few tensors' descriptions and a graph, not for their data."""
        lib = self._lib
        n_bytes = 8 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead()
        self._contexts.append(lib.ggml_init(_InitParams(n_bytes, None, True)))
        return self._contexts[-1]

    def _allocate(self, context: int, layout: int) -> None:
        buffer = self._lib.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
        if not buffer:
            raise MemoryError("ggml could not allocate its tensors")
        self._buffers.append(buffer)


def _free(lib: ctypes.CDLL, buffers: list[int], contexts: list[int]) -> None:
    for buffer in buffers:
        lib.ggml_backend_buffer_free(buffer)
    for context in contexts:
        lib.ggml_free(context)
    buffers.clear()
    contexts.clear()


def _try() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for format in (tilewright.Int4(64), tilewright.Int8()):
        packed = tilewright.quantize_weight(x.T.repeat(1, 32).reshape(96, 256), format)
        truth = x @ tilewright.dequantize_weight(packed, torch.float32).T
        error = (Product(*blocks_of(packed), x, threads=1)() - truth).norm() / truth.norm()
        if not error < 0.02:
            raise SystemExit(f"a product of {format} is wrong by {error:.1e} of its norm")


if __name__ == "__main__":
    _try()
