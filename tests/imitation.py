"""An imitation of a GPU: tensors that say they are on `cuda:0` and compute on the CPU.

    with imitation.gpu() as waits:
        x = torch.randn(8, 3).to("cuda")
        (x * 2).sum().item()
    [wait.reason for wait in waits]         # ["copy to the device", "item"]

What is imitated:

- The rule on devices: an operation on tensors of both devices raises RuntimeError, as on CUDA. A
  CPU tensor without dimensions may join a pointwise operation; CPU indices may index.
- Every wait of the host for the device, in order, with the functions that led to it: reading a
  number (`item`, `bool`, `tolist`, `equal`), sizes that depend on numbers (`nonzero`, a mask as
  an index), and copies, unless pinned memory is sent with non_blocking.
- A fused optimizer takes gradients and buffers of its parameters' strides alone.
- A CPU generator draws nothing on the device, and numpy takes no tensor from there.
- A CUDA graph repeats operations alone, on the tensors that they had; to wait in one is an error.

Numbers are the CPU's to the bit, since each operation runs there; mixed precision is the CPU's too.
Not imitated: kernels, their time and memory, streams, errors that come late, several devices,
gradients through a copy between devices, operations that change a shape in place, torch.compile,
and inference mode (it is no_grad here). Of the waits inside of torch's operations those are known
that WAITS lists.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import autoaugment
from lib import augment, data, replay

CUDA = torch.device("cuda", 0)
ROOT = str(Path(__file__).resolve().parents[1])
# Operations of which the host has to know a number, or the number of results.
WAITS = {"_local_scalar_dense": "item"} | {name: name for name in (
    "equal", "nonzero", "masked_select", "bincount", "repeat_interleave", "_unique2", "unique_dim",
    "unique_consecutive",
)}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
TO_DEVICE, TO_HOST = "copy to the device", "copy to the host"


class Wait(NamedTuple):
    """A wait of the host for the device."""

    reason: str
    path: tuple[str, ...]  # our functions that led to it, "lib/engine.py fit", the innermost last
    line: int  # in the innermost

    @property
    def place(self) -> str:
        """The innermost of our functions."""
        return self.path[-1]


_waits: list[Wait] = []
# What a graph that is being recorded holds: (operation, its arguments, its results).
_recording: list[tuple] | None = None


def _wait(reason: str) -> None:
    """Record a wait at the place where the program is."""
    if _recording is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
    path, line, frame = [], None, sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "site-packages" not in file and file != __file__:
            function = frame.f_code.co_qualname.split(".<locals>")[0]  # around lambdas and loops
            path.insert(0, f"{file[len(ROOT) + 1 :]} {function}")
            line = line or frame.f_lineno
        frame = frame.f_back
    _waits.append(Wait(reason, tuple(path), line))


class DeviceTensor(Tensor):
    """A tensor on the imitated device; `numbers` is the CPU tensor that holds what it contains.

    For torch's C++ code it is a CPU tensor without memory, so autograd, autocast and the choice of
    algorithms are the CPU's. Each operation that it is given to comes to `__torch_dispatch__`.
    """

    device = property(lambda self: CUDA)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="cpu",
        )  # fmt: skip
        self.numbers = numbers.detach()
        return self

    def __repr__(self) -> str:
        return f"DeviceTensor({self.numbers})"

    def __tensor_flatten__(self):  # these two: nn.Module.to then replaces whole parameters
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return DeviceTensor(inner["numbers"])

    def __reduce_ex__(self, protocol):  # torch.save
        _wait(TO_HOST)
        return self.numbers.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = {}  # each tensor that the operation gets, by the id of the one that holds it

        def numbers(x: Tensor) -> Tensor:
            inner = x.numbers if isinstance(x, cls) else x
            given[id(inner)] = x
            return inner

        inner_args = _map(numbers, args)
        inner_kwargs = {key: _map(numbers, value) for key, value in kwargs.items()}
        _refuse_generator(kwargs)
        _check(func, name, args, [x for x in given.values() if not isinstance(x, cls)])
        out = func(*inner_args, **inner_kwargs)
        # What an operation changes in place it returns: that stays the same tensor.
        out = _map(lambda x: given[id(x)] if id(x) in given else cls(x), out)
        if _recording is not None:
            _recording.append((func, args, kwargs, out))
        return out


def _map(function, x):
    """Call a function with every tensor in x: a tensor, something else, or a list or tuple."""
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(_map(function, part) for part in x) if isinstance(x, list | tuple) else x


def _check(func, name: str, args: tuple, on_cpu: list[Tensor]) -> None:
    """Raise RuntimeError where CUDA would; record what an operation waits for."""
    if name in WAITS:
        _wait(WAITS[name])
    if name == "copy_":
        if on_cpu:
            _wait_for_copy(*args)
        return
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if isinstance(args[0], DeviceTensor):
            for _ in range(sum(not isinstance(x, DeviceTensor) for x in indices)):
                _wait(TO_DEVICE)
            values = [x for x in args[2:3] if not isinstance(x, DeviceTensor)]
            on_cpu, numbers = [x for x in values if x.ndim], [x for x in values if not x.ndim]
            if numbers and all(x.dtype == torch.bool for x in indices):
                return  # CUDA fills by the mask, with the number as it is
            for _ in numbers:
                _wait(TO_DEVICE)
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _wait("mask as an index")
    if any(x.ndim or not (name in INDEXING or torch.Tag.pointwise in func.tags) for x in on_cpu):
        raise RuntimeError(f"{func}: tensors on more than one device, {CUDA} and cpu")
    if name.startswith("_fused_"):
        parameters, *others = [a for a in args if isinstance(a, list | tuple) and a]
        for p, x in [pair for other in others for pair in zip(parameters, other, strict=True)]:
            strides = zip(p.shape, p.stride(), x.stride(), strict=False)  # a step has no strides
            if any(size > 1 and a != b for size, a, b in strides):
                raise RuntimeError(
                    f"{name}: a parameter of shape {tuple(p.shape)} has strides {p.stride()}, "
                    f"its gradient or buffer {x.stride()}"
                )


def _wait_for_copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    """Record the wait for a copy between the devices, if it waits."""
    if not isinstance(target, DeviceTensor):
        _wait(TO_HOST)
    elif not (non_blocking and getattr(source, "pinned", False)):
        _wait(TO_DEVICE)


def _refuse_generator(options: dict) -> None:
    if options.get("generator") is not None:
        raise RuntimeError(f"expected a generator on the device {CUDA}, not a CPU generator")


def record(step, inputs: list[Tensor]):
    """What lib.replay.record does. Here a recording does the step: the first replay does nothing
    more."""
    global _recording
    operations = _recording = []
    try:
        step(*inputs)
    finally:
        _recording = None
    replays = itertools.count()

    def replay() -> None:
        if next(replays) == 0:
            return
        for func, args, kwargs, kept in operations:
            new = DeviceTensor.__torch_dispatch__(func, (), args, kwargs)
            for old, x in zip(_tensors(kept), _tensors(new), strict=True):
                old.numbers = x.numbers

    return replay


def _tensors(x) -> list[Tensor]:
    """The tensors in x, in order."""
    found = []
    _map(found.append, x)
    return found


def _is_cuda(device) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _to(x: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
    """Tensor.to, from either device to either."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    target = x
    if _is_cuda(device) and not isinstance(x, DeviceTensor):
        target = DeviceTensor(x.detach().clone())
    elif device is not None and not _is_cuda(device) and isinstance(x, DeviceTensor):
        target = x.numbers.clone()
    if target is not x:
        _wait_for_copy(target, x, non_blocking)
    return Tensor.to(
        target, dtype=dtype or x.dtype, copy=copy, memory_format=layout or torch.preserve_format
    )


