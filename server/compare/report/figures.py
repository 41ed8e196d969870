"""The report's plots, as SVG by matplotlib: quality against cost with the Pareto front, and differences per measure.

Axes and letters are drawn in `INK`, which a page may replace by its own text colour. Same results, same bytes: ids are
salted with a constant and no date is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ensemble_server.server.compare.kept.results import ArmKind, ArmResult, Interval, Results
from ensemble_server.server.compare.report import words
from ensemble_server.server.compare.report.families import Family, Quality, families
from ensemble_server.server.compare.report.pareto import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.typing import RcKeyType

INK = "#1b1b1f"  # stands nowhere else in a figure
COLOURS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    "member": "#56a0d3",
    "remote": "#9a9a9a",
    "ensemble": "#d55e00",
    "merge": "#009e73",
    "distilled": "#e69f00",
    "cost_matched": "#cc79a7",
}
MARKERS = {"member": "o", "remote": "X", "ensemble": "D", "merge": "s", "distilled": "P", "cost_matched": "^"}
VERDICT_COLOURS = {
    "better": "#009e73",
    "worse": "#d55e00",
    "better by less than the margin": "#009e73",
    "worse by less than the margin": "#d55e00",
}
OPEN = "#8a8a8a"  # every other verdict
STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",  # letters stay letters: they can be read out, searched and take the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a name may hold dollar signs
}


@dataclass(frozen=True)
class Figure:
    """`svg`: a whole file on white. `text`: what it shows, in words. `name`: letters, digits and dashes."""

    name: str
    title: str
    text: str
    svg: str
    size: Literal["wide", "half"]

    @property
    def inline(self) -> str:
        """The SVG element for an HTML page: the page's colours, and ids that no other figure has."""
        element = self.svg[self.svg.index("<svg") :]
        element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
        element = re.sub(r'<g id="patch_1">.*?</g>', "", element, count=1, flags=re.DOTALL)  # the white ground
        element = element.replace(INK, "currentColor")
        element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", element)
        return element.replace("<svg ", f'<svg role="img" aria-labelledby="{self.name}-caption" ', 1)


def draw_figures(results: Results) -> list[Figure]:
    """All figures that the results allow; none where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib import rc_context

    with rc_context(STYLE):
        return [figure for family in families(results) for figure in _of_family(results, family)]


def _of_family(results: Results, family: Family) -> Iterator[Figure]:
    if (found := _quality_against_cost(results, family)) is not None:
        yield found
    for place, measure in enumerate(family.measures):
        if (found := _differences(results, family, measure, place)) is not None:
            yield found


# --- quality against cost ----------------------------------------------------------------------------------------


def milliseconds_per_token(arm: ArmResult) -> tuple[float, Interval | None] | None:
    """Of one request alone."""
    timing = arm.cost.tokens_per_s.get("1")
    if timing is None or timing.median <= 0:
        return None
    bounds = None
    known = timing.ci or timing.range
    if known is not None and known[0] > 0:
        bounds = (1000 / known[1], 1000 / known[0])
    return 1000 / timing.median, bounds


def _quality_against_cost(results: Results, family: Family) -> Figure | None:
    points: dict[str, tuple[float, Interval | None, Quality]] = {}
    for name, arm in results.arms.items():
        cost, quality = milliseconds_per_token(arm), family.mean(arm)
        if cost is not None and quality is not None:
            points[name] = (*cost, quality)
    if len(points) < 2:
        return None
    sign = -1 if family.higher_is_better else 1
    front = pareto_front(
        {name: (cost, sign * quality.value) for name, (cost, _, quality) in points.items()},
        {name: bounds for name, (_, bounds, _) in points.items() if bounds is not None},
    )

    canvas = _canvas(8, 4.6)
    axes = canvas.subplots()
    axes.set_xscale("log")
    axes.plot(
        [points[name][0] for name in front],
        [points[name][2].value for name in front],
        drawstyle="steps-post",
        color=INK,
        linewidth=1,
        linestyle=(0, (4, 3)),
        zorder=1,
    )
    for name, (cost, bounds, quality) in points.items():
        kind = results.arms[name].kind
        axes.errorbar(
            cost,
            quality.value,
            xerr=_arms_of(cost, bounds),
            yerr=_arms_of(quality.value, quality.ci),
            marker=MARKERS[kind],
            markersize=8 if name in front else 6,
            color=COLOURS[kind],
            elinewidth=0.8,
            linestyle="none",
            zorder=2,
        )
    _decimal_ticks(axes)
    axes.set_xlabel("milliseconds per answer token, one request at a time (left is cheaper)")
    axes.set_ylabel(f"mean {family.unit} (up is better)")
    if not family.higher_is_better:
        axes.invert_yaxis()
    _legend(axes, [results.arms[name].kind for name in points])
    canvas.draw_without_rendering()
    _label_points(canvas, axes, {name: (cost, quality.value) for name, (cost, _, quality) in points.items()}, front)

    listed = "; ".join(
        f"{name}: {cost:.1f} ms, {words.number(quality.value)}" for name, (cost, _, quality) in points.items()
    )
    return Figure(
        f"{family.name}-quality-cost",
        f"{family.title}: quality against cost",
        f"Cost in milliseconds per answer token and mean {family.unit} of each arm. {listed}. "
        f"On the Pareto front (no other arm is both better and cheaper): {words.joined(front)}.",
        _svg(canvas),
        "wide",
    )


def _decimal_ticks(axes: Axes) -> None:
    """20, 50, 100 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, kinds: Sequence[ArmKind]) -> None:
    for kind in dict.fromkeys(kinds):
        axes.plot([], [], marker=MARKERS[kind], color=COLOURS[kind], linestyle="none", label=words.KINDS[kind])
    axes.plot([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="Pareto front")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, frameon=False, fontsize=9, handletextpad=0.4)


