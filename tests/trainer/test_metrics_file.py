import json
import os
from pathlib import Path

import pytest

from trainer.errors import CheckpointError, CheckpointReason
from trainer.metrics import MetricsLog


def lines_of(path: Path) -> list[dict[str, object]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_every_step_has_one_line_whatever_is_rolled_back_or_resumed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3, 2, 3, 4):
        log.append(step, {"loss": 1.0 / step, "times": step})
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4]
    resumed = MetricsLog(path)
    resumed.append(3, {"loss": float("nan")})
    resumed.append(4, {"loss": 0.5})
    assert lines_of(path)[2:] == [{"step": 3, "loss": None}, {"step": 4, "loss": 0.5}]
    anew = MetricsLog(path)
    anew.append(1, {"loss": 2.0})
    assert lines_of(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("torn", ['{"step":3,"lo', '{"step":3,"loss":1}', "\0\0\0\n", "[]\n", '{"step":2,"loss":1}\n'])
def test_what_a_kill_left_half_written_is_dropped(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        MetricsLog(path).append(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write(torn)
    MetricsLog(path).append(4, {"loss": 0.1})
    assert [line["step"] for line in lines_of(path)] == [1, 2, 4]


def test_a_full_disk_tears_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log, write = MetricsLog(path), os.write
    log.append(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(CheckpointError) as caught:
            log.append(2, {"loss": 1.0})
    assert caught.value.reason == CheckpointReason.DISK
    assert [line["step"] for line in lines_of(path)] == [1]
    log.append(3, {"loss": 1.0})
    assert [line["step"] for line in lines_of(path)] == [1, 3]
