"""Arms as named points in a plane, with the same colours and markers in all studies."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from experiments import figures

# One colour for each routing and one marker for each method, the same in all studies.
ROUTINGS = {
    "none": "#777777",
    "shared": figures.OKABE_ITO[0],
    "raw": figures.OKABE_ITO[1],
    "max": figures.OKABE_ITO[2],
    "denominator": figures.OKABE_ITO[3],
    "post": figures.OKABE_ITO[4],
    "replay": figures.OKABE_ITO[5],
}
METHODS = {
    "plain": "o",
    "constant": "s",
    "one_minus": "v",
    "proportional": "^",
    "ratchet": "<",
    "balance": "D",
    "spring": ">",
    "agem": "*",
    "ewc": "X",
    "replay": "P",
    "replay+balance": "h",
}


class Mark(NamedTuple):
    """One arm in a plane."""

    name: str  # written beside it
    routing: str  # a key of ``ROUTINGS``: its colour
    method: str  # a key of ``METHODS``: its marker
    x: tuple[float, float]  # mean, standard error
    y: tuple[float, float]  # mean, standard error


def draw(axes: Axes, marks: Sequence[Mark], *, faint: Sequence[Mark] = ()) -> None:
    """Arms as points with error bars in both directions.

    Args:
      axes: where to draw.
      marks: the arms; ``name_marks`` writes their names once the axes are complete.
      faint: arms for comparison, as small grey points without names.
    """
    axes.plot(
        [m.x[0] for m in faint],
        [m.y[0] for m in faint],
        color="#cccccc",
        marker="o",
        markersize=3,
        linestyle="none",
        zorder=1,
    )
    for mark in marks:
        axes.errorbar(
            mark.x[0],
            mark.y[0],
            xerr=mark.x[1],
            yerr=mark.y[1],
            color=ROUTINGS[mark.routing],
            marker=METHODS[mark.method],
            markeredgecolor="white",
            markeredgewidth=0.5,
            markersize=8,
            elinewidth=0.9,
            linestyle="none",
        )


def explain_marks(figure: Figure, marks: Sequence[Mark]) -> None:
    """A legend outside the axes: what the colours are, and what the markers."""
    used = [k for k in ROUTINGS if any(m.routing == k for m in marks)]
    shapes = [k for k in METHODS if any(m.method == k for m in marks)]

    def handle(colour: str, marker: str, name: str) -> Line2D:
        return Line2D(
            [], [], color=colour, marker=marker, markersize=8, ls="none", label=name
        )

    handles = [
        handle("none", "", "routing (colour)"),
        *(handle(ROUTINGS[k], "o", k) for k in used),
        handle("none", "", ""),
        handle("none", "", "method (marker)"),
        *(handle("#444444", METHODS[k], k) for k in shapes),
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)


# Places tried for a name, nearest first: distance from its point in points, and angle.
_DISTANCES = (9, 16, 25, 36, 50, 68, 90)
_ANGLES = np.deg2rad([0, 180, 35, 145, -35, -145, 90, -90, 15, 165, -15, -165, 60, 120])


def name_marks(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Writes each arm's name where it hides no point, error bar, line or other name.

    Call it last: the places depend on the final limits and sizes, and the layout stays
    as it is from here on.

    Args:
      figure: the figure.
      axes: the axes that hold the marks.
      marks: what ``draw`` drew.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    dots = figure.dpi / 72  # a point
    frame = axes.get_window_extent(renderer)
    taken = [box for m in marks for box in _mark_boxes(axes, m, 5 * dots)]
    taken += [box for line in axes.lines for box in _line_boxes(line, 3 * dots)]
    for mark in marks:
        at = axes.transData.transform((mark.x[0], mark.y[0]))
        text = axes.text(0, 0, mark.name, fontsize=8, transform=None)
        extent = text.get_window_extent(renderer)
        text.remove()
        size = np.array([extent.width, extent.height])
        box = _best_place(at, size, dots, taken, frame)
        taken.append(box.padded(1))
        offset = ((box.min + box.max) / 2 - at) / dots
        gap = np.hypot(*np.maximum(np.abs(offset) - size / 2 / dots, 0))
        note = axes.annotate(
            mark.name,
            (mark.x[0], mark.y[0]),
            xytext=tuple(offset),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=[0.6 * c for c in to_rgb(ROUTINGS[mark.routing])],
            arrowprops={"arrowstyle": "-", "color": "#888888", "lw": 0.5, "shrinkB": 3}
            if gap > _DISTANCES[1]
            else None,
        )
        # A white rim, so that a line behind the name does not strike it out.
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _best_place(
    at: np.ndarray, size: np.ndarray, dots: float, taken: list[Bbox], frame: Bbox
) -> Bbox:
    """The place for a text of this size that hides least, and is near."""
    places = []
    for distance in _DISTANCES:
        for angle in _ANGLES:
            way = np.array([np.cos(angle), np.sin(angle)])
            # The near side of the text, not its middle, keeps the distance.
            side = np.where(np.abs(way) > 0.3, np.sign(way), 0)
            middle = at + way * distance * dots + side * size / 2
            box = Bbox([middle - size / 2, middle + size / 2])
            hidden = sum(_shared_area(box, other) for other in taken)
            outside = box.width * box.height - _shared_area(box, frame)
            cost = hidden + 3 * outside + 0.02 * distance * size[1]
            places.append((cost, len(places), box))
    return min(places)[2]


def _mark_boxes(axes: Axes, mark: Mark, half: float) -> list[Bbox]:
    """A mark's point and its two error bars, in dots."""
    x, y = axes.transData.transform((mark.x[0], mark.y[0]))
    left, low = axes.transData.transform((mark.x[0] - mark.x[1], mark.y[0] - mark.y[1]))
    right, high = axes.transData.transform(
        (mark.x[0] + mark.x[1], mark.y[0] + mark.y[1])
    )
    return [
        Bbox.from_extents(x - half, y - half, x + half, y + half),
        Bbox.from_extents(left, y - 1, right, y + 1),
        Bbox.from_extents(x - 1, low, x + 1, high),
    ]


def _line_boxes(line: Line2D, size: float) -> list[Bbox]:
    """Small boxes along a line's segments, in dots; none if it has only markers."""
    if line.get_linestyle() == "None":
        return []
    ends = line.get_transform().transform(line.get_xydata())
    boxes = []
    for start, end in itertools.pairwise(ends):
        steps = max(2, int(np.hypot(*(end - start)) / size) + 1)
        for x, y in np.linspace(start, end, steps):
            boxes.append(Bbox.from_bounds(x - size / 2, y - size / 2, size, size))
    return boxes


def _shared_area(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