def _label_points(canvas: Canvas, axes: Axes, points: Mapping[str, tuple[float, float]], bold: Sequence[str]) -> None:
    """Names beside their points, moved up or down until no two lie on each other, with a line where one was moved."""
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    right = axes.bbox.x0 + 0.75 * axes.bbox.width
    placed: list[tuple[float, float, float]] = []  # left and right edge, middle
    line_px = 13 * canvas.dpi / 72
    for name in sorted(points, key=lambda name: (-pixels[name][1], name)):
        x, y = pixels[name]
        width = 6.2 * len(name) * canvas.dpi / 72
        is_left = x > right
        edges = (x - width - 10, x - 10) if is_left else (x + 10, x + width + 10)
        wanted = y
        for left, right_edge, middle in sorted(placed, key=lambda place: -place[2]):  # downwards, so it ends
            if edges[0] < right_edge and left < edges[1] and abs(y - middle) < line_px:
                y = middle - line_px
        placed.append((*edges, y))
        offset = (y - wanted) * 72 / canvas.dpi
        axes.annotate(
            name,
            points[name],
            xytext=(-6 if is_left else 6, 6 + offset),  # above the bars of the intervals
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
            fontsize=9,
            fontweight="bold" if name in bold else "normal",
            arrowprops={"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.5} if abs(offset) > 6 else None,
        )


# --- differences per measure -------------------------------------------------------------------------------------


def _differences(results: Results, family: Family, measure: str, place: int) -> Figure | None:
    """Bars start at the baseline: from zero, differences that matter would be too small to see."""
    baseline = results.arms.get(results.baseline)
    level = family.quality(baseline, measure) if baseline is not None else None
    found = {
        name: quality.against_baseline
        for name in reversed(family.ranked(results))
        if (quality := family.quality(results.arms[name], measure)) is not None and quality.against_baseline is not None
    }
    if not found or level is None:
        return None
    canvas = _canvas(4.2, 0.9 + 0.27 * len(found))
    axes = canvas.subplots()
    for row, difference in enumerate(found.values()):
        is_open = difference.verdict not in ("better", "worse")
        colour = VERDICT_COLOURS.get(difference.verdict, OPEN)
        axes.barh(
            row,
            difference.difference,
            height=0.62,
            facecolor="none" if is_open else colour,
            edgecolor=colour,
            linestyle="--" if difference.verdict in ("inconclusive", "too few items", "nothing was answered") else "-",
        )
        if difference.ci is not None:
            axes.plot(difference.ci, [row, row], color=INK, linewidth=1.2)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(f"difference in {family.unit}\n(right is better)")
    if not family.higher_is_better:
        axes.invert_xaxis()
    listed = "; ".join(
        f"{name}: {words.difference(found[name], results.baseline, family.unit)}" for name in reversed(found)
    )
    return Figure(
        f"{family.name}-{place}",
        f"{family.name.capitalize()} {measure} ({results.baseline}: {words.number(level.value)})",
        f"Differences from {results.baseline} ({words.number(level.value)} {family.unit}). {listed}.",
        _svg(canvas),
        "half",
    )


# --- matplotlib --------------------------------------------------------------------------------------------------


def _canvas(width_in: float, height_in: float) -> Canvas:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width_in, height_in), layout="constrained")


def _arms_of(value: float, bounds: Interval | None) -> list[list[float]] | None:
    """What matplotlib wants of an error bar: [[distance to the low end], [to the high end]]."""
    return None if bounds is None else [[max(value - bounds[0], 0)], [max(bounds[1] - value, 0)]]


def _svg(canvas: Canvas) -> str:
    from matplotlib.text import Text

    for text in canvas.findobj(Text):
        text.set_parse_math(False)
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return file.getvalue()
