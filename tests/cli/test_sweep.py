"""Sweeps: which points there are, that finished ones stay, what Optuna is told, and the batch script of an array."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kexue.cli import fit, sweep_report
from kexue.cli import main as cli
from kexue.cli import sweep as command
from kexue.cli.points import drawn, grid, make_points, read_sweep, split_words
from kexue.errors import InputError

LR = "model.optimizer.lr=tag(log,interval(1e-4,1e-1))"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def score(words: list[str]) -> float:
    """What stands for a training: best at a rate of 0.01 and 16 channels."""
    values = dict(word.split("=", 1) for word in words)
    rate, channels = float(values["model.optimizer.lr"]), int(values.get("model.channels", 16))
    return 1 - 0.1 * abs(math.log10(rate) + 2) - 0.01 * abs(channels - 16)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let points train in no time; returns the words of all that did."""
    calls: list[list[str]] = []

    def run(words: list[str]) -> int:
        calls.append(words)
        folder = Path(words[-1].removeprefix("run_dir=").strip("'"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()
        if not (folder / "fail").exists():
            (folder / "metrics.json").write_text(json.dumps({"val/digit_accuracy": score(words), "train/loss": 1.0}))
            return 0
        raise RuntimeError("broken")

    def start(sweep: Any, number: int) -> subprocess.Popen[bytes]:
        try:
            code = command._run_point(sweep, number, [])
        except RuntimeError:
            code = 1
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])

    monkeypatch.setattr(fit, "run", run)
    monkeypatch.setattr(command, "_start", start)
    return calls


def numbers(calls: list[list[str]]) -> list[str]:
    return [Path(words[-1].strip("'")).name for words in calls]


def test_a_grid_is_every_combination() -> None:
    fixed, varied = split_words(["seed=3", "model.channels=8,16", "trainer.max_epochs=range(1,4)"])
    assert fixed == ["seed=3"]
    points = grid(varied)
    assert len(points) == 6
    assert points[0] == ["model.channels=8", "trainer.max_epochs=1"]
    assert points[-1] == ["model.channels=16", "trainer.max_epochs=3"]


