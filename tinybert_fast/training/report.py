"""What a run leaves for a human: Markdown tables and one picture of its curves."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curve = list[tuple[float, float]]  # (step, value)
Panels = dict[str, dict[str, Curve]]  # panel title -> curve name -> curve

HIDDEN = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")
PANEL_INCHES = (6.0, 3.6)


def panels_of(log_history: Iterable[Mapping[str, Any]]) -> Panels:
    """Trainer's log as panels: training losses, dev loss, dev metrics, learning rate."""
    panels: Panels = {"training loss": {}, "dev loss": {}, "dev metrics": {}, "learning rate": {}}
    for entry in log_history:
        for name, value in entry.items():
            if not isinstance(value, int | float) or name.endswith(HIDDEN):
                continue
            if name == "eval_loss":
                panel, curve = "dev loss", "loss"
            elif name.startswith("eval_"):
                panel, curve = "dev metrics", name.removeprefix("eval_")
            elif name == "learning_rate":
                panel, curve = "learning rate", name
            elif (
                name.endswith("loss") and name != "train_loss"
            ):  # train_loss: the mean of the run, no curve
                panel, curve = "training loss", name
            else:
                continue
            panels[panel].setdefault(curve, []).append((entry["step"], value))
    return {title: curves for title, curves in panels.items() if curves}


def plot(panels: Panels) -> bytes | None:
    """The panels side by side as a PNG; None without curves or without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)  # off screen, whatever backend the process has chosen
    for at, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, at)
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name, marker="." if len(points) < 40 else None)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with four digits, numbers aligned right by the reader's renderer."""
    lines = [
        _row(header),
        _row(["---"] * len(header)),
        *(_row([_cell(v) for v in row]) for row in rows),
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
