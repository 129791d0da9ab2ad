"""Run an experiment at many points: a grid, random ones, or those that Optuna chooses.

usage: kexue sweep [experiment=NAME] KEY=A,B ... [sampler=grid|random|optuna] [cluster=slurm ...] [KEY=VALUE ...]

  kexue sweep model.depth=1,2,3 model.optimizer.lr=1e-3,1e-2        every combination, one after another, here
  kexue sweep 'seed=range(1,6)' parallel=2                          two at a time
  kexue sweep 'model.optimizer.lr=tag(log,interval(1e-4,1e-1))' sampler=optuna trials=20
  kexue sweep model.depth=1,2,3 cluster=slurm cluster.gpus_per_node=8 parallel=4     one array job
  kexue sweep run=FOLDER                                            go on: finished points are not run again
  kexue sweep run=FOLDER show=true                                  only the table and the plot
  kexue sweep run=FOLDER cluster=slurm --dry-run                    print the batch script, queue nothing

sampler: grid takes lists (A,B) and range(A,B,STEP); random and optuna take interval(A,B) as well, int(interval(A,B))
for whole numbers, tag(log,interval(A,B)) for an even logarithm. trials: points of random and optuna, 20 unless given.
parallel: points at a time; on a cluster all that it admits. objective, goal: the metric to compare by and min or max,
those of the experiment's best checkpoint unless given. sweep_dir: default runs/NAME/sweep-CLOCK.

Each point is a run of its own, with as many processes as trainer.devices or the cluster say.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .points import Sweep, make_points, read_sweep, split_words, told, words_of

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FAILED = 1
OUTPUT_FILE = "output.txt"
_OF_A_NEW_ONE = {"sampler": "grid", "trials": "20", "objective": "", "goal": "", "sweep_dir": "", "sweep_seed": "0"}
_OF_ANY = {"run": "", "point": "", "show": "false", "parallel": ""}
_CHECKED = 200


def run(args: list[str]) -> int:
    """Make a sweep, or go on with one; see the module's help."""
    values, words = _take([word for word in args if word != "--dry-run"])
    dry_run = "--dry-run" in args
    parallel = _whole("parallel", values["parallel"], least=1) if values["parallel"] else None
    if values["run"]:
        sweep = read_sweep(Path(values["run"]))
        if values["point"]:
            return _run_point(sweep, _whole("point", values["point"], least=0), words)
        if others := [word for word in words if not word.startswith("cluster")]:
            raise InputError(f"{others[0]}: the points of {sweep.folder} are chosen; make another sweep for others")
        if values["show"] == "true":
            return _show(sweep)
    else:
        sweep = _make(values, words)
        if not dry_run:
            sweep.write()
    cluster = [word for word in words if word.startswith("cluster")]
    if cluster and not any(word.replace(" ", "") == "cluster=local" for word in cluster):
        return _submit(sweep, cluster, parallel, dry_run)
    return _run_here(sweep, parallel or 1)


def _take(args: list[str]) -> tuple[dict[str, str], list[str]]:
    values, words = dict(_OF_ANY | _OF_A_NEW_ONE), []
    for word in args:
        name, equals, value = word.partition("=")
        if equals and name in values:
            values[name] = value
        else:
            words.append(word)
    return values, words


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text}: use a whole number of {least} or more")
    return int(text)


# A new sweep


def _make(values: dict[str, str], words: list[str]) -> Sweep:
    from .config import compose_run, plain, validate

    fixed, varied = split_words([word for word in words if not word.startswith("cluster")])
    for word in (*fixed, *(override.input_line or "" for override in varied)):
        if word.partition("=")[0] in ("run_dir", "resume"):
            raise InputError(f"{word}: every point has a run directory of its own; type sweep_dir=PATH for that of all")
    seed = _whole("sweep_seed", values["sweep_seed"], least=0)
    points = make_points(varied, values["sampler"], _whole("trials", values["trials"], least=1), seed)
    config: dict[str, Any] = {}
    for point in _one_of_each_value(points, varied):  # a wrong value is said before anything runs
        config = plain(compose_run([*fixed, *point]), "runs")
        validate(config)
    goal = values["goal"] or config["mode"]
    if goal not in ("min", "max"):
        raise InputError(f"goal={goal}: use min or max")
    return Sweep(
        folder=_folder(values["sweep_dir"], config["name"]),
        name=config["name"],
        words=fixed,
        varied=[word.input_line or "" for word in varied],
        sampler=values["sampler"],  # type: ignore[arg-type]
        points=points,
        objective=values["objective"] or config["monitor"],
        goal=goal,  # type: ignore[arg-type]
        seed=seed,
    )


