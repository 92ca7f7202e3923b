"""A pretend accelerator for tests without one: tensors that say they are on `cuda:0` and compute on the CPU.

As on a real one, tensors of different devices cannot be mixed, except where CUDA allows it; random generators serve
their own device only; and numpy() is refused. On `mps` there is no float64. Autocast, streams, kernels and vmap are not
pretended. Inside `accelerator()` everything that takes a device knows the pretended ones, in this thread and in those
that it starts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _device

PLAIN_GENERATOR = torch.Generator

# Operators that move a CPU tensor of any size themselves: copies, and (but for their own values) lookups.
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_"}
_LOOKUPS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# Operators that are not pointwise and take a 0-dimensional CPU tensor as a scalar.
_TAKE_SCALARS = {"aten::fill_", "aten::fill", "aten::index_fill", "aten::index_fill_", "aten::masked_fill_"}


class DeviceMismatch(RuntimeError):
    """Tensors or generators of different devices in one operation."""


class DeviceTensor(Tensor):
    """A tensor on a pretended device; `inner` holds its values on the CPU."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> "DeviceTensor":
        if place.type == "mps" and inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        tensor = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        tensor.inner, tensor.place = inner, place
        return tensor

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"{self.inner!r} on {self.place}"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = DeviceTensor(self.inner.clone(), self.place).requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        place = _common_place(func, args, tensors)
        out = func(*_unwrapped(args), **{name: _unwrapped(value) for name, value in kwargs.items()})
        if func._schema.name in _COPIES and not isinstance(args[0], DeviceTensor):
            return out
        if not func._schema.is_mutable:
            return _on(out, place)
        wrappers = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
        for tensor in wrappers.values():
            assert tensor.inner.shape == tensor.shape, f"{func} changes a shape in place, which is not pretended"
        return wrappers.get(id(out), out)


def _common_place(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation. DeviceMismatch if its tensors are on several, unless CUDA allows that."""
    name = func._schema.name
    places = {tensor.place for tensor in tensors if isinstance(tensor, DeviceTensor)}
    if name in _COPIES:
        return args[0].device if isinstance(args[0], DeviceTensor) else places.pop()
    strict = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if name in _LOOKUPS and isinstance(args[0], DeviceTensor):
        indices = {id(index) for index in args[1]}
        strict = [tensor for tensor in strict if id(tensor) not in indices]
    if torch.Tag.pointwise in func.tags or name in _TAKE_SCALARS or name in _LOOKUPS:
        strict = [tensor for tensor in strict if tensor.dim()]
    if len(places) + bool(strict) > 1:
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise DeviceMismatch(f"{name}: expected all tensors to be on the same device, but found {found}")
    return places.pop()


class Generator(PLAIN_GENERATOR):
    """A random generator that remembers its device."""

    place: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        generator = PLAIN_GENERATOR.__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]
        generator.place = _as_device(device)
        return generator

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """The device is set by `__new__`."""

    @property
    def device(self) -> torch.device:
        return self.place


class _Move(torch.autograd.Function):
    """A tensor on another device; its gradient goes back to where it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = tensor.device
        return _on(_unwrapped(tensor.detach()).clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _on(_unwrapped(grad), ctx.device), None


class PretendDevices(TorchFunctionMode):
    """Carries out device arguments, `.to()`, `.cuda()` and `.cpu()`, and checks the device of generators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _moved(func, *args, **kwargs)
        if func is torch._C._nn._parse_to:  # pyright: ignore[reportAttributeAccessIssue]  (arguments of `Module.to`)
            return func(*args, **kwargs)
        if func is Tensor.backward:  # it may repeat forward passes
            with self:
                return torch.autograd.backward(args[0])
        first = next(_tensors(args), None)
        is_copy = func in (torch.tensor, torch.as_tensor)
        given = kwargs.get("device")
        if given is None and func in _device._device_constructors():
            given = _device.CURRENT_DEVICE  # of `with torch.device(...)`
        if given is not None:
            place = _as_device(given)
        elif first is None or (is_copy and args[0] is not first):
            place = torch.device("cpu")
        else:
            place = first.device
        if "generator" in kwargs:
            _check_generator(func, kwargs["generator"], place)
        if given is not None or is_copy:
            kwargs = kwargs | {"device": place if place.type == "meta" else "cpu"}
            return _on(func(*_unwrapped(args), **kwargs), place)
        out = func(*args, **kwargs)
        # Operators in C++ that make a new tensor make it on the CPU.
        return _on(out, place) if type(out) is Tensor and place.type != "cpu" and out is not first else out


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if func is not Tensor.to:
        device = "cpu" if func is Tensor.cpu else device or torch.device("cuda", 0)
    else:
        for value in args:
            if isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device) or type(value) is int:
                device = value
    out = tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
    if device is None or (place := _as_device(device)) == tensor.device:
        return out.clone() if kwargs.get("copy") and out is tensor else out
    moved: Any = out.to(place) if place.type == "meta" else _Move.apply(out, place)
    return moved


def _as_device(value: Any) -> torch.device:
    """A device from its name or number; an accelerator without a number is the first one."""
    if isinstance(value, int):
        return torch.device(torch.accelerator.current_accelerator().type, value)  # pyright: ignore[reportOptionalMemberAccess]
    device = torch.device(value)
    return torch.device(device.type, 0) if device.index is None and device.type not in ("cpu", "meta") else device


def _check_generator(func: Any, generator: Any, device: torch.device) -> None:
    if generator is not None and generator.device != device:
        raise DeviceMismatch(f"{func.__name__}: expected a generator of {device}, but found one of {generator.device}")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _unwrapped(value: Any) -> Any:
    """A value, or a list of values, with the plain tensors of those on a pretended device."""
    if isinstance(value, DeviceTensor):
        return value.inner
    return type(value)(map(_unwrapped, value)) if type(value) in (list, tuple) else value


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of tensors, on a device."""
    if isinstance(value, Tensor):
        return value if device.type in ("cpu", "meta") else DeviceTensor(value, device)
    return type(value)(_on(each, device) for each in value) if type(value) in (list, tuple) else value


@contextmanager
def accelerator(kind: str = "cuda", *, memory: tuple[int, ...] = (1 << 40,)) -> Iterator[None]:
    """Inside, this machine has accelerators of a kind, one for each entry of `memory`, their free bytes."""
    machine = SimpleNamespace(
        current_accelerator=lambda check_available=False: torch.device(kind),
        device_count=lambda: len(memory),
        is_available=lambda: True,
        current_stream=lambda: SimpleNamespace(is_capturing=lambda: False),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"), lambda: 0),
    )
    plain_run = Thread.run

    def run(thread: Thread) -> None:
        with PretendDevices():
            plain_run(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Thread, "run", run)
        patch.setattr(torch, "accelerator", machine)
        properties = {
            "mem_get_info": lambda index=0: (memory[index], memory[index] + (2 << 30)),
            "device_count": lambda: len(memory),
        }
        properties |= dict.fromkeys(
            ("current_device", "memory_reserved", "memory_allocated", "set_device", "get_device_properties"),
            lambda index=0: 0,
        )
        for name, function in properties.items() if kind == "cuda" else ():
            patch.setattr(torch.cuda, name, function)
        # Wrappers have no inference mode: a view of a plain tensor would be an inference tensor.
        patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # tied weights stay tied
        patch.setattr(torch, "Generator", Generator)
        with PretendDevices():
            yield
