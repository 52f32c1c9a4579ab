"""What every op proves besides its values: gradient, contract, compilation, pairing, memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tinybert_fast.ops import dispatch
from tinybert_fast.testing.operands import Case


def implementations(op: str) -> list[str]:
    """Every implementation of ``op`` that this process can run, except the reference."""
    limits = dispatch.OPS[op]
    return [
        name
        for name in dispatch.FASTEST_FIRST
        if name != "reference"
        and getattr(limits, name) is not None
        and dispatch.UNAVAILABLE[name] is None
    ]


def serves(op: str, impl: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether ``impl`` of ``op`` takes operands of ``dtype`` here."""
    return dispatch.OPS[op].refusal(impl, torch.empty(0, dtype=dtype, device=device), {}) is None


def prove_gradient(case: Case, impl: dispatch.Impl) -> None:
    """Analytic gradients equal numeric ones; ``case`` is small, and taken in fp64, which ``impl``
    must serve: what does not is held against the reference's gradient.

    An implementation that drops cells replays them at a fixed seed, so dropout is no exception.
    """
    case = case.to(torch.float64)
    torch.autograd.gradcheck(case.function(impl), tuple(case.leaves()))


def prove_contract(case: Case, impl: dispatch.Impl) -> None:
    """``torch.library.opcheck`` of each registered operator that the call and its gradient run."""
    with _Recorder() as recorder:
        case.run(impl)
    if not recorder.calls:
        raise AssertionError(f"{case.op.__name__} impl={impl!r} runs no registered operator")
    for operator, arguments in recorder.calls:
        torch.library.opcheck(operator, arguments)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this package's registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == dispatch.NAMESPACE:
            copies = (x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
            self.calls.append((func, tuple(copies)))
        return func(*args, **(kwargs or {}))


class OwnCalls(TorchDispatchMode):
    """Counts the calls of this package's registered operators in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == dispatch.NAMESPACE
        return func(*args, **(kwargs or {}))


def prove_compiles(case: Case, impl: dispatch.Impl, **options: Any) -> None:
    """The call compiles as one graph, gradient included, and gives what eager gives."""
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager", **options}
    whole = case.run(impl, wrap=lambda f: torch.compile(f, **options))
    torch.testing.assert_close(whole, case.run(impl), rtol=0.0, atol=0.0, equal_nan=True)


def prove_pair(case: Case, impl: str) -> None:
    """``impl=(impl, "reference")`` gives the value of ``impl`` and the reference's gradients."""
    paired, fast, reference = (case.run(i) for i in ((impl, "reference"), impl, "reference"))
    want = {**reference, "value": fast["value"]}
    torch.testing.assert_close(paired, want, rtol=0.0, atol=0.0)


def prove_accumulates(
    case: Case, impl: dispatch.Impl, wrap: Callable[[Callable], Callable] = lambda f: f
) -> None:
    """Two backwards add up in the leaves, which keep the first one's gradients as they were handed
    to them: no two may be one memory.
    """
    leaves = [x.detach().clone().requires_grad_() for x in case.leaves()]
    function = wrap(case.function(impl))
    once = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for times in (1, 2):
        function(*leaves).square().sum().backward()
        found = [x.grad for x in leaves]
        torch.testing.assert_close(found, [times * g for g in once])


STOPPED = 3  # how such a process ends
_CALL = f"""
import ctypes, os, sys
import torch
from tinybert_fast import ops
from tinybert_fast.testing import operands
try:
    exec(sys.argv[1])
except RuntimeError as error:  # of whoever meets the stopped device first
    print(error)
try:
    torch.cuda.synchronize()
except torch.AcceleratorError as error:
    print(error, flush=True)
    ctypes.CDLL(None).fflush(None)  # what the device printed; the context's end may abort
    os._exit({STOPPED})
"""


def prove_stops_the_device(call: str, message: str) -> None:
    """Code that launches on a GPU what traps or asserts there: it prints ``message``, and CUDA
    reports an error. In a process of its own, since it can use the GPU no more.
    """
    command = [sys.executable, "-c", _CALL, call]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    said = ended.stdout + ended.stderr
    if ended.returncode != STOPPED or message not in said:
        raise AssertionError(
            f"{call} ended with {ended.returncode}; expected {STOPPED}, a CUDA error, and "
            f"{message!r} in what it says:\n{said}"
        )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at a time in the block, inside registered operators too.

    ``peak`` includes what is alive before, from its first use in the block on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == dispatch.NAMESPACE:
            with self:  # a mode is off while it handles a call
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive:
            self._alive.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size