def _one_of_each_value(points: list[list[str]], varied: list[Override]) -> list[list[str]]:
    """Few points in which every value of every word occurs; for Optuna, the ends of intervals and all listed values."""
    from .points import drawn

    if not any(points):
        points = drawn(varied, 32, seed=0)
    seen: set[str] = set()
    chosen = []
    for point in points[: 100 * _CHECKED]:
        if not seen.issuperset(point):
            seen.update(point)
            chosen.append(point)
    return chosen[:_CHECKED]


def _folder(given: str, name: str) -> Path:
    from .run_dir import ROOT

    folder = Path(given).expanduser() if given else ROOT / name / time.strftime("sweep-%Y-%m-%d_%H-%M-%S")
    folder = folder.resolve()
    if (folder / "sweep.json").exists():
        raise InputError(f"sweep_dir={folder} holds a sweep already; go on with kexue sweep run={folder}")
    return folder


# One point, in each of its processes


def _run_point(sweep: Sweep, number: int, more: list[str]) -> int:
    from . import fit
    from .ranks import is_main_process
    from .sweep_report import write_report

    main = is_main_process()
    words = words_of(sweep, number, ask=main)
    # Weights & Biases reads these: the points of a sweep are one group.
    os.environ.setdefault("WANDB_RUN_GROUP", sweep.folder.name)
    os.environ.setdefault("WANDB_JOB_TYPE", "sweep")
    command = [*sweep.words, *words, *more, f"run_dir='{sweep.place(number)}'"]
    if not main:
        return fit.run(command)
    with told(sweep, number):
        code = fit.run(command)
    write_report(sweep)
    return code


# All points, here


def _run_here(sweep: Sweep, parallel: int) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .sweep_report import write_report

    waiting, running, failed = sweep.unfinished(), {}, []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        done = len(sweep.points) - len(waiting)
        task = bar.add_task(sweep.folder.name, total=len(sweep.points), completed=done)
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    number = waiting.pop(0)
                    running[number] = _start(sweep, number)
                time.sleep(0.1)
                for number, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[number]
                    bar.advance(task)
                    if process.returncode:
                        failed.append((number, process.returncode))
                    bar.console.print(_line(sweep, number, process.returncode), highlight=False)
        except BaseException:
            for process in running.values():  # each saves a checkpoint, from which the sweep goes on
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                process.wait()
            raise
    rows = write_report(sweep)
    _print(sweep, rows)
    if failed:
        number, code = failed[0]
        print(
            f"kexue: {len(failed)} of {len(sweep.points)} points failed, the first is {number:04d} with exit code "
            f"{code}; see {sweep.place(number) / OUTPUT_FILE}, then type kexue sweep run={sweep.folder}",
            file=sys.stderr,
        )
    return FAILED if failed else 0


def _start(sweep: Sweep, number: int) -> subprocess.Popen[bytes]:
    folder = sweep.place(number)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"{__package__}", "sweep", f"run={sweep.folder}", f"point={number}"]
    with (folder / OUTPUT_FILE).open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _line(sweep: Sweep, number: int, code: int) -> str:
    words = " ".join(sweep.chosen(number) or [])
    value = sweep.metrics(number).get(sweep.objective) if sweep.finished(number) else None
    result = f"exit code {code}" if code else f"{sweep.objective} {value:.5g}" if value is not None else "no value"
    return f"{number:04d}  {words}  {result}"


def _print(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    from .sweep_report import show

    show(sweep, rows)


def _show(sweep: Sweep) -> int:
    from .sweep_report import write_report

    _print(sweep, write_report(sweep))
    return 0


# All points, on a cluster


def _submit(sweep: Sweep, cluster: list[str], parallel: int | None, dry_run: bool) -> int:
    from .submit import submit_points

    numbers = sweep.unfinished()
    if not numbers:
        return _show(sweep)
    submit_points(sweep, numbers, cluster, parallel, dry_run)
    return 0
