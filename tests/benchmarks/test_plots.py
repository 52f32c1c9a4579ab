"""Figures of rows: which appear, and that each says on what and when it was measured."""

import pytest
from matplotlib.colors import to_rgb

from tinybert_fast.benchmarks import plots, runner, table

GPU = "NVIDIA H100 80GB HBM3"


def row(**cells):
    found = dict.fromkeys(table.COLUMNS)
    found |= {
        "suite": "ops", "case": "attention_d26", "provider": "ours", "role": "ours", "pass": "both",
        "dtype": "bf16", "batch": 32, "width": 128, "median_ms": 0.2, "speedup_a": 2.5, "gpu": GPU,
        "cpu": "EPYC", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789ab",
        "date": "2026-11-26T00:00:00Z", "matmul_gflops": 8e5, "copy_gbytes": 3000.0,
    }  # fmt: skip
    return {**found, **cells}


ROWS = [
    row(provider="eager", role="a", median_ms=0.5, speedup_a=1.0, tflops=20.0, gbytes_per_s=100.0),
    row(tflops=50.0, gbytes_per_s=250.0),
    *(row(suite="memory", case="memory", width=n, peak_mib=n / 8) for n in (128, 256, 512)),
]


def words(figure):
    axes = figure.axes
    texts = [figure.get_suptitle(), *(t.get_text() for a in axes for t in a.texts)]
    return " ".join([*texts, *(a.get_xlabel() + a.get_ylabel() for a in axes)])


@pytest.mark.parametrize(
    ("figure_of", "unit"),
    [(plots.bars, "0.2 ms"), (plots.memory, "MiB"), (plots.roofline, "TFLOP/s")],
)
def test_each_figure_stands_alone(figure_of, unit):
    said = words(figure_of(ROWS))
    for word in (GPU, "2026-11-26", "torch 2.11.0", "0123456789ab", unit):
        assert word in said


def test_figures_without_rows_are_not_drawn(tmp_path):
    assert [file.name for file in plots.draw(ROWS, tmp_path / "all")] == [
        "bars.png", "memory.png", "roofline.png",
    ]  # fmt: skip
    assert all(file.stat().st_size > 1000 for file in (tmp_path / "all").iterdir())
    assert [file.name for file in plots.draw([row()], tmp_path / "few")] == ["bars.png"]
    assert plots.draw([], tmp_path / "none") == []
    assert [file.name for file in plots.draw([row()], tmp_path / "named", "epyc")] == [
        "bars-epyc.png"
    ]


def test_graphs_are_shown_only_where_all_have_one():
    group = [
        row(provider="eager", role="a", graph_ms=0.4, graph_speedup_a=1.0),
        row(graph_ms=0.1, graph_speedup_a=4.0),
    ]
    assert "4.00x, 0.1 ms (graph)" in words(plots.bars(group))
    assert "2.50x, 0.2 ms" in words(plots.bars([group[0], row()]))


def test_without_a_the_bars_are_beside_b_or_the_first():
    careful = row(provider="careful", role="b", median_ms=0.4, speedup_a=None, speedup_b=1.0)
    fast = row(speedup_a=None, speedup_b=2.0)
    figure = plots.bars([careful, fast])
    assert "1.00x, 0.4 ms" in words(figure)
    assert "2.00x, 0.2 ms" in words(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["attention_d26 B=32 N=128 bf16, against careful: careful", "ours"]
    alone = [row(provider=name, role=name, median_ms=ms, speedup_a=None)
             for name, ms in (("flash", 0.6), ("flex", 0.3))]  # fmt: skip
    assert "2.00x, 0.3 ms" in words(plots.bars(alone))


def test_a_provider_and_its_graph_share_a_colour_and_nobody_else_has_it():
    ours = [row(provider=name, role="ours") for name in ("ours", "ours cached")]
    others = [
        row(provider="eager", role="a"), row(provider="compile", role="b"),
        *(row(provider=name, role=name) for name in
          ("flash", "efficient", "cudnn", "flash varlen", "flex", "xformers", "liger", "cce",
           "textbrewer", "careful compile")),
    ]  # fmt: skip
    colours = [to_rgb(plots.colour_of(one)) for one in (*ours, *others)]
    assert len(set(colours)) == len(colours)
    assert [blue == max(red, green, blue) and blue > red for red, green, blue in colours] == [
        *[True] * len(ours), *[False] * len(others),
    ]  # fmt: skip
    for name, role in (("ours", "ours"), ("careful", "b")):
        plain, graph = row(provider=name, role=role), captured(name)
        assert plots.colour_of(graph) == plots.colour_of(plain)
        assert plots.label_of(graph) == f"{plots.label_of(plain)}, as a CUDA graph"
        assert plots.line_of(graph)["marker"] == plots.line_of(plain)["marker"]
        assert plots.line_of(graph)["markerfacecolor"] == "white"


def captured(name, **cells):
    return row(provider=f"{name} graph", role=f"{name} graph", **cells)


def test_bars_of_graphs_are_hatched():
    figure = plots.bars([row(provider="careful", role="b"), captured("careful"), row()])
    bars = figure.axes[0].patches
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False]
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[2].get_facecolor()
    (legend,) = figure.legends
    assert [bool(patch.get_hatch()) for patch in legend.get_patches()] == [False, True, False]


