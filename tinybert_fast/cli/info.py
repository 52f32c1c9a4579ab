"""tinybert-fast info"""

from typing import Any

import typer

from tinybert_fast.cli import options, output

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast info\n\n"
    "TINYBERT_FAST_IMPL=attention=reference tinybert-fast info"
)
MEANING = {
    "reference": "the definition in plain PyTorch",
    "torch": "tuned PyTorch",
    "native": "the compiled C++/CUDA module",
    "triton": "Triton kernels",
}


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(info)


def info(json_file: options.Json = None) -> None:
    """Show what runs on this machine: each operator, each implementation, and why not."""
    found = _facts()
    output.show(("", "this machine"), found["machine"].items())
    names = tuple(MEANING)
    rows = []
    for op, of in found["ops"].items():
        cells = ["yes" if of[name]["runs"] else "no" for name in names]
        rows.append((op, *cells, of["auto"] or "nothing"))
    output.show(("operator", *names, "auto takes"), rows)
    reasons: dict[str, list[str]] = {}
    for op, of in found["ops"].items():
        for name in names:
            if of[name]["why_not"]:
                reasons.setdefault(f"{name} ({MEANING[name]}): {of[name]['why_not']}", []).append(
                    op
                )
    for reason, ops in reasons.items():
        everywhere = len(ops) == len(rows)
        output.say(f"no {reason}" + ("" if everywhere else f" [{', '.join(ops)}]"))
    for of in found["ops"].values():
        if of["auto_why_not"]:
            output.say(of["auto_why_not"])
    if found["chosen"]:
        output.say(f"TINYBERT_FAST_IMPL: {found['chosen']}")
    output.write_json("info", found, json_file)


def _facts() -> dict[str, Any]:
    import torch

    import tinybert_fast.ops  # noqa: F401  registers every operator
    from tinybert_fast.benchmarks.hardware import facts
    from tinybert_fast.ops import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = torch.empty(1, device=device)
    ops: dict[str, Any] = {}
    for op, limits in sorted(dispatch.OPS.items()):
        dtypes = limits.reference.dtypes
        operand = probe if probe.dtype in dtypes else probe.to(dtypes[0])
        ops[op] = {name: _state(limits, name, operand) for name in MEANING}
        ops[op]["auto"], ops[op]["auto_why_not"] = dispatch.automatic(limits, operand)
    machine = {k: v for k, v in facts(device).items() if k not in ("commit", "date")}
    return {"machine": machine, "ops": ops, "chosen": dispatch.FROM_ENVIRONMENT}


def _state(limits: Any, name: str, probe: Any) -> dict[str, Any]:
    written = getattr(limits, name) is not None
    why = limits.refusal(name, probe, {}) if written else "not written for this operator"
    return {"runs": why is None, "why_not": why}
