"""Figures: one look for all studies, the same bytes for the same numbers.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart;
series differ in marker and dash too. SVG and PNG carry no dates.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OKABE_ITO = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", "-.", ":")
# A study's process draws nothing else, so the settings hold for all of it. `Figure` is
# used without pyplot: nothing needs a screen, and nothing is kept alive.
matplotlib.rcParams.update(
    {
        "figure.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "font.size": 10,
        "legend.frameon": False,
        "svg.hashsalt": "optax_cl",
        "svg.fonttype": "path",
    }
)


def style(index: int) -> dict[str, str]:
    """Colour, marker and dash of the ``index``-th series."""
    return {
        "color": OKABE_ITO[index % len(OKABE_ITO)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index // len(OKABE_ITO) % len(_DASHES)],
    }


def new(
    rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 4.2
) -> tuple[Figure, np.ndarray]:
    """An empty figure in the common style.

    Returns:
      The figure and its axes as an array ``[rows, columns]``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Names both axes: a figure without labels is not readable on its own."""
    if not x or not y:
        raise ValueError("both axes need a label, with the unit where there is one.")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left", fontsize=11)


def mean_and_error(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over ``axis``; the error of one value is zero."""
    values = np.asarray(values, dtype=np.float64)
    count = values.shape[axis]
    mean = values.mean(axis)
    if count < 2:
        return mean, np.zeros_like(mean)
    return mean, values.std(axis, ddof=1) / np.sqrt(count)


def points(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    categories: Sequence[str],
    *,
    y: str,
    x: str = "arm",
    title: str = "",
    bars: bool = False,
) -> None:
    """Means with error bars over categories, as points or as bars.

    Args:
      axes: where to draw.
      series: name -> (means, standard errors), each as long as ``categories``.
      categories: labels on the horizontal axis.
      y: label of the vertical axis.
      x: label of the horizontal axis.
      title: what the reader should look at.
      bars: draw bars from zero (only for quantities whose zero means something).
    """
    place = np.arange(len(categories))
    width = 0.8 / max(len(series), 1)
    for i, (name, (mean, error)) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * width
        look = style(i)
        if bars:
            axes.bar(
                place + offset,
                mean,
                width * 0.92,
                yerr=error,
                color=look["color"],
                capsize=2,
                label=name,
            )
        else:
            axes.errorbar(
                place + offset,
                mean,
                yerr=error,
                color=look["color"],
                marker=look["marker"],
                linestyle="none",
                capsize=3,
                label=name,
            )
    long = max((len(c) for c in categories), default=0) * len(categories) > 60
    axes.set_xticks(
        place,
        categories,
        rotation=35 if long else 0,
        ha="right" if long else "center",
    )
    label(axes, x, y, title)
    if len(series) > 1:
        axes.legend()


def lines(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    markers: bool = False,
) -> None:
    """Curves with bands of one standard error.

    Args:
      axes: where to draw.
      series: name -> (x values, means, standard errors).
      x: label of the horizontal axis.
      y: label of the vertical axis.
      title: what the reader should look at.
      markers: mark the single values.
    """
    for i, (name, (at, mean, error)) in enumerate(series.items()):
        look = style(i)
        mean, error = np.asarray(mean), np.asarray(error)
        # Later curves are thinner: where two are equal the lower one shows on the rim.
        axes.plot(
            at,
            mean,
            color=look["color"],
            linestyle=look["linestyle"],
            marker=look["marker"] if markers else "",
            linewidth=1.2 + 0.25 * (len(series) - 1 - i),
            markersize=5,
            label=name,
        )
        if np.any(error > 0):
            axes.fill_between(
                at, mean - error, mean + error, color=look["color"], alpha=0.1, lw=0
            )
    label(axes, x, y, title)
    if len(series) > 1:
        axes.legend()


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    y: str,
    title: str = "",
    colour_label: str = "",
    diverging_at: float | None = None,
    number_format: str = "{:.2f}",
) -> None:
    """A matrix as colours, with its numbers in the cells.

    Args:
      axes: where to draw.
      values: ``[rows, columns]``; non-finite cells stay blank.
      rows: labels of the rows.
      columns: labels of the columns.
      x: label of the horizontal axis.
      y: label of the vertical axis.
      title: what the reader should look at.
      colour_label: label of the colour bar.
      diverging_at: the neutral value of a two-sided scale; None for a one-sided one.
      number_format: how a cell's number is written.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    colours = "cividis"
    if diverging_at is not None:
        reach = max(high - diverging_at, diverging_at - low, 1e-12)
        low, high, colours = diverging_at - reach, diverging_at + reach, "PuOr"
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for i, j in np.argwhere(np.isfinite(values)):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = number_format.format(values[i, j])
        colour = "white" if dark else "black"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=colour_label)
    label(axes, x, y, title)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
