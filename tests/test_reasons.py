"""The page on one's own network lists the reasons for which a layer stays dense as the library prints them, and all."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "own_network.md"
SOURCE = ROOT / "src" / "spectrim"
HEADING = "| reason in `result.notes` |"
# The functions and constants that say why a layer stays dense.
PLACES = {
    "surgery/find_layers.py": [
        "UNCALLED",
        "ELSEWHERE",
        "factorable",
        "_written_by_modes",
        "_leave_together",
        "_reason",
        "_held_by_torch",
        "_unfit_for_replacement",
    ],
    "surgery/unpacking.py": ["SHARED"],
    "surgery/lora.py": ["ADAPTED"],
    "surgery/stand_ins.py": ["MISLED"],
    "surgery/layer_choice.py": ["reason"],
    "factored/unpacked/kinds.py": ["refusal"],
    "factored/unpacked/attention.py": ["refusal"],
    "factored/unpacked/experts.py": ["refusal"],
    "statistics/gate_rows.py": ["MIXED", "OUTSIDE"],
    "statistics/switched_off.py": ["SWITCHED_OFF"],
    "algorithms/shared/workbench.py": ["of", "_that_runs"],
    "algorithms/shared/walk.py": ["_opened"],
    "algorithms/shared/tied_curve.py": ["LEFT"],
}


def said(value: ast.AST) -> Iterator[str]:
    """Yield the texts of more than two words inside an expression, with an ellipsis for each part that is computed."""
    if isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in value.values)
    elif isinstance(value, ast.Constant) and isinstance(value.value, str) and len(value.value.split()) > 2:
        yield value.value
    else:
        for part in ast.iter_child_nodes(value):
            yield from said(part)


def put(node: ast.AST) -> ast.expr | None:
    """Return the expression that a statement returns, or puts into something that has a name already."""
    if isinstance(node, ast.Assign):
        return None if isinstance(node.targets[0], ast.Name) else node.value
    return node.value if isinstance(node, ast.Return | ast.AugAssign) else None


def reasons_in(path: str, names: list[str]) -> Iterator[str]:
    """Yield what functions return or put under a name, and what constants hold."""
    left = set(names)
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            left.discard(node.name)
            for value in filter(None, map(put, ast.walk(node))):
                yield from said(value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            left.discard(node.targets[0].id)
            yield from said(node.value)
    assert not left, f"{path} has no {left}"


def rows() -> list[str]:
    table = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def fits(row: str, reason: str) -> bool:
    return re.fullmatch(re.escape(row).replace("…", ".+"), reason) is not None


def test_the_page_lists_every_reason_as_it_is_printed_and_no_other() -> None:
    listed, printed = rows(), {reason for place in PLACES.items() for reason in reasons_in(*place)}
    assert len(printed) > 25 and len(set(listed)) == len(listed)
    assert [reason for reason in sorted(printed) if not any(fits(row, reason) for row in listed)] == []
    assert [row for row in listed if not any(fits(row, reason) for reason in printed)] == []
