"""torchvision beside a torch that its operators were not built for."""

import subprocess
import sys
from pathlib import Path

import pytest

from spectrim.errors import UserError
from spectrim.tools import torchvision_shim


def test_torchvision_imports_and_a_second_call_does_nothing() -> None:
    code = "from spectrim.tools.torchvision_shim import prepare; prepare(); prepare.cache_clear(); prepare()"
    code += "; import torchvision; prepare.cache_clear(); prepare(); torchvision.models.resnet18"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_folder_without_operators_that_load(tmp_path: Path) -> None:
    assert not torchvision_shim._operators_load(tmp_path)
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert not torchvision_shim._operators_load(tmp_path)


def test_torchvision_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torchvision_shim.importlib.util, "find_spec", lambda _name: None)
    torchvision_shim.prepare.cache_clear()
    with pytest.raises(UserError, match="torchvision is not installed"):
        torchvision_shim.prepare()
