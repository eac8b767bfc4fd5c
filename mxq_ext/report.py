"""What people look at: the bit map of a model, the Pareto plot, and tables.

The bit map shows every unit of a model as a cell, layers downwards and the modules of a layer across, coloured by stored bits; as SVG
for a page and as text for a terminal, with one palette. Its input is a list of entries (unit name, layer, role, format name, stored
bits), layer -1 outside of the blocks; :func:`bit_map_entries` makes them from a plan or from what ``checkpoint.inspect`` returns.

matplotlib is imported when something is drawn, and only then.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MxqError, PlanError
from .fileio import atomic_path, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .plan import FrontPoint, Plan
    from .sensitivity import CostTable
    from .structure import Unit

#: unit name, layer (-1 outside of the blocks), role, format name, stored bits
Entry = tuple[str, int, str, str, float]

#: Viridis (van der Walt and Smith 2015), nine stops: it rises evenly in lightness, so it reads in grey and with any colour vision.
_STOPS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_FLOAT = "d9d9d9"  # units that stay in 16 or more bits: grey, outside of the scale
_BITS = (1.0, 9.0)  # stored bits at the two ends of the scale; the same in every picture, so that pictures can be compared


def colour(bits: float) -> tuple[int, int, int]:
    """RGB, 0 to 255, of a number of stored bits: logarithmic from 1 (dark) to 9 (bright), grey from 12 on."""
    if bits >= 12:
        return tuple(bytes.fromhex(_FLOAT))
    low, high = map(math.log2, _BITS)
    at = (min(max(math.log2(max(bits, 1e-9)), low), high) - low) / (high - low) * (len(_STOPS) - 1)
    i = min(int(at), len(_STOPS) - 2)
    return tuple(round(a + (at - i) * (b - a)) for a, b in zip(bytes.fromhex(_STOPS[i]), bytes.fromhex(_STOPS[i + 1]), strict=True))


def _ink(rgb: tuple[int, int, int]) -> str:
    """Black or white, whichever has the higher contrast on ``rgb`` (WCAG relative luminance)."""
    linear = [c / 12.92 if (c := v / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for v in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#" + bytes(rgb).hex()


# -- the bit map -----------------------------------------------------------------------------------------------------------------------


def bit_map_entries(source: Plan | Mapping, units: Sequence[Unit] | None = None, float_bytes: int = 2) -> list[Entry]:
    """Entries of a Plan (with the ``units`` of its model; kept ones count ``float_bytes`` per weight) or of ``checkpoint.inspect(dir)``."""
    if isinstance(source, Mapping):
        return [(u["name"], u["layer"], u["name"].rpartition(".")[2], u["format"], u["stored_bits"]) for u in source["units"]]
    if units is None:
        raise PlanError("bit map of a plan", "the units of the model are needed, since patterns and the default name none",
                        "pass find_units(model)")
    decided, sizes = source.resolve(units), source.predicted_bytes(units, float_bytes)["units"]
    return [(u.name, u.layer, u.role, "keep" if (d := decided[u.name]) is None else d.name, 8 * sizes[u.name] / u.numel) for u in units]


@dataclass(frozen=True)
class _Grid:
    """Entries laid out: rows are layers (or one unit outside of them), columns the modules of a layer."""

    columns: list[str]
    rows: list[tuple[str, list[float | None] | float]]  # label, and bits per column; one number: a unit that fills the row
    legend: list[tuple[str, float, int]]  # format, mean stored bits, units; fewest bits first


def _grid(entries: Sequence[Entry]) -> _Grid:
    if not entries:
        raise PlanError("bit map", "there are no units to show", "pass one entry (name, layer, role, format, stored bits) per unit")
    keys: dict[str, None] = {}
    cells: dict[tuple[int, str], list[float]] = {}
    for name, layer, role, _, bits in entries:
        if layer >= 0:
            # The path inside the block. Numbers in it count experts, which share a column: their cell shows the mean.
            inside = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.split(f".{layer}.", 1)[1] if f".{layer}." in name else role)
            keys[inside] = None
            cells.setdefault((layer, inside), []).append(bits)
    tails = [k.rpartition(".")[2] for k in keys]
    columns = [t if tails.count(t) == 1 else k for t, k in zip(tails, keys, strict=True)]
    layers = [(str(i), [statistics.fmean(c) if (c := cells.get((i, k))) else None for k in keys]) for i in sorted({i for i, _ in cells})]
    outside = [(role, float(bits)) for _, layer, role, _, bits in entries if layer < 0]
    first = next((i for i, e in enumerate(entries) if e[1] >= 0), len(entries))  # what stands before the blocks is drawn above them
    by_format: dict[str, list[float]] = {}
    for *_, fmt, bits in entries:
        by_format.setdefault(fmt, []).append(bits)
    legend = sorted(((f, statistics.fmean(b), len(b)) for f, b in by_format.items()), key=lambda item: item[1])
    return _Grid(columns, outside[:first] + layers + outside[first:], legend)


def _number(bits: float) -> str:
    return f"{bits:.2f}" if bits < 9.995 else f"{bits:.1f}"


def _legend_line(fmt: str, bits: float, count: int) -> str:
    return f"{fmt}: {bits:.2f} bits, {count} unit{'s' if count != 1 else ''}"


def bit_map_text(entries: Sequence[Entry], color: bool | None = None) -> str:
    """The bit map as text, one line per layer, with the formats below.

    ``color=None`` colours the cells where stdout is a terminal, ``NO_COLOR`` is not set and ``TERM`` is not ``dumb``. The numbers stand
    there in any case, so nothing is lost without colour.
    """
    from rich.console import Console
    from rich.text import Text

    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    grid = _grid(entries)
    head = max(len("layer"), *(len(label) for label, _ in grid.rows))
    widths = [max(len(c), 4) for c in grid.columns]
    full = sum(widths) + max(0, len(widths) - 1) if widths else 6

    def cell(bits: float | None, width: int) -> Text:
        if bits is None:
            return Text(" " * width)
        rgb = colour(bits)
        return Text(_number(bits).center(width), style=f"{_ink(rgb)} on {_hex(rgb)}")

    lines = [Text(" ".join(["layer".ljust(head), *(c.center(w) for c, w in zip(grid.columns, widths, strict=True))]).rstrip(),
                  style="bold")]
    for label, bits in grid.rows:
        row = [cell(bits, full)] if isinstance(bits, float) else [cell(b, w) for b, w in zip(bits, widths, strict=True)]
        lines.append(Text(" ").join([Text(label.ljust(head)), *row]))
    lines.append(Text())
    for fmt, bits, count in grid.legend:
        mark = Text("  ", style=f"on {_hex(colour(bits))}") if color else Text(" -")
        lines.append(Text.assemble(mark, " ", _legend_line(fmt, bits, count)))
    if not color:
        return "\n".join(line.plain.rstrip() for line in lines)
    out, system = io.StringIO(), "truecolor" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256"
    console = Console(file=out, force_terminal=True, color_system=system, width=max(80, *(len(line) for line in lines)),
                      legacy_windows=False)
    for line in lines:
        console.print(line)
    return out.getvalue().rstrip("\n")


def need_matplotlib(what: str) -> None:
    """Raises MxqError if it is not installed; for those who compute for long before they draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise MxqError(what, f"matplotlib is not installed ({e})", "pip install matplotlib") from None


