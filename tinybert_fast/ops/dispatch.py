"""The only place that chooses an implementation of an op.

Order: an explicit ``impl=``, then the environment variable ``TINYBERT_FAST_IMPL`` (``triton``, or
per op ``attention=triton,layer_norm=torch``; a bare name applies to the ops that have it), then
``auto``: the fastest implementation that can serve the call. A named implementation runs or raises
ValueError with the reason. ``impl=("triton", "reference")`` names forward and backward separately.

    reference  the definition, plain PyTorch, any float dtype
    torch      tuned PyTorch, any device
    native     the compiled C++/CUDA module
    triton     Triton kernels, NVIDIA GPUs (or the CPU under TRITON_INTERPRET=1)

Precision follows the operands alone: matrix products run in the dtype of the first operand;
statistics, softmax and sums in fp32 or wider. Autocast does not reach inside an op; ``hidden_mse``
and ``linear_cross_entropy``, which multiply by a parameter, take their first operand in autocast's
dtype, as ``F.linear`` does.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tinybert_fast.reference.philox import threshold

FASTEST_FIRST = ("triton", "native", "torch", "reference")
# Triton kernels run on the CPU, slowly. These are the words that Triton takes for yes.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
NAMESPACE = "tinybert_fast"

# What "auto" looks at, in this order: nobody is served fastest by the interpreter.
AUTOMATIC = tuple(name for name in FASTEST_FIRST if not (name == "triton" and INTERPRETED))
TRITON_DEVICES = ("cpu",) if INTERPRETED else ("cuda",)

Impl = str | tuple[str, str]
P = ParamSpec("P")
T = TypeVar("T")


def _probe() -> dict[str, str | None]:
    """Each implementation -> why this process cannot run it, or None."""
    why: dict[str, str | None] = dict.fromkeys(FASTEST_FIRST)
    if find_spec("tinybert_fast._native") is None:
        why["native"] = (
            "the compiled module tinybert_fast._native is not installed (its build needs GCC 9 or "
            "newer, or clang)"
        )
    if find_spec("triton") is None:
        why["triton"] = "the package triton is not installed"
    elif torch.version.hip is not None:
        why["triton"] = "the kernels are written for NVIDIA's GPUs, and this torch is for AMD's"
    elif not torch.cuda.is_available() and not INTERPRETED:
        why["triton"] = "no CUDA device (TRITON_INTERPRET=1 runs kernels on the CPU, slowly)"
    return why


def _lacking(impl: str, limit: Limit, gpu: torch.device) -> str | None:
    """Why a GPU is none for an implementation; asked when a tensor on it comes by, since looking at
    a GPU would take it from processes that are forked later.
    """
    if impl == "native":
        return _not_built_for(gpu)
    return (_too_old(gpu) if impl == "triton" else None) or limit.lacks(gpu)


@cache
def _too_old(device: torch.device) -> str | None:
    """Tiles are chosen for the registers and the shared memory of an sm_80."""
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"kernels need an sm_80 or newer; this GPU is an sm_{major}{minor}"


@cache
def _not_built_for(device: torch.device) -> str | None:
    """Why the compiled module cannot run on this GPU."""
    built_for = import_module("tinybert_fast._native").cuda_architectures.split()
    major, minor = torch.cuda.get_device_capability(device)
    if str(major) in {arch[:-1] for arch in built_for}:  # a binary runs on all minors of its major
        return None
    known = f"for sm_{', sm_'.join(built_for)}" if built_for else "without CUDA"
    return f"the compiled module was built {known}; this GPU is sm_{major}{minor}"


def _parse(setting: str) -> dict[str, str]:
    """``a=triton,native`` -> {"a": "triton", "": "native"}."""
    chosen = {}
    for part in filter(None, (piece.strip() for piece in setting.split(","))):
        op, _, name = part.rpartition("=")
        if name not in (*FASTEST_FIRST, "auto"):
            raise ValueError(
                f"TINYBERT_FAST_IMPL={setting!r}: {name!r} is not one of "
                f"{', '.join((*FASTEST_FIRST, 'auto'))}"
            )
        chosen[op] = name
    return chosen


UNAVAILABLE = _probe()
NATIVE_DEVICES = ("cpu", "cuda")
FROM_ENVIRONMENT = _parse(os.environ.get("TINYBERT_FAST_IMPL", ""))
OPS: dict[str, Limits] = {}
FORMULAS: dict[str, Callable[..., int]] = {}  # of operators that count_flops() has yet to register
# Types of arguments that need no dispatch. Fake tensors, say, are none of them.
TENSORS = {Tensor, Parameter}
PLAIN = {*TENSORS, list, str, int, float, bool, type(None), torch.dtype}


def check_environment() -> None:
    """ValueError for an op that does not exist in ``TINYBERT_FAST_IMPL``; after all are defined."""
    unknown = sorted(set(FROM_ENVIRONMENT) - {"", *OPS})
    if unknown:
        raise ValueError(
            f"TINYBERT_FAST_IMPL names an op {unknown[0]!r}, which is not one of "
            f"{', '.join(sorted(OPS))}"
        )


@dataclass(frozen=True)
class Limit:
    """What one implementation of one op accepts; ``refuses(**facts)`` gives a reason or None, and
    ``lacks(gpu)`` why a GPU is none for it.
    """

    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    refuses: Callable[..., str | None] = field(default=lambda **facts: None)
    lacks: Callable[[torch.device], str | None] = field(default=lambda gpu: None)


@dataclass(frozen=True)
class Limits:
    """The implementations that an op has, each with its limit."""

    op: str
    torch: Limit | None
    native: Limit | None = None
    triton: Limit | None = None
    reference: Limit = Limit(FLOATS_AND_DOUBLE, ("cpu", "cuda", "meta"))

    def __post_init__(self) -> None:
        OPS[self.op] = self

    def refusal(self, impl: str, tensor: Tensor, facts: dict[str, Any]) -> str | None:
        """Why ``impl`` cannot serve a call whose first operand is ``tensor``."""
        limit = getattr(self, impl)
        if limit is None:
            return f"{self.op} has no {impl} implementation"
        if UNAVAILABLE[impl] is not None:
            return UNAVAILABLE[impl]
        # While torch.compile traces, nobody looks at a GPU; a module built for others fails aloud.
        asked = tensor.is_cuda and "cuda" in limit.devices and not torch.compiler.is_compiling()
        reason = _lacking(impl, limit, tensor.device) if asked else None
        if reason is not None:
            return reason
        if tensor.dtype not in limit.dtypes:
            return f"dtype {tensor.dtype} is not one of {', '.join(map(str, limit.dtypes))}"
        if impl == "triton" and INTERPRETED and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bf16 wrongly; it serves fp16 and fp32"
        if tensor.device.type not in limit.devices:
            return f"device {tensor.device.type} is not one of {', '.join(limit.devices)}"
        return limit.refuses(**facts)


def choose(impl: Impl, limits: Limits, tensor: Tensor, **facts: Any) -> tuple[str, str]:
    """The implementations of (forward, backward) for this call."""
    if not isinstance(impl, str):
        if not isinstance(impl, (tuple, list)) or len(impl) != 2:
            raise ValueError(
                f"{limits.op}: impl={impl!r} must be one name or a (forward, backward) pair"
            )
        forward, backward = (_choose_one(name, limits, tensor, facts) for name in impl)
        _check_pair(limits.op, impl, forward, backward)
        if forward == "torch" != backward and facts.get("dropout_p", 0.0) > 0.0:
            raise ValueError(
                f"{limits.op}: impl={impl!r} at dropout_p={facts['dropout_p']}: the torch forward "
                "draws another mask than the reference's gradient; use dropout_p=0"
            )
        return forward, backward
    one = _choose_one(impl, limits, tensor, facts)
    return one, one


def _check_pair(who: str, impl: Impl, forward: str, backward: str) -> None:
    if backward not in (forward, "reference"):
        raise ValueError(
            f"{who}: impl={impl!r} pairs forward {forward!r} with backward {backward!r}; the "
            f"backward must be {forward!r} or 'reference'"
        )


def check_impl(who: str, impl: Any, ops: Iterable[str]) -> None:
    """ValueError for an ``impl`` with which one of ``ops`` could serve no call in this process."""
    names = (impl, impl) if isinstance(impl, str) else impl
    known = ("auto", *FASTEST_FIRST)
    pair = isinstance(names, (tuple, list)) and len(names) == 2
    if not pair or any(name not in known for name in names):
        raise ValueError(
            f"{who}: impl={impl!r} is not one of {', '.join(known)}, nor a (forward, backward) "
            "pair of them"
        )
    if "auto" not in names:
        _check_pair(who, impl, *names)
    for name in (name for name in names if name != "auto"):
        if UNAVAILABLE[name] is not None:
            raise ValueError(f"{who}: impl={impl!r} cannot run here: {UNAVAILABLE[name]}")
        lacking = [op for op in ops if getattr(OPS[op], name) is None]
        if lacking:
            raise ValueError(
                f"{who}: impl={impl!r} cannot serve this model: no {name} implementation of "
                f"{', '.join(lacking)}. TINYBERT_FAST_IMPL={name} names it for the ops that have it"
            )


def absent(impl: str) -> str | None:
    """Why no op can run ``impl`` in this process, or None."""
    if UNAVAILABLE[impl] is None and all(getattr(op, impl) is None for op in OPS.values()):
        return f"no op has a {impl} implementation"
    return UNAVAILABLE[impl]


def automatic(limits: Limits, tensor: Tensor) -> tuple[str | None, str | None]:
    """What ``impl="auto"`` takes here for operands like ``tensor``; or None and why it raises."""
    try:
        return _choose_one("auto", limits, tensor, {}), None
    except ValueError as error:
        return None, str(error)


def _choose_one(impl: str, limits: Limits, tensor: Tensor, facts: dict[str, Any]) -> str:
    if impl == "auto":
        named = FROM_ENVIRONMENT.get(limits.op)
        bare = FROM_ENVIRONMENT.get("")
        if named is None and bare not in (None, "auto") and getattr(limits, bare) is not None:
            named = bare
        impl = named or "auto"
    if impl == "auto":
        for name in AUTOMATIC:
            if limits.refusal(name, tensor, facts) is None:
                return name
        reasons = "; ".join(f"{n}: {limits.refusal(n, tensor, facts)}" for n in AUTOMATIC)
        raise ValueError(f"{limits.op}: no implementation can serve this call ({reasons})")
    if impl not in FASTEST_FIRST:
        raise ValueError(
            f"{limits.op}: impl={impl!r} is not one of auto, {', '.join(FASTEST_FIRST)}"
        )
    reason = limits.refusal(impl, tensor, facts)
    if reason is not None:
        raise ValueError(f"{limits.op}: impl={impl!r} cannot serve this call: {reason}")
    return impl


def define(
    schema: str,
    *,
    fake: Callable,
    fake_knows_impl: bool = False,
    sparing: tuple[str, ...] | None = None,
    flops: Callable[..., int] | None = None,
    **implementations: str,
) -> Callable:
    """Register ``schema`` (its last argument, ``str impl``, is added here) and return its function.

    Called eagerly on plain tensors it runs the implementation at once: PyTorch's dispatcher takes
    longer than some of them. Whoever traces, profiles or intercepts sees the operator. The
    dispatcher also resolves tensors whose memory holds their negative, as ``z.conj().imag``.

    Args:
        schema: ``name(Tensor x, ...) -> (...)`` as torch.library takes it.
        fake: shapes and dtypes of the outputs, from the same arguments without ``impl``.
        fake_knows_impl: ``fake`` takes ``impl`` too, last: not every implementation fills every
            output.
        sparing: ``bool[] wanted`` is added behind the schema's arguments, one for each of the last
            outputs: what is not wanted is returned empty. These implementations take it too, last,
            and spare the work.
        flops: of its matrix products, two for a multiplication and its sum, from all arguments but
            ``impl``; what masks and directions leave out counts, as in PyTorch's own formulas.
        implementations: name -> "module:function", imported when first executed.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.partition(") ->")
    if sparing is not None:
        arguments += ", bool[] wanted"
    torch.library.define(f"{NAMESPACE}::{name}", f"({arguments}, str impl) ->{returns}")

    places = {impl: place.split(":") for impl, place in implementations.items()}

    def run(*args):
        *operands, impl = args
        wanted = () if sparing is None else operands[-1]
        if sparing is not None and impl not in sparing:
            operands.pop()
        module, function = places[impl]
        with torch.cuda.device_of(operands[0]):  # Triton launches on the current device
            found = without_autocast(getattr(_module(module), function), *operands)
            return _without_unwanted(found, wanted)

    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd", run)

    @torch.library.register_fake(f"{NAMESPACE}::{name}")
    def run_fake(*args):
        *operands, impl = args
        wanted = () if sparing is None else operands.pop()
        found = fake(*operands, impl) if fake_knows_impl else fake(*operands)
        return _without_unwanted(found, wanted)

    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    if flops is not None:
        FORMULAS[name] = lambda *args, out_val=None: flops(*args[:-1])

    def call(*args):
        plain = PLAIN.issuperset(map(type, args)) and not _watched()
        if plain and not any(map(Tensor.is_neg, [x for x in args if type(x) in TENSORS])):
            return run(*args)
        return registered(*args)

    return call


