"""Adds two vectors on the GPU that Ray gives to an instance, with NVIDIA's driver library alone.

Run as a program, so that its class travels to the worker as that of a user's script does: by value,
with the functions that it calls. Signatures and symbols are those of the CUDA Driver API; the ones with
a suffix are what ``cuda.h`` makes of the plain names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Sequence
from typing import Any

from apothic import App, method

app = App("gpu")

COUNT = 1000  # no multiple of THREADS, so that the kernel has to look where it ends
THREADS = 256

# Assembled by the driver for the GPU at hand; `sm_50` is the oldest kind that it will do for.
VECTOR_ADD = """
.version 6.0
.target sm_50
.address_size 64

.visible .entry vector_add(
    .param .u64 param_left,
    .param .u64 param_right,
    .param .u64 param_sum,
    .param .u32 param_count
)
{
    .reg .pred %p<2>;
    .reg .b32  %r<6>;
    .reg .f32  %f<4>;
    .reg .b64  %rd<11>;

    ld.param.u64       %rd1, [param_left];
    ld.param.u64       %rd2, [param_right];
    ld.param.u64       %rd3, [param_sum];
    ld.param.u32       %r1, [param_count];
    mov.u32            %r2, %ctaid.x;
    mov.u32            %r3, %ntid.x;
    mov.u32            %r4, %tid.x;
    mad.lo.s32         %r5, %r2, %r3, %r4;
    setp.ge.u32        %p1, %r5, %r1;
    @%p1 bra           done;

    cvta.to.global.u64 %rd4, %rd1;
    cvta.to.global.u64 %rd5, %rd2;
    cvta.to.global.u64 %rd6, %rd3;
    mul.wide.u32       %rd7, %r5, 4;
    add.s64            %rd8, %rd4, %rd7;
    add.s64            %rd9, %rd5, %rd7;
    add.s64            %rd10, %rd6, %rd7;
    ld.global.f32      %f1, [%rd8];
    ld.global.f32      %f2, [%rd9];
    add.f32            %f3, %f1, %f2;
    st.global.f32      [%rd10], %f3;
done:
    ret;
}
"""


class CudaError(Exception):
    """A call of the driver failed."""


def load_driver() -> ctypes.CDLL:
    """Load the driver library, and declare what is called of it: else ctypes would cut off pointers.

    Raises:
        OSError: when there is none.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, address = ctypes.c_int, ctypes.c_uint64  # CUdevice, CUdeviceptr
    handle = ctypes.c_void_p  # CUcontext, CUmodule, CUfunction and CUstream
    number, size = ctypes.c_uint, ctypes.c_size_t
    declared: dict[str, list[Any]] = {
        "cuInit": [number],
        "cuDeviceGetCount": [ctypes.POINTER(ctypes.c_int)],
        "cuDeviceGet": [ctypes.POINTER(device), ctypes.c_int],
        "cuDevicePrimaryCtxRetain": [ctypes.POINTER(handle), device],
        "cuDevicePrimaryCtxRelease_v2": [device],
        "cuCtxSetCurrent": [handle],
        "cuCtxSynchronize": [],
        "cuModuleLoadData": [ctypes.POINTER(handle), ctypes.c_char_p],
        "cuModuleUnload": [handle],
        "cuModuleGetFunction": [ctypes.POINTER(handle), handle, ctypes.c_char_p],
        "cuMemAlloc_v2": [ctypes.POINTER(address), size],
        "cuMemFree_v2": [address],
        "cuMemcpyHtoD_v2": [address, ctypes.c_void_p, size],
        "cuMemcpyDtoH_v2": [ctypes.c_void_p, address, size],
        "cuLaunchKernel": [
            handle,
            *(number, number, number),  # blocks
            *(number, number, number),  # threads of a block
            number,  # bytes of shared memory
            handle,  # stream
            ctypes.POINTER(ctypes.c_void_p),  # where each parameter lies
            ctypes.POINTER(ctypes.c_void_p),  # parameters in another form
        ],
    }

    def check(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if result != 0:
            raise CudaError(f"{function.__name__} failed with CUDA error {result}")
        return result

    for name, arguments in declared.items():
        function = getattr(cuda, name)
        function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_int, check
    return cuda


def device_count() -> int:
    """Count the GPUs that this process sees.

    Raises:
        OSError: when there is no driver.
        CudaError: when the driver finds no GPU, or does not fit to it.
    """
    cuda = load_driver()
    cuda.cuInit(0)
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def add_on_gpu(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Add two vectors of the same length on the first GPU that this process sees."""
    cuda = load_driver()
    cuda.cuInit(0)
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    with contextlib.ExitStack() as undo:
        context = ctypes.c_void_p()
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        undo.callback(cuda.cuDevicePrimaryCtxRelease_v2, device)
        cuda.cuCtxSetCurrent(context)
        undo.callback(cuda.cuCtxSetCurrent, None)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.cuModuleLoadData(ctypes.byref(module), VECTOR_ADD.encode())
        undo.callback(cuda.cuModuleUnload, module)
        cuda.cuModuleGetFunction(ctypes.byref(function), module, b"vector_add")

        vector = ctypes.c_float * len(left)
        size = ctypes.sizeof(vector)
        addresses = []
        for content in (vector(*left), vector(*right), vector()):
            address = ctypes.c_uint64()
            cuda.cuMemAlloc_v2(ctypes.byref(address), size)
            undo.callback(cuda.cuMemFree_v2, address)
            cuda.cuMemcpyHtoD_v2(address, content, size)
            addresses.append(address)

        parameters = [*addresses, ctypes.c_uint32(len(left))]
        places = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        blocks = -(-len(left) // THREADS)
        cuda.cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, None, places, None)
        cuda.cuCtxSynchronize()
        result = vector()
        cuda.cuMemcpyDtoH_v2(result, addresses[-1], size)
        return list(result)


@app.cls(cpu=1, memory_mb=1024, gpu_count=1)
class Adder:
    @method()
    def add(self, left: list[float], right: list[float]) -> list[float]:
        return add_on_gpu(left, right)

    @method()
    def gpus(self) -> dict[str, Any]:
        """Give the GPUs that Ray assigned, and how many this process sees."""
        import ray

        return {"assigned": ray.get_gpu_ids(), "seen": device_count()}


if __name__ == "__main__":
    numbers = [float(number) for number in range(COUNT)]
    halves = [number / 2 for number in numbers]
    with Adder.new() as adder:
        found = {"sum": adder.add.remote(numbers, halves), **adder.gpus.remote()}
    print("FOUND", json.dumps(found))