def test_random_points_follow_the_seed_and_their_intervals() -> None:
    _, varied = split_words([LR, "model.channels=int(interval(4,9))", "model.num_blocks=1,2"])
    points = drawn(varied, 200, seed=1)
    assert points == drawn(varied, 200, seed=1) != drawn(varied, 200, seed=2)
    values = [dict(word.split("=") for word in point) for point in points]
    rates = [float(value["model.optimizer.lr"]) for value in values]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    below = sum(rate < 10**-2.5 for rate in rates)  # half of them, by the logarithm
    assert 70 < below < 130
    assert {int(value["model.channels"]) for value in values} <= set(range(4, 10))
    assert {value["model.num_blocks"] for value in values} == {"1", "2"}
    _, few = split_words(["model.num_blocks=1,2", "model.channels=4,8"])
    assert sorted(drawn(few, 50, seed=0)) == sorted(grid(few))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "nothing varies: give a word several values"),
        (["seed=1,2", "sampler=best"], "sampler=best: no such sampler; choose from: grid, optuna, random"),
        (["seed=1,2", "sampler=random", "trials=0"], "trials=0: use a whole number of 1 or more"),
        (["seed=1,2", "parallel=x"], "parallel=x: use a whole number of 1 or more"),
        ([LR], "a grid lists its values; type sampler=random or sampler=optuna"),
        (["model.optimizer.lr=interval(2,1)", "sampler=random"], "from a smaller number to a larger one"),
        (["model.channel=1,2"], "model.channel: no such key; did you mean model.channels?"),
        (["model.channels=8,big"], "model.channels"),
        (["seed=1,2", "goal=most"], "goal=most: use min or max"),
        (["seed=1,2", "run_dir=x"], "every point has a run directory of its own; type sweep_dir=PATH"),
        (["run=nowhere"], "no sweep.json there; give the folder that kexue sweep made"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_made(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["sweep", *words]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_finished_points_are_not_run_again(trained: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.optimizer.lr=1e-3,1e-2", "model.channels=8,16", "sweep_dir=s", "parallel=2"]
    Path("s/0001").mkdir(parents=True)
    Path("s/0001/fail").touch()
    assert cli.main(["sweep", *words]) == 1
    assert "1 of 4 points failed, the first is 0001 with exit code 1; see " in capsys.readouterr().err
    assert numbers(trained) == ["0000", "0001", "0002", "0003"]
    assert trained[0][:2] == ["model.optimizer.lr=0.001", "model.channels=8"]
    Path("s/0001/fail").unlink()
    assert cli.main(["sweep", "run=s"]) == 0
    assert numbers(trained)[4:] == ["0001"]
    assert cli.main(["sweep", "run=s"]) == 0
    assert len(trained) == 5
    assert cli.main(["sweep", *words]) == 2
    assert "holds a sweep already; go on with kexue sweep run=" in capsys.readouterr().err

    with Path("s/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert rows[0]["model.channels"] == "16"
    assert float(rows[0]["model.optimizer.lr"]) == 0.01
    assert float(rows[0]["val/digit_accuracy"]) == 1.0
    assert Path("s/parallel_coordinates.png").read_bytes().startswith(b"\x89PNG")


def test_optuna_learns_from_the_points(trained: list[list[str]]) -> None:
    pytest.importorskip("optuna")
    words = [LR, "model.channels=4,16,64", "sampler=optuna", "trials=25", "sweep_dir=s"]
    Path("s/0003").mkdir(parents=True)
    Path("s/0003/fail").touch()
    assert cli.main(["sweep", *words]) == 1
    asked = json.loads(Path("s/0003/point.json").read_text())
    Path("s/0003/fail").unlink()
    assert cli.main(["sweep", "run=s"]) == 0
    assert numbers(trained).count("0003") == 2
    assert json.loads(Path("s/0003/point.json").read_text()) == asked  # asked once
    scores = [
        json.loads(Path(f"s/{number:04d}/metrics.json").read_text())["val/digit_accuracy"] for number in range(25)
    ]
    assert sum(scores[15:]) / 10 > sum(scores[:10]) / 10
    assert max(scores) > 0.95


def test_the_objective_must_be_there(trained: list[list[str]]) -> None:
    sweep = command._make({**command._OF_A_NEW_ONE, "sampler": "random", "trials": "2", "objective": "test/f1"}, [LR])
    with pytest.raises(InputError, match="objective=test/f1: the run has no such number; choose from: val/digit_acc"):
        command._run_point(sweep, 0, [])


def test_a_point_takes_the_words_of_its_job(trained: list[list[str]]) -> None:
    assert cli.main(["sweep", "model.optimizer.lr=1e-3,1e-2", "seed=7", "sweep_dir=s"]) == 0
    assert cli.main(["sweep", "run=s", "point=1", "trainer.devices=2"]) == 0
    place = Path("s/0001").resolve()
    assert trained[-1] == ["seed=7", "model.optimizer.lr=0.01", "trainer.devices=2", f"run_dir='{place}'"]
    assert cli.main(["sweep", "run=s", "point=9"]) == 2
    assert cli.main(["sweep", "run=s", "model.channels=4"]) == 2


def test_the_batch_script_is_one_array(trained: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    cluster = ["cluster=slurm", "cluster.device=cpu", "cluster.tasks_per_node=2", "parallel=3", "--dry-run"]
    assert cli.main(["sweep", "model.optimizer.lr=1e-3,1e-2", "seed=range(0,3)", "sweep_dir=s", *cluster]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5%3" in script
    assert "#SBATCH --ntasks-per-node=2" in script
    assert " sweep run=" in script
    assert "trainer.devices=2" in script
    assert script.count('"point=$SLURM_ARRAY_TASK_ID"') == 1
    assert not Path("s").exists()
    assert cli.main(["sweep", "model.optimizer.lr=1e-3,1e-2", "seed=range(0,3)", "sweep_dir=s"]) == 0
    for number in (1, 4):
        Path(f"s/{number:04d}/metrics.json").unlink()
    capsys.readouterr()
    assert cli.main(["sweep", "run=s", *cluster]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=1,4%3" in script
    assert f"[4]={Path('s/0004').resolve()}" in script


def test_a_point_that_ends_while_another_one_draws_is_in_the_plot(
    trained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the same files, and whoever writes last may have looked first."""
    assert cli.main(["sweep", "model.optimizer.lr=1e-3,1e-2", "sweep_dir=s"]) == 0
    late = Path("s/0001/metrics.json")
    text = late.read_text()
    late.unlink()
    drawn: list[int] = []

    def draw(rows: list[dict[str, Any]], columns: Any, goal: str, path: Path) -> None:
        drawn.append(len(rows))
        path.touch()
        late.write_text(text)

    monkeypatch.setattr(sweep_report, "plot", draw)
    rows = sweep_report.write_report(read_sweep(Path("s")))
    assert drawn == [1, 2]
    with Path("s/table.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == [row["state"] for row in rows] == ["finished"] * 2


def test_axes_of_names_numbers_and_decades() -> None:
    heights, ticks = sweep_report._places(["a", "b", "a"])
    assert heights == [0.0, 1.0, 0.0]
    assert [text for _, text in ticks] == ["a", "b"]
    heights, _ = sweep_report._places(["1e-4", "1e-3", "1e-2"])
    assert heights == pytest.approx([0.0, 0.5, 1.0])
    heights, ticks = sweep_report._places([3, 3])
    assert heights == [0.5, 0.5]
    assert len(sweep_report._places(list(range(20)))[1]) == 5


@pytest.mark.slow
def test_points_of_two_processes_each(tmp_path: Path) -> None:
    """What a launcher of Hydra cannot do: every point starts its own ranks, in its own directory."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kexue.cli", "sweep", "seed=1,2", "debug=fast", "strategy=ddp", "sweep_dir=s"),
            *("trainer.devices=2", "trainer.accelerator=cpu", "logger=csv", "trainer.enable_model_summary=false"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 points finished" in done.stdout
    for number in (0, 1):
        assert json.loads((tmp_path / f"s/000{number}/metrics.json").read_text())["test/digit_accuracy"] >= 0


def test_optuna_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    _, varied = split_words([LR])
    with pytest.raises(InputError, match="sampler=optuna needs Optuna; type pip install"):
        make_points(varied, "optuna", 3, 0)