def count_flops() -> None:
    """Give the operators' formulas to PyTorch's FlopCounterMode, to those made from now on.

    Importing ``tinybert_fast.integrations`` does it, and ``tinybert_fast.ops`` behind PyTorch's
    counter, which imports triton.
    """
    register = import_module("torch.utils.flop_counter").register_flop_formula
    while FORMULAS:
        name, formula = FORMULAS.popitem()
        register(getattr(getattr(torch.ops, NAMESPACE), name), get_raw=True)(formula)


_module = cache(import_module)


def _without_unwanted(found: Any, wanted: Sequence[bool]) -> Any:
    if all(wanted):
        return found
    kept = len(found) - len(wanted)
    last = zip(found[kept:], wanted, strict=True)
    return *found[:kept], *(x if want else x.new_empty(0) for x, want in last)


def apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``function.apply(*operands)``, which takes longer than some forwards, or where nobody wants a
    gradient its forward alone. ValueError under a transform of torch.func.
    """
    recorded = torch.is_grad_enabled() and any(
        x.requires_grad for x in operands if isinstance(x, Tensor)
    )
    if recorded or forward_ad._current_level >= 0 or _watched():
        if not torch.compiler.is_compiling() and _transformed():
            raise ValueError(
                "torch.func (grad, vmap, jvp, functionalize) transforms the reference alone, which "
                'is plain PyTorch: give the op, or accelerate(), impl="reference"'
            )
        return function.apply(*operands)
    return function.forward(_Unrecorded(len(operands)), *operands)


class _Unrecorded:
    """The context of a forward whose backward will not come."""

    def __init__(self, operands: int):
        self.needs_input_grad = (False,) * operands

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing is kept, nor is anything asked of gradients."""

    set_materialize_grads = mark_non_differentiable = save_for_backward


