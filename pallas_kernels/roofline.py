"""The roofline plot of `pallas_kernels.bench`: FLOP/s over FLOP per byte, and shares of floors."""

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], file: Path) -> None:
    """Writes the plot. RuntimeError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib (extra `plot`)") from error
    rows = [row for row in result["rows"] if "seconds" in row]
    figure = Figure(figsize=(11, max(5.0, 1.5 + 0.16 * len(rows))), layout="constrained")
    roof, bars = figure.subplots(1, 2)
    _roof(roof, rows, result["ceilings"])
    _bars(bars, rows)
    figure.suptitle(f"{result['device']}, JAX {result['jax']}, {result['date']}")
    figure.savefig(file, dpi=120)


def _roof(axes: Any, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
    """Operations that compute, below what memory and the matrix units allow."""
    bandwidth = max(ceilings["copy"], ceilings["read"])
    x = [10 ** (i / 20) for i in range(-20, 81)]
    axes.loglog(x, [min(bandwidth * i, ceilings["matmul"]) / 1e12 for i in x], color="black")
    for backend in sorted({row["backend"] for row in rows}):
        own = [row for row in rows if row["backend"] == backend and row["flops"]]
        intensity = [row["flops"] / row["bytes"] for row in own]
        rate = [row["flops"] / row["seconds"] / 1e12 for row in own]
        axes.loglog(intensity, rate, "o", markersize=4, label=backend)
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7)


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Each row's share of its floor."""
    kernels = [row for row in rows if row["backend"] != "xla"] or rows
    names = [f"{row['case']} ({row['backend']})" for row in kernels]
    axes.barh(range(len(kernels)), [100 * row["share"] for row in kernels])
    axes.set_yticks(range(len(kernels)), names, fontsize=5)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="% of the floor")
