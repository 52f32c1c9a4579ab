"""tinybert-fast validate"""

import contextlib
import math
import os
import time
from typing import Annotated, Any

import typer

from tinybert_fast.cli import options, output
from tinybert_fast.cli.options import HOW

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast validate\n\n"
    "tinybert-fast validate --interpret --op attention\n\n"
    "tinybert-fast validate --jobs 8\n\n"
    "tinybert-fast validate --model path/to/bert\n\n"
    "The budget of a tensor is twice the error of the reference in the same dtype, plus a "
    "rounding. Exit code 1 if any tensor is over its budget."
)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(validate)


def validate(
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this operator; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A checkpoint instead of operators: accelerated against Transformers' own code.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="fp32, fp16 or bf16; may be repeated. A checkpoint takes fp32 and bf16 by "
            "default, interpreted fp32.",
        ),
    ] = None,
    interpret: Annotated[
        bool,
        typer.Option(
            "--interpret",
            help="Run Triton kernels in Triton's interpreter, on the CPU: slow, no GPU needed.",
            rich_help_panel=HOW,
        ),
    ] = False,
    impl: options.Impl = "auto",
    jobs: Annotated[
        int,
        typer.Option(
            help="Processes that share the operators' calls: kernels compile side by side.",
            rich_help_panel=HOW,
        ),
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Start no check after this; exit code 1 if any is left.", rich_help_panel=HOW
        ),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Check every operator against fp64: values and all gradients, error beside budget."""
    unknown = sorted(set(dtype or ()) - set(DTYPES))
    if unknown:
        raise ValueError(f"--dtype {unknown[0]!r} is not one of {', '.join(DTYPES)}")
    if model is not None and op:
        raise ValueError("--op chooses operators and --model a checkpoint: give one of them")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1 is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes}: more than 0 are needed")
    if model is not None and jobs > 1:
        raise ValueError("--jobs shares out operators; a checkpoint (--model) takes one process")
    if impl == "reference" and model is None:
        raise ValueError("--impl reference: that is what the others are held against")
    # Both are read when the operators are imported, and reach every layer of a checkpoint.
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        impl = "triton" if impl == "auto" and model is not None else impl
    if model is not None and impl != "auto":
        os.environ["TINYBERT_FAST_IMPL"] = impl
    start = time.perf_counter()
    device = _device(interpret, impl, model)
    if model is None:
        made = _operators(op or [], device, dtype, impl, jobs)
    else:
        made = _checkpoint(model, device, dtype or (["fp32"] if interpret else None))
    findings, whole = [], True
    with contextlib.closing(made):  # ends the processes
        for finding in _shown(made):
            findings.append(finding)
            if minutes is not None and time.perf_counter() - start > 60 * minutes:
                whole = False
                break
    if not findings:
        raise ValueError("no implementation serves these operators and dtypes here: see info")
    failed = [finding for finding in findings if not finding.passed]
    _show(findings, failed)
    if model is None and impl == "auto":
        _show_absent(findings)
    facts = _facts(findings, device, time.perf_counter() - start)
    facts["passed"] &= whole
    output.write_json("validate", {"whole": whole, **facts}, json_file)
    if not whole:
        output.say(f"stopped after {minutes} minutes: the calls behind these were not checked")
    if failed or not whole:
        raise typer.Exit(1)


def _device(interpret: bool, impl: str, model: str | None) -> str:
    """Where to run; ValueError for an implementation that cannot run here."""
    import torch

    from tinybert_fast.ops import dispatch

    if interpret and not dispatch.INTERPRETED:
        raise ValueError("--interpret comes too late in this process; set TRITON_INTERPRET=1")
    if impl not in ("auto", *dispatch.FASTEST_FIRST):
        raise ValueError(f"--impl {impl!r} is not one of auto, {', '.join(dispatch.FASTEST_FIRST)}")
    for name in {impl, "triton" if interpret else impl} - {"auto"}:
        reason = dispatch.absent(name)
        if reason is not None:
            raise ValueError(f"{name} cannot be validated here: {reason}")
    if model is not None and impl != "auto" and dispatch.FROM_ENVIRONMENT.get("") != impl:
        raise ValueError(f"--impl comes too late in this process; set TINYBERT_FAST_IMPL={impl}")
    return "cuda" if torch.cuda.is_available() and not dispatch.INTERPRETED else "cpu"


def _operators(ops: list[str], device: str, dtypes: list[str] | None, impl: str, jobs: int) -> Any:
    from tinybert_fast.testing.validation import validate

    wanted = _wanted(dtypes)
    if impl != "auto":
        wanted["impls"] = [impl]
    return validate(ops, device, jobs=jobs, **wanted)


def _checkpoint(path: str, device: str, dtypes: list[str] | None) -> Any:
    from tinybert_fast.testing.checkpoint import validate_checkpoint
    from tinybert_fast.training.loading import load_saved

    return validate_checkpoint(load_saved(path), device, **_wanted(dtypes))


def _wanted(dtypes: list[str] | None) -> dict[str, Any]:
    import torch

    return {"dtypes": [getattr(torch, DTYPES[name]) for name in dtypes]} if dtypes else {}


def _shown(findings: Any) -> Any:
    """The findings, each named on stderr while the next one is computed."""
    from rich.console import Console

    with Console(stderr=True).status("validating") as status:
        for finding in findings:
            status.update(f"{finding.op} {finding.impl} {finding.dtype}: {finding.call}")
            yield finding


def _show(findings: list[Any], failed: list[Any]) -> None:
    """A row per operator, implementation and dtype, with the tensor closest to its budget."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for finding in findings:
        groups.setdefault((finding.op, finding.impl, finding.dtype), []).append(finding)
    rows = []
    for names, group in groups.items():
        tensors = sum(len(finding.tensors) for finding in group)
        found = [finding for finding in group if finding.worst is not None]
        top = max(found, key=lambda finding: finding.worst.share, default=None)
        worst = top.worst if top else None
        rows.append(
            (
                *names,
                len(group),
                tensors,
                f"{worst.error:.1e}" if worst else "",
                f"{worst.budget:.1e}" if worst else "",
                f"{worst.share:.0%}" if worst else "",
                f"{worst.name} of {top.call}" if top and worst else "",
                "ok" if all(finding.passed for finding in group) else "FAILED",
            )
        )
    head = (
        "operator",
        "impl",
        "dtype",
        "calls",
        "tensors",
        "error",
        "budget",
        "used",
        "closest to its budget",
    )
    output.show((*head, ""), rows)
    for finding in failed:
        over = [str(tensor) for tensor in finding.tensors if not tensor.passed]
        what = finding.problem or "; ".join(over)
        output.say(f"{finding.op} {finding.impl} {finding.dtype}, {finding.call}: {what}")
    count = sum(len(finding.tensors) for finding in findings)
    output.say(
        f"{count:,} tensors of {len(findings):,} calls checked against fp64: "
        + (f"{len(failed):,} calls FAILED" if failed else "all within their budgets")
    )


def _show_absent(findings: list[Any]) -> None:
    """What was not checked, and why: nobody should take silence for a proof."""
    from tinybert_fast.ops import dispatch

    for name in dispatch.FASTEST_FIRST:
        reason = dispatch.absent(name)
        if reason is not None:
            output.say(f"not checked: {name} ({reason})")
    if any(finding.impl == "torch" for finding in findings):
        output.say("not checked: torch with dropout (it draws other cells than the reference)")


def _facts(findings: list[Any], device: str, seconds: float) -> dict[str, Any]:
    import torch

    from tinybert_fast.benchmarks.hardware import facts

    return {
        "machine": facts(torch.device(device)),
        "seconds": round(seconds, 1),
        "passed": all(finding.passed for finding in findings),
        "findings": [
            {
                "op": finding.op,
                "impl": finding.impl,
                "dtype": finding.dtype,
                "call": finding.call,
                "passed": finding.passed,
                "problem": finding.problem,
                "tensors": [
                    {"name": x.name, "error": _number(x.error), "budget": _number(x.budget)}
                    for x in finding.tensors
                ],
            }
            for finding in findings
        ],
    }


def _number(x: float) -> float | str:
    """JSON has no NaN."""
    return x if math.isfinite(x) else str(x)