class _Requests(TorchFunctionMode):
    """Answers the calls that name a device, and those that C++ code would answer past us."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], DeviceTensor) else None
        if func is Tensor.to and any(
            isinstance(a, DeviceTensor) or _is_cuda(a) for a in (*args, *kwargs.values())
        ):
            return _to(*args, **kwargs)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if x is not None and func is Tensor.cpu:
            return _to(x, "cpu")
        if x is not None and func is Tensor.tolist:
            _wait("tolist")
            return x.numbers.tolist()
        if x is not None and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"numpy cannot read a tensor on the device {CUDA}")
        if _is_cuda(kwargs.get("device")) or (x is not None and func is Tensor.new_tensor):
            _refuse_generator(kwargs)
            if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
                _wait(TO_DEVICE)
            made = func(*args, **kwargs | {"device": "cpu"})
            return made if isinstance(made, DeviceTensor) else DeviceTensor(made)
        return func(*args, **kwargs)


_groups_of = torch.optim.Optimizer._group_tensors_by_device_and_dtype


def _groups(lists: list[list], with_indices: bool = False) -> dict:
    """How an optimizer groups tensors; C++ code would say that all are the CPU's."""
    return {
        (CUDA if isinstance(group[0][0][0], DeviceTensor) else device, dtype): group
        for (device, dtype), group in _groups_of(lists, with_indices).items()
    }


def _forget_constants() -> None:
    """Empty the caches of the constants that our functions leave on a device."""
    for module in (augment, autoaugment, data):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@contextlib.contextmanager
def gpu() -> Iterator[list[Wait]]:
    """Context manager: the device is there; yields the list that its waits are appended to."""
    autocast, no_context = torch.autocast, contextlib.nullcontext()
    _waits.clear()
    with contextlib.ExitStack() as contexts:
        for module, name, function in (
            (torch, "autocast", lambda _, *args, **options: autocast("cpu", *args, **options)),
            (torch.cuda, "is_bf16_supported", lambda **_: True),
            (torch.cuda, "get_device_name", lambda *_: "imitation"),
            (replay, "record", record),
            (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", _groups),
            # A tensor with Python code of its own cannot be an inference tensor.
            (torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else no_context),
        ):
            contexts.enter_context(mock.patch.object(module, name, function))
        _forget_constants()
        contexts.callback(_forget_constants)
        contexts.enter_context(_Requests())
        yield _waits
