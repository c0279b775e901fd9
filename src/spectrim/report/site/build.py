"""Write the report: a front page, a page per table and figure, and a page per run."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.records import name_of
from spectrim.report.site import runs, tables
from spectrim.report.site.tables import Shown
from spectrim.tools import files

HERE = Path(__file__).parent
CLAIMS = "table2_claims"  # the table that the front page shows


def build(results: Path, out: Path, only: Sequence[str] = ()) -> int:
    """Write the report into a new folder ``out``. Return the number of its pages.

    An older report there is replaced, any other folder is not.

    ``results``: folder of ``tables``, ``figures`` and ``records``.
    ``only``: names of the tables and figures to show, with their runs; all by default.
    Raises ``UserError`` where a table or a record cannot be read, where nothing has a name of ``only``, or where
    ``out`` holds anything else than a report.
    """
    every = {table.name: table for table in tables.read_all(results)}
    unknown = [name for name in only if name not in every]
    if unknown:
        raise UserError(f"no table or figure is called {unknown[0]}; choose from: {' '.join(every)}")
    shown = [table for name, table in every.items() if not only or name in only]
    if out.exists() and not (out / "report.css").is_file():
        raise UserError(f"{out} exists and is no report: choose another folder, or remove it")
    try:
        with files.scratch(out.absolute().parent) as folder:
            count = _write(shown, results, folder)
            if out.exists():
                shutil.rmtree(out)
            folder.rename(out)
    except OSError as error:
        raise files.refusal(out, error) from error
    return count


def _write(shown: Sequence[Shown], results: Path, folder: Path) -> int:
    pages = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    for static in (HERE / "static").iterdir():
        shutil.copyfile(static, folder / static.name)
    (folder / "figures").mkdir()
    for name in (picture for table in shown for picture in table.pictures):
        shutil.copyfile(results / "figures" / name, folder / "figures" / name)
    claims = [_verdict_first(table) for table in shown if table.name == CLAIMS]
    counted = Counter(row.cells[0] for table in claims for row in table.rows).most_common()
    _page(pages, "index.html", folder / "index.html", up="", shown=shown, claims=claims, counted=counted)
    for table in shown:
        _page(pages, "table.html", folder / "tables" / f"{table.name}.html", up="../", table=table)
    users: dict[str, list[Shown]] = {}
    for table in shown:
        for name in dict.fromkeys(name for row in table.rows for name in row.records):
            users.setdefault(name, []).append(table)
    for name, own in users.items():
        path = results / "records" / f"{name}.json"
        record = records.read(path)
        if name_of(record) != name:
            raise UserError(f"{path} is the record {name_of(record)}: move it to the place of that name")
        up = "../" * (name.count("/") + 1)
        _page(pages, "run.html", folder / "runs" / f"{name}.html", up=up, run=runs.described(record), users=own)
    return 1 + len(shown) + len(users)


def _verdict_first(table: Shown) -> Shown:
    """Return a table with its last column first, because a phone shows the first columns."""
    rows = [replace(row, cells=[row.cells[-1], *row.cells[:-1]]) for row in table.rows]
    return replace(table, headers=[table.headers[-1], *table.headers[:-1]], rows=rows)


def _page(pages: Environment, template: str, path: Path, **given: Any) -> None:
    """Render a page. ``up`` leads from it to the folder of the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pages.get_template(template).render(**given), encoding="utf-8")
