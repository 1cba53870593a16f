"""CPU tensors that say they are on cuda:0: they raise where real ones would, and log what waits.

    with pretend_cuda():
        reproduce.main(["--device", "cuda", ...])     # image workers off
    log.most_common()                                 # (what waited for the "GPU", where): count

A copy to the host that was not waited for is NaN until somebody waits. No kernel runs, and autocast
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
from torch.utils._pytree import tree_leaves

CUDA, log = torch.device("cuda", 0), collections.Counter()
copies = []  # (tensor on the host, what it will hold) that nobody has waited for
WAITS = {
    Tensor.item,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.tolist,
    Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    torch.allclose,
}
ROOMS = [Path(__file__).resolve().parents[1] / name for name in ("", "kit")]
as_plain = torch._C.DisableTorchFunctionSubclass


def note(what: str) -> None:
    """Log it at the function of the project that did it."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in ROOMS]
    log[what, frames[-1].name if frames else ""] += 1


def on_gpu(out):
    with as_plain():
        return out.as_subclass(OnGPU) if isinstance(out, Tensor) else out


class OnGPU(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, of = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if of in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            return {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}[of]
        if function in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is Tensor.cpu:
            return move((args[0], "cpu"), kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        mixed = len({isinstance(t, OnGPU) for t in given if isinstance(t, OnGPU) or t.dim()}) == 2
        if mixed and name not in ("__get__", "is_same_size") and name[:5] != "_has_":
            if function in (Tensor.copy_, Tensor.__getitem__):
                note("copy, or index from the host")
            elif of not in (Tensor.data, Tensor.grad):
                raise RuntimeError(f"{name}: tensors on at least two devices, cuda:0 and cpu!")
        if function in WAITS:
            note(name)
        out = super().__torch_function__(function, types, args, kwargs)
        return on_gpu(out) if of is Tensor.grad else out


def move(args, kwargs):  # Tensor.to
    tensor, *rest = args
    target, later = kwargs.pop("device", None), kwargs.get("non_blocking")
    for i, one in enumerate(rest):
        if isinstance(one, (str, torch.device, Tensor)):
            target = one.device if isinstance(one, Tensor) else one
            rest[i] = one.dtype if isinstance(one, Tensor) else "cpu"
    here = isinstance(tensor, OnGPU)
    there = here if target is None else torch.device(target).type == "cuda"
    with as_plain():
        plain = tensor.as_subclass(Tensor)
        out = plain.to(*rest, **kwargs, **({"copy": True} if there != here else {}))
        if there != here:
            note(f"to the {'GPU' if there else 'host'}" + ", later" * bool(later))
        if here and not there and later:
            copies.append((out, out.clone()))
            out.fill_(float("nan"))
    return tensor if out is plain else on_gpu(out) if there else out


class Event:
    """torch.cuda.Event"""

    def record(self):
        self.arriving, copies[:] = copies[:], []

    @torch.inference_mode()
    def synchronize(self):
        note("synchronize")
        for tensor, value in self.arriving:
            tensor.copy_(value)


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.to:
            return move(args, kwargs)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return on_gpu(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretend_cuda():
    answers = {
        "is_available": True,
        "device_count": 1,
        "is_bf16_supported": True,
        "get_device_name": "a pretended GPU",
    }
    answers |= dict.fromkeys(("_lazy_init", "manual_seed_all", "synchronize"))
    answers["is_current_stream_capturing"] = False
    answers = {name: lambda *of, value=value, **more: value for name, value in answers.items()}
    with (
        mock.patch.multiple(torch.cuda, Event=Event, **answers),
        mock.patch.object(
            torch,
            "autocast",
            lambda kind, dtype, enabled, real=torch.autocast: real(
                "cpu", torch.bfloat16, enabled=enabled
            ),
        ),
        mock.patch.object(
            torch.optim.Optimizer,
            "_accelerator_graph_capture_health_check",
            lambda self: None,
            create=True,
        ),  # of some versions
        mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True),
        Mode(),
    ):
        yield
