"""The page "why this network": report.json as one HTML file, nothing external, no scripts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas import file
from nas.errors import NasctlError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: drawn in these colours, then named after the page's own, so that the plot follows light and dark
INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--dots)",
    "#040404": "var(--front)",
    "#050505": "var(--pick)",
    "#060606": "var(--limit)",
    "#070707": "var(--page)",
}
INK, FAINT, DOTS, FRONT, PICK, LIMIT, PAGE = INKS

REQUIRED = ("nasctl", "created", "spec", "device", "chosen")


def write(report: Mapping[str, Any], path: Path) -> None:
    file.write(path, render(report).encode())


def render(report: Mapping[str, Any]) -> str:
    """The page for the content of a report.json (see `deploy.verify.Report`)."""
    import jinja2
    from markupsafe import Markup

    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise NasctlError(
            f"the report lacks {', '.join(missing)}",
            where="report.json",
            next="It was written by another version: run the search again to renew it.",
        )
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"ms": ms, "count": count, "percent": percent, "plain": plain}
    front = list(report.get("front") or ())
    axes = _axes(front)
    plot = Markup(_plot(report, axes)) if axes else ""
    return page.get_template("report.html").render(
        {**report, "front": front, "plot": plot, "axes": axes, "pick": _pick(report, front)}
    )


def _pick(report: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> int | None:
    """The chosen network's row in the front, if it is there: by genes, else by what it costs."""
    chosen = report["chosen"]
    for keys in (("genes",), ("macs", "params", "val_ce")):
        wanted = [chosen.get(key) for key in keys]
        for at, row in enumerate(front):
            if None not in wanted and [row.get(key) for key in keys] == wanted:
                return at
    return None


# ---- numbers as text -----------------------------------------------------------------------------


def ms(value: float | None) -> str:
    """Three significant digits; never an exponent for what people time."""
    if value is None:
        return "–"
    digits = 2 if value <= 0 else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{min(digits, 4)}f} ms"


def count(value: float | None, unit: str = "") -> str:
    """1234567 -> 1.23 M; bytes too are in powers of ten."""
    if value is None:
        return "–"
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}".replace("%", " %")


def plain(value: object) -> str:
    """A setting as people write it."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or "–"
    if isinstance(value, list | tuple):
        joined = (
            "-".join(map(plain, v)) if isinstance(v, list | tuple) else plain(v) for v in value
        )
        return ", ".join(joined) or "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---- the plot ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    key: str
    label: str
    scale: float = 1.0  # from the stored unit to the drawn one


def _axes(front: Sequence[Mapping[str, Any]]) -> tuple[Axis, Axis] | None:
    """The cost and the quality that every network of the front has, or nothing to draw."""
    costs = (
        Axis("latency_ms", "latency (ms)"),
        Axis("macs", "million MACs", 1e-6),
    )
    # cross-entropy first: a front in it is none in accuracy, which is coarser and noisier
    qualities = (
        Axis("val_ce", "validation cross-entropy (nats)"),
        Axis("val_accuracy", "validation accuracy (%)", 100.0),
    )
    x, y = (
        next((a for a in some if all(row.get(a.key) is not None for row in front)), None)
        for some in (costs, qualities)
    )
    return (x, y) if front and x and y else None


def _plot(report: Mapping[str, Any], axes: tuple[Axis, Axis]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {  # matplotlib's stubs want literals for keys
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
        "svg.hashsalt": "nasctl",  # equal reports, equal files
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    out = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        _draw(figure.add_subplot(), report, axes)
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML header, which has no place inside HTML
    for drawn, named in INKS.items():
        svg = svg.replace(drawn, named)
    return svg.replace("<svg ", '<svg role="img" aria-label="evaluated networks and front" ', 1)


def _draw(ax: Axes, report: Mapping[str, Any], axes: tuple[Axis, Axis]) -> None:
    x, y = axes
    front = sorted(report["front"], key=lambda row: row[x.key])
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    dots = _evaluated(report.get("evaluated") or (), axes)
    if len(dots):
        ax.scatter(dots[:, 0], dots[:, 1], s=12, color=DOTS, linewidths=0, label="evaluated")
    xs = np.array([row[x.key] for row in front]) * x.scale
    ys = np.array([row[y.key] for row in front]) * y.scale
    if x.key == "latency_ms" and all(row.get("low_ms") is not None for row in front):
        ends = [[row["low_ms"], row["high_ms"]] for row in front]
        for height, (low, high) in zip(ys, ends, strict=True):
            ax.plot([low, high], [height] * 2, color=FRONT, alpha=0.3, linewidth=1.2)
    ax.plot(
        xs,
        ys,
        "-o",
        color=FRONT,
        markersize=4,
        linewidth=1.4,
        label="front, predicted" if x.key == "latency_ms" else "front",
    )
    measured = [(row["measured_ms"], row[y.key] * y.scale) for row in front if _measured(row, x)]
    if measured:
        ax.scatter(
            [point[0] for point in measured],
            [point[1] for point in measured],
            s=26,
            facecolors="none",
            edgecolors=INK,
            linewidths=1,
            label="front, measured",
        )
    _draw_pick(ax, report, axes)
    _draw_budget(ax, (report.get("budget") or {}).get(x.key), x)
    ax.set_xlabel(x.label)
    ax.set_ylabel(y.label)
    if y.key == "val_ce":
        ax.invert_yaxis()  # up is better on both scales
    ax.legend(frameon=False, loc="best", fontsize=9)


def _draw_budget(ax: Axes, budget: float | None, x: Axis) -> None:
    if budget is None:
        return
    limit, style = budget * x.scale, (0, (4, 3))
    if limit <= 2 * ax.get_xlim()[1]:
        ax.axvline(limit, color=LIMIT, linewidth=1.2, linestyle=style, label="budget")
    else:  # a line so far off would press all networks into a corner
        label = f"budget {limit:g}, far to the right"
        ax.plot([], [], color=LIMIT, linewidth=1.2, linestyle=style, label=label)


def _measured(row: Mapping[str, Any], x: Axis) -> bool:
    return x.key == "latency_ms" and row.get("measured_ms") is not None


def _draw_pick(ax: Axes, report: Mapping[str, Any], axes: tuple[Axis, Axis]) -> None:
    x, y = axes
    chosen = report["chosen"]
    predicted = (chosen.get("latency") or {}).get("predicted") or {}
    cost = predicted.get("value_ms") if x.key == "latency_ms" else chosen.get(x.key)
    quality = chosen.get(y.key)
    if cost is None or quality is None:
        return
    ax.scatter(
        [cost * x.scale],
        [quality * y.scale],
        s=190,
        marker="*",
        color=PICK,
        edgecolors=PAGE,
        linewidths=1,
        zorder=5,
        label="chosen",
    )


def _evaluated(
    rows: Sequence[Sequence[float | None]], axes: tuple[Axis, Axis]
) -> np.ndarray[Any, Any]:
    """[n, 2] points to draw, at most one per cell of a fine grid: a page, not a data file."""
    x, y = axes
    column = {"latency_ms": 0, "val_ce": 1, "val_accuracy": 2}
    if x.key not in column or not rows:
        return np.empty((0, 2))
    table = np.array(rows, dtype=float)[:, [column[x.key], column[y.key]]]
    table = table[np.isfinite(table).all(axis=1)] * (x.scale, y.scale)
    if not len(table):
        return table
    reach = np.ptp(table, axis=0)
    grid = np.floor((table - table.min(axis=0)) / np.where(reach > 0, reach, 1) * (400, 250))
    return table[np.sort(np.unique(grid @ (1000, 1), return_index=True)[1])]