@pytest.mark.parametrize(
    ("figure_of", "suite"), [(plots.memory, "memory"), (plots.scaling, "scaling")]
)
def test_a_dtype_has_a_line_of_its_own(figure_of, suite):
    rows = [
        one(width=width, suite=suite, dtype=dtype, peak_mib=width, tokens_per_s=width,
            valid_fraction=1.0)
        for width in (128, 256) for dtype in ("fp32", "bf16")
        for one in (row, lambda **cells: captured("careful", **cells))
    ]  # fmt: skip
    lines = {line.get_label(): line for line in figure_of(rows).axes[0].lines}
    found = {label: (to_rgb(line.get_color()), line.get_linestyle())
             for label, line in lines.items()}  # fmt: skip
    blue, orange = to_rgb("tab:blue"), to_rgb("tab:orange")
    assert found == {
        "ours fp32": (blue, "--"), "ours bf16": (blue, "-"),
        "careful graph fp32": (orange, "--"), "careful graph bf16": (orange, "-"),
    }  # fmt: skip


def test_memory_of_a_fixed_length_is_against_the_batch():
    rows = [row(suite="memory", case="of_batch", batch=b, peak_mib=b) for b in (1, 2, 4)]
    (axes,) = plots.memory(rows).axes
    assert axes.get_xlabel() == "batch B (sequences)"
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2, 4]]


MOVES = [
    row(case="layer_norm_d312", provider="eager", role="a", tflops=0.0, gbytes_per_s=1500.0),
    row(case="layer_norm_d312", tflops=0.0, gbytes_per_s=2700.0),
]


def test_ops_without_products_are_beside_a_copy():
    figure = plots.roofline([*ROWS, *MOVES])
    _, key, moves = figure.axes
    assert [text.get_text() for text in key.texts] == ["1  attention_d26 B=32 N=128 bf16"]
    assert [label.get_text() for label in moves.get_yticklabels()] == [
        "layer_norm_d312 B=32 N=128 bf16: eager", "ours",
    ]  # fmt: skip
    assert [bar.get_width() for bar in moves.patches] == [1500.0, 2700.0]
    assert [text.get_text().strip() for text in moves.texts] == [
        "1,500 GB/s, 50% of a copy", "2,700 GB/s, 90% of a copy",
    ]  # fmt: skip
    ceilings = [line.get_segments()[0][:, 0].tolist() for line in moves.collections]
    assert ceilings == [[3000.0, 3000.0]] * 2
    (alone,) = plots.roofline(MOVES).axes
    assert len(alone.patches) == 2


def test_a_roofline_names_cases_in_its_key_alone():
    figure = plots.roofline(ROWS)
    axes, key = figure.axes
    assert [text.get_text() for text in axes.texts] == ["1"]
    assert [text.get_text() for text in key.texts] == ["1  attention_d26 B=32 N=128 bf16"]


def test_rows_read_back_are_the_rows(tmp_path):
    table.CsvFile(tmp_path / "rows.csv").write(ROWS)
    assert plots.read(tmp_path / "rows.csv") == ROWS
    table.write_json(tmp_path / "rows.json", "ops", ROWS)
    assert plots.read(tmp_path / "rows.json") == ROWS


def test_bench_draws(tmp_path):
    runner.run_suite(
        "ops", cases=["hidden_mse_d312"], smoke=True, threads=1, rounds=1, plots_path=tmp_path
    )
    assert (tmp_path / "bars.png").exists()


def scaling_rows():
    points = [(16, 128, 0.6), (8, 128, 0.6), (4, 512, 0.6), (16, 128, 1.0), (16, 128, 0.3)]
    return [
        row(
            suite="scaling", case="mlm_step", provider=provider, role=role, batch=batch,
            width=width, valid_fraction=real + 0.004, tokens_per_s=1000.0 * width,
        )
        for batch, width, real in points
        for provider, role in (("careful", "b"), ("ours", "ours"))
    ]  # fmt: skip


def test_scaling_varies_one_thing_in_each_panel(tmp_path):
    rows = scaling_rows()
    figure = plots.scaling(rows)
    for word in (GPU, "2026-11-26", "tokens per second", "N=128, 60% real", "B N=2,048"):
        assert word in words(figure)
    found = [[line.get_xdata().tolist() for line in axes.lines] for axes in figure.axes]
    assert found == [[[8, 16]] * 2, [[128, 512]] * 2, [[0.3, 0.6, 1.0]] * 2]
    assert [file.name for file in plots.draw(rows, tmp_path)] == ["scaling.png"]
