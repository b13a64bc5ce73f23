"""Where metrics go beside metrics.jsonl."""

import json
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.runtime.trackers import numbers, open_trackers
from opcd.training.run import train

LOGGING = """
import json

class Tracker:
    def __init__(self, folder):
        self.file = open(folder / "seen.jsonl", "w")
    def log(self, step, values):
        print(json.dumps([step, sorted(values)]), file=self.file)
    def close(self):
        print(json.dumps("closed"), file=self.file, flush=True)
"""


def test_a_users_own_gets_every_step(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LOGGING)
    settings |= {"steps": 3, "test_data": None, "trackers": f"python:{tmp_path}/own.py:Tracker"}
    train(TrainConfig(**settings))
    lines = (Path(settings["output_dir"]) / "seen.jsonl").read_text().splitlines()
    *steps, end = map(json.loads, lines)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert {"loss", "grad_norm", "step_time_s"} <= set(steps[0][1])
    assert "validation/accuracy" in steps[2][1]
    assert end == "closed"


def test_one_that_raises_ends_no_run(
    settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own.py").write_text(
        LOGGING.replace("print(json.dumps([step", "1 / 0; print(([step")
    )
    settings |= {"steps": 2, "test_data": None, "trackers": f"python:{tmp_path}/own.py:Tracker"}
    assert train(TrainConfig(**settings)).steps_done == 2
    assert caplog.messages == [
        "a tracker is left out from here on: ZeroDivisionError: division by zero"
    ]


def test_one_that_cannot_be_closed_costs_no_model(
    settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Mine:\n"
        "    def __init__(self, folder): pass\n"
        "    def log(self, step, values): pass\n"
        "    def close(self): raise OSError('no network')\n"
    )
    train(TrainConfig(**settings | {"steps": 1, "trackers": f"python:{mine}:Mine"}))
    assert (Path(settings["output_dir"]) / "final" / "config.json").is_file()
    assert "a tracker was not closed: OSError: no network" in caplog.text
    mine.write_text("def Mine(folder): raise OSError('no network')")
    with pytest.raises(InputError, match=r"tracker python:.*Mine must return .* OSError: no netw"):
        open_trackers(f"python:{mine}:Mine", tmp_path)


def test_numbers_alone_are_logged() -> None:
    metrics = {
        "step": 3,
        "loss": 0.5,
        "divergence": None,
        "validation": {"accuracy": 1.0, "x": "y"},
    }
    assert numbers(metrics) == {"loss": 0.5, "validation/accuracy": 1.0}


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tracker,) = open_trackers("tensorboard", tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    tracker.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandb", "must be tensorboard or python:FILE.py:function, got 'wandb'"),
        ("python:own.py", "must name a file and a function"),
        ("python:nowhere.py:make", "nowhere.py is not there"),
        ("python:pathlib:Path", r"must return an object with log\(step, values\) and close\(\)"),
        ("python:pathlib:nothing", "has no 'nothing'"),
    ],
)
def test_what_is_refused(names: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_trackers(names, tmp_path)
