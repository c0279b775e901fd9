"""The function runs once, after the module, whether that is imported before or later."""

import subprocess
import sys
from pathlib import Path

MODULE = "value = 1\n"
LINES = """
import sys
sys.path.insert(0, {folder!r})
from spectrim.tools.import_hook import when_imported
found = []
{lines}
print(found, len([finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]))
"""


def printed(folder: Path, lines: str) -> str:
    (folder / "package_of_test").mkdir(exist_ok=True)
    (folder / "package_of_test" / "__init__.py").write_text("")
    (folder / "package_of_test" / "inner.py").write_text(MODULE)
    code = LINES.format(folder=str(folder), lines=lines)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


CALL = 'when_imported("package_of_test.inner", lambda: found.append(sys.modules["package_of_test.inner"].value))\n'
# spectrim itself waits for transformers and for lm-evaluation-harness, which are not imported here.
WAITING = 2


def test_it_is_called_after_a_later_import_once(tmp_path: Path) -> None:
    lines = CALL + "import package_of_test.inner, importlib\nfrom package_of_test import inner\nimportlib.reload(inner)"
    assert printed(tmp_path, lines) == f"[1] {WAITING}"


def test_it_is_called_at_once_after_an_earlier_import(tmp_path: Path) -> None:
    assert printed(tmp_path, "import package_of_test.inner\n" + CALL) == f"[1] {WAITING}"


def test_it_is_not_called_without_the_module(tmp_path: Path) -> None:
    assert printed(tmp_path, CALL + "import package_of_test") == f"[] {WAITING + 1}"


def test_a_module_that_fails_does_not_call_it(tmp_path: Path) -> None:
    (tmp_path / "broken_of_test.py").write_text("raise ImportError('no')")
    lines = CALL.replace("package_of_test.inner", "broken_of_test")
    lines += "try:\n    import broken_of_test\nexcept ImportError:\n    pass"
    assert printed(tmp_path, lines) == f"[] {WAITING + 1}"
