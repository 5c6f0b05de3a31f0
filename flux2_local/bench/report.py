"""A result as a page: its environment, the table, and a plot of seconds against quality for every size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, RequestError
from ..files import replacing, write
from .metrics import SAME
from .results import Row, adherence, figure, ratio, seconds, table

EQUAL = 60.0
"""Decibels at which equal pictures are drawn, whose PSNR has no bound."""

COLOURS = {"ours": "#2563eb", "peer": "#ea580c", "floor": "#6b7280"}
LEGEND = {"ours": "flux2-local", "peer": "others", "floor": "rounding alone"}


BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->\n"
"""Between these lines of a page :func:`put` writes."""

OTHER_PICTURES = ("turbo", "flash")
"""Contenders that may draw other pictures by design, so that their PSNR is no measure of quality."""


def read_rows(record: dict[str, Any]) -> list[Row]:
    """The rows of what ``flux2-local bench`` wrote.

    Raises:
        RequestError: the record was kept by an earlier version.
    """
    try:
        return [Row(**row) for row in record["rows"]]
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
    lines = [
        f"Measured, not predicted: `{record['model']}`, {record.get('card') or record['device']}, "
        f"{rounds(record)} ([{record['date'][:10]}]({source})).",
        "",
        f"| {' | '.join(('size', 'contender', 'steps', 'seconds', '× diffusers', 'PSNR to none, dB', 'adherence'))} |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        near = "equal" if row.psnr == SAME else figure(row.psnr, ".1f")
        lines.append(
            f"| {row.size} | {row.name} | {row.steps} | {seconds(row)} | {ratio(row)} | {near} | {adherence(row)} |"
        )
    if drawings := record.get("adherence_of_drawings"):
        ceilings = ", ".join(f"{share} at {size}" for size, share in drawings.items())
        lines += ["", f"The judge finds {ceilings} in drawings that show everything."]
    return "\n".join(lines) + "\n"


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
        plot([row for row in rows if row.size == size], path)
    lines = [
        f"# {record['model']}, {record['steps']} steps, {rounds(record)}",
        "",
        *environment(record),
        "",
    ]
    lines += [f"![Seconds against PSNR at {size}]({path.name})" for size, path in zip(sizes, plots, strict=True)]
    lines += ["", table(rows), "", *(f"- **{name}**: {note}" for name, note in {r.name: r.note for r in rows}.items())]
    refused = [f"- {name} at {size}: {why}" for size, whys in record["refused"].items() for name, why in whys.items()]
    lines += ["", "Not run, or not to the end:", "", *refused] if refused else []
    return [write(page, ("\n".join(lines) + "\n").encode()), *plots]


def environment(record: dict[str, Any]) -> list[str]:
    """Where the figures come from, a line each."""
    figures = {"rows", "refused", "model", "steps", "rounds", "rounds_done", "prompts"}
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


CLOSE = 1.5
"""Decibels between two names that would be written over each other."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one size's contenders that draw the reference's picture: seconds to the right, PSNR upwards.

    :data:`OTHER_PICTURES` are marks on the time axis, and so are those that took more than the limit, with what it was.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"Plots need a package that is not installed ({error.name}): pip install 'flux2-local[bench]'."
        ) from error
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    same = [row for row in rows if row.name not in OTHER_PICTURES and row.psnr is not None and not row.more_than]
    for group, colour in COLOURS.items():
        mine = [row for row in same if row.group == group]
        if mine:
            axes.scatter(
                [r.seconds for r in mine], [height(r) for r in mine], color=colour, label=LEGEND[group], zorder=3
            )
    named: list[Row] = []
    for row in sorted(same, key=height, reverse=True):
        near = sum(2 / 3 < row.seconds / r.seconds < 1.5 and height(r) - height(row) < CLOSE for r in named)
        place = (6, 4 - 10 * near)  # names of neighbours stand below each other
        axes.annotate(row.name, (row.seconds, height(row)), xytext=place, textcoords="offset points", fontsize=8)
        named.append(row)
    edge = frontier(same)
    axes.plot([r.seconds for r in edge], [height(r) for r in edge], color="#9ca3af", linewidth=1, zorder=1)
    for row in rows:
        if row not in same:
            axes.axvline(row.seconds, color=COLOURS[row.group], linewidth=1, linestyle=":")
            name = f"{row.name}: more than {row.seconds:g} s" if row.more_than else row.name
            axes.annotate(
                name,
                (row.seconds, 0.98 if row.more_than else 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=8,
                va="top" if row.more_than else "bottom",
            )
    axes.set_xscale("log")
    axes.set_xlabel("seconds a picture, median (logarithmic)")
    axes.set_ylabel(f"PSNR against none, dB (equal pictures at {EQUAL:g})")
    axes.set_title(f"{rows[0].size}: the upper left is better")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=len(LEGEND))
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
