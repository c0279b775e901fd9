"""No tracking."""

import pytest

from spectrim.runs.tracking.none import NoTracking
from spectrim.runs.tracking.session import About


def test_nobody_is_told_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert NoTracking().start(About("0" * 16, "run", "table2", "lossless")) is None
    assert capfd.readouterr() == ("", "")