def _figure(path: str | os.PathLike, size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` inches, without any global state of matplotlib. Raises as ``need_matplotlib``."""
    need_matplotlib(f"drawing {path}")
    from matplotlib.figure import Figure

    return Figure(figsize=size, facecolor="white")


def _save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure atomically, as its suffix says (svg, png, pdf). The same picture gives the same bytes, so that it diffs well."""
    import matplotlib

    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("svg", "png", "pdf"):
        raise MxqError(f"drawing {path}", f"pictures are written as svg, png or pdf, not {kind or 'without a suffix'}",
                       "name the file something.svg")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mxq_ext"}), atomic_path(path) as temp:  # text stays text
        figure.savefig(temp, format=kind, dpi=150, metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind))


def bit_map_svg(entries: Sequence[Entry], path: str | os.PathLike, title: str = "Stored bits per weight") -> None:
    """Draws the bit map: layers downwards, modules across, the embedding and head as rows of their own; numbers are stored bits.

    ``path`` ends in .svg, or .png or .pdf. Raises MxqError if matplotlib is not installed.
    """
    grid = _grid(entries)
    n, m = len(grid.rows), max(1, len(grid.columns))
    # Inches: cells shrink beyond 60 rows, so that a deep model still fits a page; fonts follow them.
    high, wide = min(0.27, 16 / n), 0.7 if m <= 16 else 11 / m
    slanted = any(len(c) > wide * 14 for c in grid.columns)  # headings that would run into each other
    left = 0.2 + 0.066 * max(len(label) for label, _ in grid.rows)
    right = 0.65 + 0.064 * max(len(_legend_line(*item)) for item in grid.legend)
    above, below = 0.55 + 0.036 * max(map(len, grid.columns)) if slanted else 0.62, 0.12
    legend_high = 0.5 + 0.24 * len(grid.legend)
    tall = above + max(n * high, legend_high) + below
    width = left + m * wide + right
    figure = _figure(path, (width, tall))
    axes = figure.add_axes((left / width, 1 - (above + n * high) / tall, m * wide / width, n * high / tall))
    font = min(7.5, high * 72 * 0.52, wide * 72 * 0.2)

    from matplotlib.patches import Rectangle

    def cell(x: float, y: int, span: float, bits: float) -> None:
        rgb = colour(bits)
        axes.add_patch(Rectangle((x, y), span, 1, facecolor=_hex(rgb), edgecolor="white", linewidth=min(1.0, high * 4)))
        axes.text(x + span / 2, y + 0.53, _number(bits), ha="center", va="center", fontsize=font, color=_ink(rgb))

    for y, (_, bits) in enumerate(grid.rows):
        if isinstance(bits, float):
            cell(0, y, m, bits)
            continue
        for x, b in enumerate(bits):
            if b is not None:
                cell(x, y, 1, b)
    axes.set(xlim=(0, m), ylim=(n, 0))
    step = math.ceil(n / 60)
    ticks = [y for y, (label, _) in enumerate(grid.rows) if not label.isdigit() or int(label) % step == 0]
    axes.set_yticks([y + 0.5 for y in ticks], [grid.rows[y][0] for y in ticks], fontsize=min(8, max(font + 0.5, 5)))
    axes.xaxis.tick_top()
    heading = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if slanted else {"ha": "center"}
    axes.set_xticks([x + 0.5 for x in range(len(grid.columns))], grid.columns, fontsize=7.5 if m <= 16 else 6, **heading)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    axes.annotate("layer", (0, 1), xytext=(-3, 4.7), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=7.5)
    figure.text(left / width, 1 - 0.14 / tall, title, fontsize=11, fontweight="bold", va="top")

    handles = [Rectangle((0, 0), 1, 1, facecolor=_hex(colour(b)), edgecolor="white") for _, b, _ in grid.legend]
    axes.legend(handles, [_legend_line(*item) for item in grid.legend], loc="upper left", bbox_to_anchor=(1 + 0.2 / (m * wide), 1),
                frameon=False, fontsize=8, title="format: mean stored bits", title_fontsize=8.5, alignment="left", handlelength=1.3,
                handleheight=1.3, borderaxespad=0, borderpad=0, labelspacing=0.5)
    _save(figure, path)


# -- the Pareto plot ---------------------------------------------------------------------------------------------------------------


def front_points(table: CostTable, front: Sequence[FrontPoint], series: str = "mixed") -> list[dict]:
    """Points for :func:`pareto_svg`: the front, and beside it every candidate that is possible for all units as a uniform plan."""
    points = [{"series": series, "stored_bits": table.stored_bits(p.nbytes), "value": p.loss} for p in front]
    for fmt in table.formats:
        loss, nbytes = table.uniform(fmt)
        if math.isfinite(loss):
            points.append({"series": "uniform", "stored_bits": table.stored_bits(nbytes), "value": loss, "label": fmt})
    return points


def pareto_svg(points: Sequence[Mapping], path: str | os.PathLike, *, ylabel: str = "estimated loss", title: str = "",
               log: bool = True) -> None:
    """Draws loss against stored bits, one colour and mark per series, and writes the points to a CSV of the same name beside it.

    A point is a mapping with ``stored_bits`` and ``value``, and optionally ``series``, ``label`` and ``error`` (half an error bar). The
    points of series ``uniform`` stand alone, those of any other are joined by a line. ``log``: logarithmic values, if all are positive.
    Raises MxqError if matplotlib is not installed, PlanError for points without these keys.
    """
    bad = next((p for p in points if not {"stored_bits", "value"} <= set(p)), None)
    if not points or bad is not None:
        raise PlanError(f"Pareto plot of {len(points)} points",
                        f"every point needs stored_bits and value, found {dict(bad) if bad is not None else 'none'}",
                        'pass for example {"series": "mixed", "stored_bits": 3.5, "value": 0.02}')
    figure = _figure(path, (6.4, 4.2))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    # Okabe and Ito (2008), without their yellow, which is too faint on white; the marks differ too, for print and so that 42 series do.
    palette, marks = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000"), "osD^vPX"
    for k, series in enumerate(dict.fromkeys(p.get("series", "") for p in points)):
        these = sorted((p for p in points if p.get("series", "") == series), key=lambda p: p["stored_bits"])
        dense = len(these) > 40
        style = {"color": palette[k % 6], "marker": "" if dense else marks[k % 7], "markersize": 5, "linewidth": 1.6,
                 "label": series or None,
                 "linestyle": "none" if series == "uniform" else "-", "capsize": 2}
        axes.errorbar([p["stored_bits"] for p in these], [p["value"] for p in these], yerr=[p.get("error") or 0.0 for p in these]
                      if any(p.get("error") for p in these) else None, **style)
        for p in these:
            if p.get("label"):
                axes.annotate(str(p["label"]), (p["stored_bits"], p["value"]), xytext=(5, 4), textcoords="offset points", fontsize=7.5,
                              color="#444444")
    if log and all(p["value"] > 0 for p in points):
        axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel(ylabel)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    if title:
        axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    if any(p.get("series") for p in points):
        axes.legend(frameon=False)
    _save(figure, path)
    keys = list(dict.fromkeys(["series", "stored_bits", "value", *(k for p in points for k in p)]))
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    write_text(Path(path).with_suffix(".csv"), out.getvalue())


# -- tables ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its value in a row, its heading, and the format spec of a number (``".3f"``, ``",d"``)."""

    key: str
    title: str | None = None
    spec: str = ""

    def text(self, row: Mapping) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return format(value, self.spec) if self.spec and isinstance(value, int | float) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Table:
    """Cells as text, ready for Markdown or a terminal. A column stands right-aligned if all its cells are numbers (units may follow)."""

    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        for row in self.cells:
            if len(row) != len(self.header):
                raise MxqError(f"table of {len(self.header)} columns", f"a row has {len(row)} cells",
                               f"give every row {len(self.header)} cells")

    @property
    def right(self) -> list[bool]:
        number = re.compile(r"-|[+-]?[\d,]*\.?\d+(e[+-]?\d+)?( ?[\w/%]+)?|[+-]?inf|nan", re.IGNORECASE)
        return [bool(self.cells) and all(number.fullmatch(row[i]) for row in self.cells) for i in range(len(self.header))]

    def markdown(self) -> str:
        """GitHub's tables, padded so that the source reads as a table too."""
        header, *rows = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in (self.header, *self.cells)]
        widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
        lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, self.right, strict=True)] for row in (header, *rows)]
        lines.insert(1, ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, self.right, strict=True)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self, title: str | None = None):
        """The same as a rich Table, for a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        out = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(self.header, self.right, strict=True):
            out.add_column(Text(name), justify="right" if right else "left")
        for row in self.cells:
            out.add_row(*map(Text, row))  # Text: square brackets in a cell are no markup
        return out


def table(rows: Sequence[Mapping], columns: Sequence[Column | str]) -> Table:
    """A :class:`Table` of mappings; a column given as a string is its key and its heading. A missing value or None shows as ``-``."""
    columns = [c if isinstance(c, Column) else Column(c) for c in columns]
    return Table(tuple(c.title or c.key.replace("_", " ") for c in columns), tuple(tuple(c.text(row) for c in columns) for row in rows))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown of finished cells. Raises MxqError if a row has another number of cells than the header."""
    return Table(tuple(map(str, header)), tuple(tuple(map(str, row)) for row in rows)).markdown()
