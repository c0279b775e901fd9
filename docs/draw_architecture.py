"""Draw ``architecture.svg``: the floors of the package, and the way of a run through them.

The floors come from the table of ``architecture.md``, so that page and picture agree. To draw it anew:
``python docs/draw_architecture.py``.
"""

import re
from html import escape
from itertools import pairwise
from pathlib import Path

DOCS = Path(__file__).resolve().parent
WIDTH, ROW, TOP, LEFT, LANE = 1180, 36, 48, 20, 380  # pixels; the way of a run begins at LANE
COLOURS = {14: "#fdf1dc", 8: "#e3eefa", 6: "#e6f4ea", 1: "#f2f2f2"}  # of this floor and those above it
INK, WAY, PALE = "#222222", "#c2410c", "#666666"

# The folder of each station of a run, its label, and on which side of the station the label stands.
STATIONS = (
    ("cli", "compose the configuration,|sign it, look for its record", "right"),
    ("runs", "build the task", "right"),
    ("models", "the network|and its data", "below"),
    ("algorithms", "open a|workbench", "above"),
    ("decomposers", "decompose|each layer", "below"),
    ("statistics", "a gradient:|first order|of every rank", "right"),
    ("algorithms", "choose a plan", "above"),
    ("surgery", "replace|the layers", "below"),
    ("runs", "measure dense|and compressed", "above"),
    ("records", "write one|record", "below"),
    ("report", "a script makes|the table", "above"),
)


def floors() -> list[tuple[int, str]]:
    """Return the number of each floor and its folders, from the top down."""
    rows: dict[int, list[str]] = {}
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for number, folders in re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE):
        rows.setdefault(int(number), []).extend(re.findall(r"`(\w+)`", folders))
    return [(number, " · ".join(names)) for number, names in sorted(rows.items(), reverse=True)]


def text(x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "start", more: str = "") -> str:
    """Return a line of text; ``more`` are further attributes."""
    given = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" {more}'
    return f"<text {given}>{escape(words)}</text>"


def drawn() -> str:
    """Return the picture as SVG."""
    rows = floors()
    middle = {number: TOP + ROW * place + ROW / 2 for place, (number, _) in enumerate(rows)}
    height = TOP + ROW * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>The floors of the package, and the way of a run through them</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{WAY}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(LEFT, 30, "The floors, and the folders on them", 15, more='font-weight="bold"'),
        text(LANE, 30, "The way of a run, from a configuration to a table", 15, WAY, more='font-weight="bold"'),
    ]
    for number, names in rows:
        y = middle[number] - ROW / 2
        colour = next(shade for lowest, shade in COLOURS.items() if number >= lowest)
        parts += [
            f'<rect x="{LEFT}" y="{y + 2:g}" width="{WIDTH - 2 * LEFT}" height="{ROW - 4}" rx="4" fill="{colour}"/>',
            text(LEFT + 34, middle[number] + 5, str(number), 13, PALE, "end"),
            text(LEFT + 50, middle[number] + 5, names, 14, more='font-family="Menlo, Consolas, monospace"'),
        ]
    step = (WIDTH - LEFT - LANE - 60) / (len(STATIONS) - 1)
    floor_of = {folder: number for number, names in rows for folder in names.split(" · ")}
    places = [(LANE + 20 + step * place, middle[floor_of[folder]]) for place, (folder, _, _) in enumerate(STATIONS)]
    for (x, y), (to_x, to_y) in pairwise(places):
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        near, far = 12 / length, 1 - 14 / length
        ends = [f"{x + (to_x - x) * part:.1f} {y + (to_y - y) * part:.1f}" for part in (near, far)]
        parts.append(f'<path d="M{ends[0]} L{ends[1]}" stroke="{WAY}" stroke-width="1.6" marker-end="url(#tip)"/>')
    for count, ((x, y), (_, label, side)) in enumerate(zip(places, STATIONS, strict=True), start=1):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:g}" r="11" fill="{WAY}"/>')
        parts.append(text(round(x, 1), y + 4.5, str(count), 13, "white", "middle", 'font-weight="bold"'))
        lines = label.split("|")
        first = {"above": y - 18 - 15 * (len(lines) - 1), "below": y + 26, "right": y + 4 - 7 * (len(lines) - 1)}[side]
        at, anchor = (x + 18, "start") if side == "right" else (x, "middle")
        # The white edge keeps a label readable where the way crosses it.
        edge = 'paint-order="stroke" stroke="white" stroke-width="4" stroke-opacity="0.8" stroke-linejoin="round"'
        parts += [
            text(round(at, 1), first + 15 * place, line, 12, INK, anchor, edge) for place, line in enumerate(lines)
        ]
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (DOCS / "architecture.svg").write_text(drawn(), encoding="utf-8")
