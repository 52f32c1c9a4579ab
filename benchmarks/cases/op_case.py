"""What the cases of single ops share: sizes, passes, work, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    DTYPES,
    OURS,
    REFERENCE,
    Case,
    Check,
    Setup,
    Work,
)
from tinybert_fast.benchmarks.op_call import BehindLinear, OpCall, passes

TOKENS, GPU_TOKENS, SMOKE_TOKENS = 4096, 65536, 64  # of ops on rows: B N
WIDTH, SMOKE_WIDTH = 128, 16
CPU_CALLS = 5  # of ops that take about a millisecond there
PHASES = ("forward", "backward", "both")
GPU_CALLS = 10  # in a row, for one measurement: a launch takes longer than many a kernel
FEW_CALLS = 3  # where plain PyTorch takes 10 ms and more
SAME = "the inputs that are timed"

WorkOf = Callable[[str, int], Work]  # of a pass, with numbers of so many bytes


def op_case(
    name: str,
    setup: Setup,
    batch: int,
    width: int,
    providers: list[Any],
    work: WorkOf,
    *,
    valid_tokens: int | None = None,
    dropout: float = 0.0,
    what: str = SAME,
    optional: tuple[str, ...] = (),
    phases: tuple[str, ...] = PHASES,
    captured: tuple[str, ...] = PHASES,
    cpu_calls: int = 1,
    gpu_calls: int = GPU_CALLS,
    rounding: float = 0.0,
) -> Iterator[Case]:
    """One case per pass, those of ``captured`` as a CUDA graph too. Every provider is held to the
    first one, but for ``rounding`` (Check). The last is ours; the same op by its reference is put
    behind it."""
    if setup.reference:
        providers = [*providers, providers[-1].by(REFERENCE)]
    first, *others = (provider.name for provider in providers)
    calls = gpu_calls if setup.on_gpu else cpu_calls
    case = Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=batch * width if valid_tokens is None else valid_tokens,
        dropout=dropout,
        optimizer="none",
        providers=providers,
        checks=(Check(what, first, tuple(others), rounding),),
        calls=1 if setup.smoke else calls,
        optional=optional,
    )
    for one in passes(case, *phases):
        yield replace(one, work=partial(_by_dtype, work, one.phase), captured=one.phase in captured)


def row_case(
    name: str,
    setup: Setup,
    eager: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    operands: tuple[Tensor, ...],
    trained: int,
    work: WorkOf,
    *,
    dropout: float | None = None,
    others: dict[str, Callable[..., Tensor]] | None = None,
    behind_linear: bool = False,
) -> Iterator[Case]:
    """An op on rows: eager PyTorch (a), the same compiled (b), ``others`` by name, and ours.

    ``behind_linear``: the second operand is the bias of the linear layer before it, which is no
    operand of ``eager``. As it comes the layer's product adds it (`BehindLinear`); Inductor takes
    it out of the product, into what it makes of the rest.
    """
    batch, width = batch_of(setup)
    calls: dict[str, tuple[str, Callable[..., Tensor]]] = {"eager": (BASELINE, eager)}
    if not setup.smoke:
        calls["compile"] = (CAREFUL, compiled(with_bias(eager) if behind_linear else eager))
    calls |= {other: (other, op) for other, op in (others or {}).items()}
    optional = tuple(calls)[1:]
    calls["ours"] = (OURS, ours)
    yield from op_case(
        name,
        setup,
        batch,
        width,
        [
            (BehindLinear if behind_linear and role == BASELINE else OpCall)(
                provider, role, op, operands, trained, dropout
            )
            for provider, (role, op) in calls.items()
        ],
        work,
        dropout=dropout or 0.0,
        optional=optional,
        cpu_calls=CPU_CALLS,
    )


def with_bias(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, bias: Tensor, *others: Tensor, **how: Any) -> Tensor:
        return op(x + bias, *others, **how)

    return call


def batch_of(setup: Setup) -> tuple[int, int]:
    """B, N."""
    if setup.smoke:
        return SMOKE_TOKENS // SMOKE_WIDTH, SMOKE_WIDTH
    return (GPU_TOKENS if setup.on_gpu else TOKENS) // WIDTH, WIDTH


def _by_dtype(work: WorkOf, phase: str, dtype: str) -> Work:
    return work(phase, DTYPES[dtype].itemsize)


def loss_phases(setup: Setup) -> tuple[str, ...]:
    """Who computes gradients in the forward, as a loss may, has no backward worth a CPU's time."""
    return PHASES if setup.on_gpu else ("both",)


def sum_of(phase: str, forward: Work, backward: Work) -> Work:
    """Of an op whose two passes are apart: other ops run between them."""
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[phase]


def loss_work(phase: str, flops: tuple[float, float], read: float, written: float) -> Work:
    """Of a loss, which may compute its gradients at once: ``both`` reads its operands once.
    ``flops`` of forward and backward; bytes of operands and gradients."""
    alone = {"forward": flops[0], "backward": flops[1], "both": sum(flops)}
    return Work(alone[phase], read + (0 if phase == "forward" else written))


def normal(setup: Setup) -> Callable[..., Tensor]:
    """``draw(*shape)``: seeded normal numbers, drawn where they are used."""
    generator = torch.Generator(setup.device).manual_seed(setup.seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=setup.device)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile, at the first call, for each shape anew."""
    import torch._dynamo
    import torch._functorch.config

    # What earlier cases compiled counts towards the limit above which Dynamo runs eagerly.
    torch._dynamo.reset()
    # A backward that is timed by itself runs again and again on what one forward saved.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def has_kernels(setup: Setup, package: str) -> bool:
    """Whether a package of GPU kernels is here and has a GPU to run on."""
    return setup.on_gpu and find_spec(package) is not None
