"""Tracking by TensorBoard, read back by its own reader."""

from pathlib import Path

import pandas as pd
import pytest

from spectrim.runs.tracking.session import About, Results
from spectrim.runs.tracking.tensorboard_events import TensorBoard

pytest.importorskip("tensorboard", reason="needs pip install 'spectrim[tensorboard]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_event_file_holds_numbers_tables_and_the_status(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session = TensorBoard(dir=str(tmp_path)).start(About("0" * 16, "mlp-digits", "table2", "lossless"))
    session.log({"loss": 0.5, "epoch": 3.0}, "epoch")
    layers = pd.DataFrame({"layer": ["fc"], "rank": [3]})
    session.finish(Results([], {"test/loss": 1.5, "commit": "c0ffee"}, {"layers": layers}, {"plan.json": b"{}"}), 0)
    read = EventAccumulator(str(tmp_path / "table2" / "mlp-digits"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(3, 0.5)]
    assert [event.value for event in read.Scalars("summary/test/loss")] == [1.5]
    texts = {name.partition("/text_summary")[0] for name in read.Tags()["tensors"]}
    assert texts == {"settings", "summary/commit", "layers", "plan.json", "status"}
