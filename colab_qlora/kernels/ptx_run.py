"""Run PTX on the GPU that is here: what Triton made for a T4, on any newer NVIDIA GPU.

PTX for one compute capability runs on all later ones: the driver compiles it when it is loaded. So
the code that a T4 would get can be executed, and its numbers checked, on a GPU that is not a T4.
Neither the T4's machine code nor its speed is tested that way.

How Triton 3.6 and 3.7 call a kernel (`make_launcher` in backends/nvidia/driver.py of 3.6, and
`launchKernel` in driver.c of 3.7):

- the kernel's arguments in the order of its signature, less the constexprs, among which a launch
  counts every None and, unless told not to specialise it, every integer 1;
- then always two pointers, to global scratch and to profile scratch: null if the kernel uses none;
- blocks of 32 * num_warps threads, with `metadata.shared` bytes of dynamic shared memory.

The PTX itself lists its parameters, and Triton's code names its threads, so that a launch that does
not fit is refused before it could write anywhere.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from colab_qlora.errors import UserError

# global scratch and profile scratch
HIDDEN_POINTERS = 2

# what a block gets without asking for more, on every GPU
DEFAULT_SHARED_BYTES = 48 * 1024

# from cuda.h
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_JIT_ERROR_LOG_BUFFER = 5
_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6
_ERROR_LOG_BYTES = 8192

_HANDLE = ctypes.c_void_p
_OUT_HANDLE = ctypes.POINTER(ctypes.c_void_p)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)
# argument types of the functions of libcuda; every one returns a CUresult
DRIVER_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuModuleLoadDataEx": (
        *(_OUT_HANDLE, ctypes.c_char_p),
        *(ctypes.c_uint, ctypes.POINTER(ctypes.c_int), _POINTERS),
    ),
    "cuModuleGetFunction": (_OUT_HANDLE, _HANDLE, ctypes.c_char_p),
    "cuFuncSetAttribute": (_HANDLE, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (_HANDLE, *[ctypes.c_uint] * 7, _HANDLE, _POINTERS, _POINTERS),
}

_INTEGERS = {
    8: (ctypes.c_int8, ctypes.c_uint8),
    16: (ctypes.c_int16, ctypes.c_uint16),
    32: (ctypes.c_int32, ctypes.c_uint32),
    64: (ctypes.c_int64, ctypes.c_uint64),
}
_FLOATS = {32: ctypes.c_float, 64: ctypes.c_double}


class Parameter(NamedTuple):
    """A parameter of a kernel: "pointer", "integer" or "float", and how wide it is."""

    kind: str
    bits: int


class Entry(NamedTuple):
    """What PTX says of a kernel.

    Attributes:
        parameters: all of them, the hidden pointers last.
        threads: of a block; None if it does not say.
        reads_scratch: True if the code reads a hidden pointer.
    """

    parameters: list[Parameter]
    threads: int | None
    reads_scratch: bool


def kernel_name(ptx: str) -> str:
    """The name of the only kernel in a PTX text.

    Raises:
        UserError: it holds no kernel, or several.
    """
    names = re.findall(r"\.entry\s+([\w$]+)", ptx)
    if len(names) != 1:
        raise UserError("PTX does not hold one kernel", got=", ".join(names) or "none", allowed=1)
    return names[0]


def read_entry(ptx: str, name: str) -> Entry:
    """What a launch of the kernel `name` has to fit.

    Raises:
        UserError: no such kernel, or a parameter that is no number and no pointer.
    """
    found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)([^{{]*)\{{", ptx)
    if found is None:
        raise UserError("PTX does not hold this kernel", got=name)
    texts = [text.strip() for text in found[1].split(",") if text.strip()]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", found[2])
    hidden_names = [text.split()[-1] for text in texts[-HIDDEN_POINTERS:]]
    used = re.compile(rf"(?<![\w$])({'|'.join(map(re.escape, hidden_names))})(?![\w$])")
    return Entry(
        [_parameter(text, name) for text in texts],
        int(threads[1]) if threads else None,
        bool(texts) and used.search(ptx, found.end()) is not None,
    )


def _parameter(text: str, name: str) -> Parameter:
    found = re.fullmatch(r"\.param\s+\.([usbf])(8|16|32|64)((?:\s+\.\w+|\s+\d+)*)\s+[\w$]+", text)
    kind = ""
    if found is not None:
        bits = int(found[2])
        kind = "float" if found[1] == "f" else "pointer" if ".ptr" in found[3] else "integer"
    if found is None or (kind == "float" and bits not in _FLOATS):
        allowed = "pointers, integers, .f32 and .f64"
        raise UserError(f"{name} has a parameter of another kind", got=text, allowed=allowed)
    return Parameter(kind, bits)


def pack(name: str, parameters: Sequence[Parameter], arguments: Sequence[Any]) -> list[Any]:
    """The values that the driver copies into a kernel's parameters, hidden pointers included.

    Args:
        name: of the kernel, for messages.
        parameters: all that the PTX lists.
        arguments: one for each but the hidden pointers: a tensor or None for a pointer, an int or
            a bool for an integer, a float for a float.

    Returns:
        ctypes values, one a parameter.

    Raises:
        UserError: another number of arguments, or one that does not fit its parameter.
    """
    own, hidden = parameters[:-HIDDEN_POINTERS], parameters[-HIDDEN_POINTERS:]
    if len(hidden) < HIDDEN_POINTERS or any(kind != "pointer" for kind, _ in hidden):
        allowed = f"{HIDDEN_POINTERS} pointers for scratch memory last, as of Triton 3.6 and 3.7"
        kinds = ", ".join(kind for kind, _ in parameters)
        raise UserError(f"{name} ends in other parameters", got=kinds or "none", allowed=allowed)
    if len(arguments) != len(own):
        allowed = f"{len(own)}, since its PTX lists {len(parameters)} with the hidden pointers"
        raise UserError(f"{name} takes other arguments", got=len(arguments), allowed=allowed)
    packed = [
        _packed(f"argument {index} of {name}", parameter, argument)
        for index, (parameter, argument) in enumerate(zip(own, arguments, strict=True))
    ]
    return packed + [ctypes.c_void_p(None) for _ in hidden]


def _packed(what: str, parameter: Parameter, argument: Any) -> Any:
    kind, bits = parameter
    if kind == "pointer" and (argument is None or isinstance(argument, torch.Tensor)):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if kind == "float" and isinstance(argument, float):
        return _FLOATS[bits](argument)
    # ctypes would cut off what does not fit
    if kind == "integer" and isinstance(argument, int) and -(1 << bits - 1) <= argument < 1 << bits:
        return _INTEGERS[bits][argument >= 0](argument)
    got = f"a {type(argument).__name__}, {str(argument)[:40]!r}"
    raise UserError(f"{what} does not fit its parameter", got=got, allowed=f"{kind}, {bits} bits")


def launch_ptx(
    ptx: str,
    name: str,
    grid: Sequence[int],
    num_warps: int,
    shared_bytes: int,
    arguments: Sequence[Any],
) -> None:
    """Launch a kernel of Triton's PTX on torch's current stream, without waiting for it.

    A loaded kernel stays loaded until the process ends.

    Args:
        ptx: for the capability of this GPU or a lower one.
        name: of the kernel, such as `kernel_name(ptx)` or Triton's `metadata.name`.
        grid: programs in one to three dimensions; with a 0 nothing is launched.
        num_warps: as the kernel was compiled.
        shared_bytes: Triton's `metadata.shared`.
        arguments: as `pack`; all tensors on one GPU. Whatever the kernel was compiled to rely on,
            such as the dtype of a tensor or a stride's being a multiple of 16, has to hold.

    Raises:
        UserError: the launch does not fit what the PTX says.
        RuntimeError: the driver refuses; with what its compiler says, if it is the PTX.
    """
    entry = read_entry(ptx, name)
    values = pack(name, entry.parameters, arguments)
    _check_launch(name, entry, grid, num_warps)
    device = _device(name, arguments)
    if 0 in grid:
        return
    addresses = [ctypes.addressof(value) for value in values]
    with torch.cuda.device(device):
        function = _load(ptx, name, device.index)
        if shared_bytes > DEFAULT_SHARED_BYTES:
            _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        _call(
            "cuLaunchKernel",
            function,
            *(*grid, 1, 1)[:3],
            *(32 * num_warps, 1, 1),
            shared_bytes,
            torch.cuda.current_stream(device).cuda_stream,
            # the driver copies the values before it returns
            (ctypes.c_void_p * len(addresses))(*addresses),
            None,
        )


def _check_launch(name: str, entry: Entry, grid: Sequence[int], num_warps: int) -> None:
    if not 1 <= len(grid) <= 3 or any(size < 0 for size in grid):
        raise UserError(
            "grid is not understood", got=tuple(grid), allowed="1 to 3 sizes, 0 or more"
        )
    if entry.threads not in (None, 32 * num_warps):
        allowed = f"{entry.threads} threads of 32 a warp"
        raise UserError(f"{name} has other warps", got=f"num_warps {num_warps}", allowed=allowed)
    if entry.reads_scratch:
        raise UserError(f"{name} reads its scratch memory, which launch_ptx does not give it")


def _device(name: str, arguments: Sequence[Any]) -> torch.device:
    devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        got = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise UserError(f"{name} takes tensors of one GPU", got=got, allowed="one CUDA device")
    return devices.pop()


def driver_ptx_version() -> int:
    """The newest PTX that the driver here can load, such as 87 for 8.7: an option of Triton's.

    Triton writes the newest that its ptxas knows, which an older driver refuses.
    """
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    return min(ptx_get_version(f"{major}.{minor}"), ptx_get_version(get_ptxas(75).version))


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError("the NVIDIA driver is not here", got=error) from error
    for name, types in DRIVER_FUNCTIONS.items():
        getattr(library, name).argtypes = types
    return library


def _call(name: str, *arguments: Any, log: Any = None) -> None:
    result = getattr(_driver(), name)(*arguments)
    if result == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(result, ctypes.byref(text))
    said = (text.value or b"unknown error").decode()
    details = log.value.decode(errors="replace").strip() if log is not None else ""
    raise RuntimeError(f"{name} failed with {result}: {said}" + (f"\n{details}" if details else ""))


@functools.cache
def _load(ptx: str, name: str, device_index: int) -> int:
    """The driver's handle of a kernel, on a device that is current."""
    # a thread has no CUDA context before its first call of the runtime
    torch.cuda.synchronize(device_index)
    log = ctypes.create_string_buffer(_ERROR_LOG_BYTES)
    options = (ctypes.c_int * 2)(_JIT_ERROR_LOG_BUFFER, _JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
    # a number is passed in the place of a pointer
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _ERROR_LOG_BYTES)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    image = (ctypes.byref(module), ptx.encode())
    _call("cuModuleLoadDataEx", *image, len(options), options, values, log=log)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    assert function.value is not None
    return function.value
