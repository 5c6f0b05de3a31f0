"""A result as a page: its environment, the table, and a plot of seconds against quality for every size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import cos, dist, pi, sin
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, RequestError
from ..files import replacing, write
from .contenders import BASE, CONTENDERS, REFERENCE
from .results import READING, Row, adherence, first_of, likened, likeness, ratio, seconds, starts_elsewhere, table

EQUAL = 60.0
"""Decibels at which pictures are drawn that are as near as that or nearer, up to equal ones, whose PSNR has no bound."""

COLOURS = {"ours": "#2563eb", "peer": "#ea580c", "floor": "#6b7280"}
LEGEND = {"ours": "flux2-local", "peer": "others", "floor": "rounding alone"}


BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->\n"
"""Between these lines of a page :func:`put` writes."""

OTHER_PICTURES = ("turbo", "flash")
"""Variants that may draw other pictures by design, so that their PSNR is no measure of quality."""


def read_rows(record: dict[str, Any]) -> list[Row]:
    """The rows of what ``flux2-local bench`` wrote.

    Raises:
        RequestError: the record was kept by an earlier version.
    """
    try:
        return [likened(Row(**row)) for row in record["rows"]]
    except TypeError as error:
        raise RequestError(
            f"The result is of an earlier layout ({error}). Measure anew with `flux2-local bench`."
        ) from None


def ratios(record: dict[str, Any], source: str) -> str:
    """A short table, Markdown: seconds, their ratio to the stock pipeline's in the same run, and quality.

    Args:
        record: what ``flux2-local bench`` wrote.
        source: a link to it.

    Raises:
        RequestError: the record was kept by an earlier version.
    """
    rows = read_rows(record)
    quality, speed = references(record)
    head = "size", "contender", "steps", "seconds", f"× {speed}", f"PSNR in dB to {quality}", "adherence"
    lines = [
        f"Measured, not predicted: `{record['model']}`, {record.get('card') or record['device']}, "
        f"{rounds(record)} ([{record['date'][:10]}]({source})).",
        "",
        f"| {' | '.join(head)} |",
        "| --- " * len(head) + "|",
    ]
    for row in rows:
        near = nearness(row, held(record, row.size)[0])
        lines.append(
            f"| {row.size} | {row.name} | {row.steps} | {seconds(row)} | {ratio(row)} | {near} | {adherence(row)} |"
        )
    if drawings := record.get("adherence_of_drawings"):
        ceilings = ", ".join(f"{share} at {size}" for size, share in drawings.items())
        lines += ["", f"The judge finds {ceilings} in drawings that show everything."]
    lines += ["", absent] if (absent := not_measured(record)) else []
    return "\n".join(lines) + "\n"


def held(record: dict[str, Any], size: str) -> tuple[str, str]:
    """The contenders that quality and speed are held against at a size."""
    if found := record.get("held_against", {}).get(size):
        return found["quality"], found["speed"]
    return first_of([r["name"] for r in record["rows"] if r["size"] == size and r["psnr"] is not None]) or (
        REFERENCE,
        BASE,
    )


def references(record: dict[str, Any]) -> tuple[str, str]:
    """The same in words that are true of every size."""
    pairs = [held(record, size) for size in dict.fromkeys(row["size"] for row in record["rows"])]
    quality, speed = ({names[i] for names in pairs} for i in (0, 1))
    return (
        quality.pop() if len(quality) == 1 else "the reference",
        speed.pop() if len(speed) == 1 else "the stock pipeline",
    )


def nearness(row: Row, reference: str, unit: str = "") -> str:
    """How near the pictures are to those of ``reference``, in words or dB (with ``unit`` after it); "" where none was finished."""
    if starts_elsewhere(row):
        return "other noise"
    if row.name == reference:
        return "reference"
    return likeness(row, unit)


def not_measured(record: dict[str, Any]) -> str:
    """The contenders that have neither a figure nor a reason, in a sentence; "" where there are none."""
    spoken = {row["name"] for row in record["rows"]}.union(*record["refused"].values())
    asked = record.get("not_asked")
    names = [name for name in CONTENDERS if name not in spoken] if asked is None else asked
    why = "The result does not say why it has no figures of" if asked is None else "Not asked for in this run"
    return f"{why}: {'; '.join(names)}." if names else ""


def rounds(record: dict[str, Any]) -> str:
    """What the figures are medians of; a run that was stopped has fewer rounds than were wanted."""
    wanted = record["rounds"]
    done = min(record.get("rounds_done", {}).values(), default=wanted)
    if done < wanted:
        return f"stopped after {done} of {wanted} rounds"
    return "one round" if wanted == 1 else f"medians of {wanted} rounds"


def put(text: str, page: Path) -> Path:
    """Replace what stands between :data:`BEGIN` and :data:`END` in ``page``.

    Raises:
        RequestError: the page is not there or lacks the two lines.
        OutputError: it cannot be written.
    """
    try:
        old = page.read_text("utf-8")
        before, _, rest = old.partition(BEGIN)
        _, end, after = rest.partition(END)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{page} cannot be read: {error}. Name a Markdown page.") from None
    if not end:
        raise RequestError(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}, between which the table goes.")
    return write(page, (before + BEGIN + text + END + after).encode())


def report(record: dict[str, Any], page: Path) -> list[Path]:
    """Write ``page`` (Markdown) and a plot beside it for every size.

    Args:
        record: what ``flux2-local bench`` wrote.
        page: the file; plots are named after it.

    Returns:
        The files written.

    Raises:
        RequestError: the record was kept by an earlier version.
        BackendUnavailableError: matplotlib is not installed.
        OutputError: something cannot be written; what was being written leaves nothing behind.
    """
    rows = read_rows(record)
    sizes = list(dict.fromkeys(row.size for row in rows))
    plots = [page.with_name(f"{page.stem}-{size.replace('×', 'x')}.png") for size in sizes]
    for size, path in zip(sizes, plots, strict=True):
        plot([row for row in rows if row.size == size], path, held(record, size)[0])
    lines = [
        f"# {record['model']}, {record['steps']} steps, {rounds(record)}",
        "",
        *environment(record),
        "",
    ]
    lines += [f"![Seconds against PSNR at {size}]({path.name})" for size, path in zip(sizes, plots, strict=True)]
    lines += ["", table(rows, references(record)[1]), "", READING, ""]
    lines += [f"- **{name}**: {note}" for name, note in {r.name: r.note for r in rows}.items()]
    refused = [f"- {name} at {size}: {why}" for size, whys in record["refused"].items() for name, why in whys.items()]
    lines += ["", "Not run, or not to the end:", "", *refused] if refused else []
    lines += ["", absent] if (absent := not_measured(record)) else []
    return [write(page, ("\n".join(lines) + "\n").encode()), *plots]


def environment(record: dict[str, Any]) -> list[str]:
    """Where the figures come from, a line each."""
    figures = {"rows", "refused", "not_asked", "model", "steps", "rounds", "rounds_done", "prompts"}
    return [f"- {name}: {value}" for name, value in record.items() if name not in figures]


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that nothing beats in both seconds and PSNR, the quickest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, -height(row))):
        if not best or height(row) > height(best[-1]):
            best.append(row)
    return best


def height(row: Row) -> float:
    """Where a row with pictures is drawn, dB."""
    assert row.psnr is not None
    return min(row.psnr, EQUAL)


REACH, LED = 7.0, 14.0
"""In points: half the side of what a mark or a number takes in the plot, and how far a number is from its mark where a line leads
there."""


def plot(rows: Sequence[Row], path: Path, reference: str) -> None:
    """Draw one size's contenders that draw the picture of ``reference``: seconds to the right, PSNR upwards.

    Those that draw others (:func:`other_picture`) are marks at the lower edge, and those that took more than the limit at the upper
    one, at what it was. Marks are numbered in the order of the rows; what the numbers mean stands beside the plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"Plots need a package that is not installed ({error.name}): pip install 'flux2-local[bench]'."
        ) from error
    figure = Figure(figsize=(10.5, 5.5), dpi=120, layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=(7, 2.6))
    shown = [row for row in rows if row.psnr is not None or row.more_than or other_picture(row)]
    same = [row for row in shown if row.psnr is not None and not row.more_than and not other_picture(row)]
    edge = frontier(same)
    axes.plot([r.seconds for r in edge], [height(r) for r in edge], color="#9ca3af", linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.15)
    points = []
    for row in shown:
        up, mark = (height(row), "o") if row in same else (0.97, ">") if row.more_than else (0.03, "^")
        points.append((row.seconds, up, axes.transData if row in same else axes.get_xaxis_transform()))
        axes.scatter([row.seconds], [up], color=COLOURS[row.group], marker=mark, transform=points[-1][2], zorder=3)
        if row not in same:
            axes.axvline(row.seconds, color=COLOURS[row.group], linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel("seconds a picture, median (logarithmic)")
    axes.set_ylabel(f"PSNR in dB to {reference} ({EQUAL:g} and more at {EQUAL:g})")
    axes.set_title(f"{rows[0].size}: the upper left is better")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    explain(key, shown, reference)
    figure.draw_without_rendering()  # from here on places in the plot are final
    number(axes, points)
    with replacing(path) as part:
        figure.savefig(part, format="png")


def other_picture(row: Row) -> bool:
    """Whether it may draw another picture than the reference by design, so that PSNR is no measure of its quality."""
    return starts_elsewhere(row) or row.name.partition(",")[0] in OTHER_PICTURES


def explain(key: Any, rows: Sequence[Row], reference: str) -> None:
    """What the numbers and the colours mean, in axes of their own."""
    from matplotlib.lines import Line2D

    key.axis("off")
    step = 0.8 / max(len(rows), 14)
    for place, row in enumerate(rows):
        text = f"{place + 1}  {row.name}: {seconds(row)} s"
        if row.psnr is not None and not row.more_than and not other_picture(row):
            text += f", {nearness(row, reference, ' dB')}"
        key.text(0, 1 - place * step, text, color=COLOURS[row.group], fontsize=8, va="top", transform=key.transAxes)
    marks = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=LEGEND[group]) for group, colour in COLOURS.items()
    ]
    marks.append(Line2D([], [], color="#374151", marker="^", linestyle="", label="other pictures by design"))
    if any(row.more_than for row in rows):
        marks.append(Line2D([], [], color="#374151", marker=">", linestyle="", label="stopped at the limit"))
    key.legend(handles=marks, loc="lower left", fontsize=8, frameon=False)


