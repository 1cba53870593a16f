"""CPU tensors that say they are on cuda:0: they raise where real ones would, and log what waits.

    with pretend_cuda():
        reproduce.main(["--device", "cuda", ...])     # image workers off
    log.most_common()                                 # (what waited for the "GPU", where): how often

At the level of __torch_function__, so with autograd and inference mode. No kernel runs, and autocast
is the CPU's: what a real GPU computes is not shown.
"""
import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA, log = torch.device("cuda", 0), collections.Counter()
WAITS = {Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.tolist,
         Tensor.nonzero, torch.nonzero, torch.equal, torch.allclose}
ROOT = Path(__file__).resolve().parent.parent


def note(what: str) -> None:
    """Log it at the line of the project that did it."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = Path(frame.filename)
        if path.parent in (ROOT, ROOT / "kit"):
            log[what, f"{path.name}:{frame.name}"] += 1
            return


def tensors(of):
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, (tuple, list, dict)):
        for one in of.values() if isinstance(of, dict) else of:
            yield from tensors(one)


def is_cuda(device) -> bool:
    known = isinstance(device, (str, int, torch.device)) and not isinstance(device, bool)
    return known and torch.device(device).type == "cuda"


class OnGPU(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, of = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if of in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            return {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}[of]
        if function in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function in (Tensor.to, Tensor.cpu):
            return move(args if function is Tensor.to else (args[0], "cpu"), kwargs)
        given = list(tensors((args, kwargs)))
        other = [t for t in given if not isinstance(t, OnGPU) and t.dim() > 0]
        mine = any(isinstance(t, OnGPU) for t in given)
        if other and mine and name not in ("__get__", "is_same_size") and name[:5] != "_has_":
            if function in (Tensor.copy_, Tensor.__getitem__):
                note("copy, or index from the host")
            elif of not in (Tensor.data, Tensor.grad):
                raise RuntimeError(f"{name}: tensors on at least two devices, cuda:0 and cpu!")
        if function in WAITS:
            note(name)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        out = super().__torch_function__(function, types, args, kwargs)
        if of is Tensor.grad and isinstance(out, Tensor) and not isinstance(out, OnGPU):
            with torch._C.DisableTorchFunctionSubclass():
                out = out.as_subclass(OnGPU)
        return out


def move(args, kwargs):
    """Tensor.to"""
    tensor, rest = args[0], list(args[1:])
    target = kwargs.get("device")
    for i, one in enumerate(rest):
        if isinstance(one, (str, torch.device, Tensor)):
            target = one.device if isinstance(one, Tensor) else one
            rest[i] = one.dtype if isinstance(one, Tensor) else "cpu"
    kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
    here = isinstance(tensor, OnGPU)
    there = here if target is None else is_cuda(target)
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.as_subclass(Tensor)
        out = plain.to(*rest, **({**kwargs, "copy": True} if there != here else kwargs))
        if there != here:
            note("to the GPU" if there else "to the host")
        if out is plain:
            return tensor
        return out.as_subclass(OnGPU) if there else out


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.to and not isinstance(args[0], OnGPU):
            if is_cuda(kwargs.get("device")) or any(
                    isinstance(one, OnGPU) or is_cuda(one) for one in args[1:]):
                return move(args, kwargs)
        elif is_cuda(kwargs.get("device")):
            out = function(*args, **{**kwargs, "device": "cpu"})
            with torch._C.DisableTorchFunctionSubclass():
                return out.as_subclass(OnGPU) if isinstance(out, Tensor) else out
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretend_cuda():
    autocast, patch = torch.autocast, mock.patch.object
    with contextlib.ExitStack() as stack:
        for name, value in {
            "is_available": True, "device_count": 1, "is_bf16_supported": True, "_lazy_init": None,
            "is_current_stream_capturing": False, "manual_seed_all": None, "synchronize": None,
        }.items():
            stack.enter_context(patch(torch.cuda, name, lambda *of, value=value, **more: value))
        stack.enter_context(patch(torch, "autocast", lambda kind, dtype=None, enabled=True: autocast(
            "cpu", torch.bfloat16, enabled=enabled)))
        name = "_accelerator_graph_capture_health_check"  # of some versions' optimizers
        stack.enter_context(patch(torch.optim.Optimizer, name, lambda self: None, create=True))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Mode())
        yield
