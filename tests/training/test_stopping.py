"""What a run loses when it is stopped or breaks off: nothing that was trained, and no evaluation."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from como_jax.errors import RunError
from como_jax.training.checkpoint import Checkpointer
from configs import pretrain_como
from experiments import pretrain as command
from experiments.pretrain import pretrain

Judge = Callable[..., dict[str, float]]


@pytest.fixture
def run(tabletop_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Starts or resumes a smoke run of two steps with its own way to judge; returns the last step."""

    def start(judge: Judge, **changes: object) -> int:
        monkeypatch.setattr(command, "make_evaluator", lambda *_: judge)
        config = pretrain_como.get_config("smoke")
        config.update_from_flattened_dict({"data.mixture": str(tabletop_dataset), "train.num_steps": 2, **changes})
        return int(pretrain(config, tmp_path / "run").step)

    return start


def judge_well(params: object, step: int, writer: object) -> dict[str, float]:
    writer.scalars(step, {"eval_val/score": 1.0})
    return {"eval_val/score": 1.0}


def judge_badly(params: object, step: int, writer: object) -> dict[str, float]:
    raise OSError("the simulator is gone")


def logged(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_step(workdir: Path) -> int | None:
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.latest_step()
    finally:
        checkpointer.close()


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(run: Callable[..., int], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(OSError, match="the simulator is gone"):
        run(judge_badly)
    assert saved_step(workdir) == 2
    for _ in range(2):
        assert run(judge_well) == 2
    assert [line["step"] for line in logged(workdir) if "eval_val/score" in line] == [2]
    assert [line["step"] for line in logged(workdir) if "train/loss" in line] == [1, 2]


def test_sigterm_leaves_the_evaluation_to_the_resumed_run(run: Callable[..., int], tmp_path: Path) -> None:
    judged: list[int] = []

    def judge(params: object, step: int, writer: object) -> dict[str, float]:
        judged.append(step)
        return judge_well(params, step, writer)

    def stop_after_one(step: int, _: object) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "CollapseWatch", lambda _: stop_after_one)
        assert run(judge, **{"train.evaluate_every": 1, "train.num_steps": 3}) == 2
    assert saved_step(tmp_path / "run") == 2 and judged == [1]
    assert run(judge, **{"train.evaluate_every": 1, "train.num_steps": 3}) == 3
    assert judged == [1, 2, 3]


def test_further_signals_do_not_break_the_save(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Checkpointer.wait

    def wait_under_fire(self: Checkpointer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait(self)
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_at_once(step: int, _: object) -> None:
        monkeypatch.setattr(Checkpointer, "wait", wait_under_fire)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(Checkpointer, "close", lambda self: self._manager.close())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "CollapseWatch", lambda _: stop_at_once)
        stopped = run(judge_well, **{"train.num_steps": 50})
    monkeypatch.undo()
    assert stopped < 50 and saved_step(tmp_path / "run") == stopped


def test_a_command_that_fails_before_the_first_step_can_be_mended(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="/nowhere holds no run"):
        run(judge_well, **{"encoder.init_from": "/nowhere"})
    assert not (tmp_path / "run" / "config.json").exists()
    assert run(judge_well) == 2