def number(axes: Any, points: Sequence[tuple[float, float, Any]]) -> None:
    """Write each mark's number beside it, with a line to it where it stands further off or others are near.

    Args:
        points: where the marks are, and the transform that this is to be read by.
    """
    pixels = 72 / axes.figure.dpi  # points in one
    marks = [tuple(pixels * float(n) for n in transform.transform((x, y))) for x, y, transform in points]
    for place, (point, mark, (x, y)) in enumerate(zip(points, marks, places(marks), strict=True)):
        aside = x - mark[0], y - mark[1]
        clear = all(dist((x, y), other) > LED + dist((x, y), mark) for other in marks if other != mark)
        line = {"arrowstyle": "-", "color": "#6b7280", "lw": 0.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            str(place + 1), point[:2], aside, xycoords=point[2], textcoords="offset points", ha="center", va="center",
            fontsize=8, zorder=4, annotation_clip=False,
            arrowprops=None if clear and max(map(abs, aside)) <= LED else line,
        )  # fmt: skip


def places(marks: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers of ``marks`` stand, in points: as near as can be, on no mark and no other number, and unless they are so far
    that a line leads to the mark no nearer to another one."""
    found: list[tuple[float, float]] = []
    for mark in marks:
        for far, angle in ((far, angle) for far in count(14.0, 4.0) for angle in ANGLES):
            place = mark[0] + far * cos(angle), mark[1] + far * sin(angle)
            led = max(abs(place[0] - mark[0]), abs(place[1] - mark[1])) > LED
            free = all(apart(place, taken) for taken in (*marks, *found))
            if free and (led or all(dist(place, mark) <= dist(place, other) for other in marks)):
                found.append(place)
                break
    return found


ANGLES = [pi / 4 + i * pi / 6 for i in range(12)]
"""Where numbers are tried around a mark: to the upper right first."""


def apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two squares of twice :data:`REACH` less a little do not touch."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 1.4 * REACH
