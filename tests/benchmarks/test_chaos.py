"""The campaign of faults finds what it looks for, and a short one finds nothing in this project."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectrim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "chaos"))

import campaign  # noqa: E402
import fuzz  # noqa: E402
from faults import Fault, run  # noqa: E402
from targets import Target  # noqa: E402


def careless(folder: Path) -> None:
    """Write a file in two parts: a kill between them leaves half of it, which the next run takes for whole."""
    path = folder / "careless.txt"
    if not path.exists():
        path.write_text("half of it\n")
        with path.open("a") as file:
            file.write("the other half\n")


def loud(folder: Path) -> None:
    (folder / "loud.txt").write_text("lets errors of the disk through as they are")


def littering(folder: Path) -> None:
    temporary = folder / f"{random.SystemRandom().random()}.tmp"
    temporary.write_text("left behind after a kill")
    temporary.rename(folder / "littering.txt")


@pytest.mark.parametrize(
    ("work", "fault", "complaint"),
    [
        (careless, Fault(1, signal=9), "changed: careless.txt"),
        (careless, Fault(1, error=28), "Traceback"),
        (loud, Fault(0, error=13), "PermissionError"),
        (littering, Fault(1, signal=9), "left behind: "),
    ],
    ids=["half a file", "raw error", "raw refusal", "litter"],
)
def test_a_careless_writer_is_caught(work, fault, complaint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = Target("careless", work)
    folder = tmp_path / "whole"
    folder.mkdir()
    run(work, folder)
    unbroken = campaign.Unbroken(1, 0.1, campaign.targets.contents(folder))
    found = campaign.attacked(target, fault, unbroken, tmp_path)
    assert found and complaint in found
    assert campaign.attacked(target, Fault(99, signal=9), unbroken, tmp_path) is None  # a call that never comes


def test_what_hangs_and_workers_that_stay_are_caught(tmp_path: Path) -> None:
    def hangs(folder: Path) -> None:
        time.sleep(600)

    def forgets(folder: Path) -> None:
        subprocess.Popen(["sleep", "600"])

    assert run(hangs, tmp_path, patience=1).fits(Fault()) == "it hangs"
    assert run(forgets, tmp_path, patience=1).fits(Fault()) == "its workers outlive it"


def test_a_signal_reaches_a_worker_and_not_its_parent(tmp_path: Path) -> None:
    def parent(folder: Path) -> None:
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # popen_loky"])
        raise SystemExit("the worker was killed" if worker.wait() == -9 else 0)

    fault = Fault(signal=9, worker=True)
    end = run(parent, tmp_path, fault, patience=60)
    assert end.fits(fault) is None and end.message.startswith("the worker was killed")
    assert fault.kind == "SIGKILL to a worker at a random moment"


def test_a_slow_reader_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "READERS", [fuzz.Reader("slow", "plan.json", fuzz._make_plan, read)])
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    *_, complaint = list(fuzz.trials(random.Random(0), 1, quick=True))[-1]
    assert complaint and "seconds of CPU" in complaint


def test_a_careless_reader_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        if b"{" not in (folder / "plan.json").read_bytes():
            raise UserError("plan.json is no plan")
        if (folder / "plan.json").read_bytes()[0] != ord("{"):
            raise KeyError("layer")

    monkeypatch.setattr(fuzz, "READERS", [fuzz.Reader("careless", "plan.json", fuzz._make_plan, read)])
    complaints = [complaint for *_, complaint in fuzz.trials(random.Random(0), 1, quick=True) if complaint]
    assert complaints and "KeyError" in complaints[0]


def test_a_short_campaign_finds_nothing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos" / "campaign.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert " tried, 0 failed" in done.stdout