def wanted_gradients(*operands: Any) -> list[bool]:
    """Of which operands autograd wants a gradient just now."""
    recording = torch.is_grad_enabled()
    return [recording and isinstance(x, Tensor) and x.requires_grad for x in operands]


def _watched() -> bool:
    """Whether somebody compiles, traces, transforms, profiles or intercepts calls just now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or _transformed()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def without_autocast(function: Callable, *operands: Any) -> Any:
    """``function(*operands)`` with autocast off on the device of the first operand."""
    device = operands[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*operands)
    if torch.compiler.is_compiling():
        with torch.autocast(device, enabled=False):
            return function(*operands)
    torch.set_autocast_enabled(device, False)  # the context manager takes longer than a launch
    try:
        return function(*operands)
    finally:
        torch.set_autocast_enabled(device, True)


def outliving(make: Callable[P, T]) -> Callable[P, T]:
    """``make``, for what is kept from one call to the next: outside of inference mode, whose
    tensors no backward may save. Compiled code, which cannot ask for the mode, stays in it.
    """

    @wraps(make)
    def made(*args: P.args, **named: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return make(*args, **named)
        with torch.inference_mode(False):
            return make(*args, **named)

    return made


def autocast(x: Tensor) -> Tensor:
    """``x`` as ``F.linear`` takes it: in autocast's dtype where autocast is on."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def reference_gradient(
    reference: Callable, operands: tuple, needs: tuple[bool, ...], *upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradient of ``reference(*operands)`` by autograd, for the operands that need one."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_() if need else x
            for x, need in zip(operands, needs, strict=True)
        ]
        wanted = [x for x, need in zip(leaves, needs, strict=True) if need]

        def gradient(*leaves: Any) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(reference(*leaves), wanted, upstream, allow_unused=True)

        found = iter(without_autocast(gradient, *leaves))
    return tuple(next(found) if need else None for need in needs)


def check_dropout(
    op: str, dropout_p: float, seed: Tensor | None, site: int, device: torch.device
) -> None:
    """ValueError unless the rate fits 8 bits, the site 32, and a seed on ``device`` comes along,
    whose two numbers are neighbours, as kernels read them.
    """
    if dropout_p == 0.0:
        return
    threshold(dropout_p)
    integer(op, "site", site, 0, 2**32 - 1)
    if seed is None or (seed.dtype, seed.shape, seed.stride()) != (torch.int64, (2,), (1,)):
        got = "None"
        if seed is not None:
            got = f"{seed.dtype} {tuple(seed.shape)} of strides {seed.stride()}"
        raise ValueError(
            f"{op}: dropout_p={dropout_p} needs seed, a contiguous int64 tensor of shape (2,); got "
            f"{got}"
        )
    check_devices(op, device, seed=seed)


def integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    """``value`` as a Python integer, or ValueError unless it is one from ``low`` to ``high``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise ValueError(f"{op}: {name}={value!r}; expected an integer from {low} to {high}")
    return number


def check_devices(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """ValueError unless every tensor given is on ``device``, that of the first operand."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(
                f"{op}: {name} is on {x.device}, the first operand on {device}; move one of them"
            )
