"""The points of a sweep: which words each run gets, and what is known of it.

A sweep is a folder: `sweep.json`, a run directory for each point named by its number (`0007`, with `point.json`), and
the table and plot of all. A point is finished when its run has written its final metrics, so a sweep goes on from what
is there, whoever ran it.

A grid and random points are fixed when the sweep is made. Optuna is asked when a point starts; its study lies in a
journal in the folder, which many processes on many machines may write to.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import InputError
from .run_dir import METRICS_FILE

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna import Study
    from optuna.distributions import BaseDistribution

Sampler = Literal["grid", "random", "optuna"]
SWEEP_FILE, POINT_FILE, STUDY_FILE = "sweep.json", "point.json", "study.log"
WAIT_SECONDS = 600.0
"""How long the other processes of a point wait for its main one to be told where it lies."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep consists of.

    Attributes:
        folder: absolute.
        name: of the experiment.
        words: of `kexue fit`, the same for all points.
        varied: those with several values, as typed.
        sampler: grid, random or optuna.
        points: words of each point; with optuna only their number counts.
        objective: metric that points are compared by.
        goal: min or max.
        seed: of random points and of Optuna.
    """

    folder: Path
    name: str
    words: list[str]
    varied: list[str]
    sampler: Sampler
    points: list[list[str]]
    objective: str
    goal: Literal["min", "max"]
    seed: int

    @property
    def keys(self) -> list[str]:
        """What varies."""
        return [word.partition("=")[0].lstrip("+") for word in self.varied]

    def place(self, number: int) -> Path:
        """The run directory of a point."""
        return self.folder / f"{number:04d}"

    def write(self) -> None:
        """Put it down in its folder."""
        text = json.dumps({**asdict(self), "folder": None}, indent=1, ensure_ascii=False)
        _write(self.folder / SWEEP_FILE, text)

    def finished(self, number: int) -> bool:
        """Whether a point's run has come to its end."""
        return (self.place(number) / METRICS_FILE).is_file()

    def unfinished(self) -> list[int]:
        """Numbers of the points that are still to be run."""
        return [number for number in range(len(self.points)) if not self.finished(number)]

    def metrics(self, number: int) -> dict[str, float]:
        """What a finished point has reached."""
        return json.loads((self.place(number) / METRICS_FILE).read_text(encoding="utf-8"))

    def chosen(self, number: int) -> list[str] | None:
        """The words of a point; None where nobody has asked for them yet."""
        if self.sampler != "optuna":
            return self.points[number]
        try:
            return json.loads((self.place(number) / POINT_FILE).read_text(encoding="utf-8"))["words"]
        except OSError:
            return None


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep from its folder.

    Raises:
        InputError: there is none.
    """
    folder = folder.expanduser().resolve()
    try:
        found = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"run={folder}: no {SWEEP_FILE} there; give the folder that kexue sweep made") from error
    return Sweep(**{**found, "folder": folder})


# Words with several values


def split_words(words: list[str]) -> tuple[list[str], list[Override]]:
    """Separate words with one value from those with several.

    Raises:
        InputError: no word has several values, or one cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from .errors import one_line

    parser = OverridesParser.create()
    fixed: list[str] = []
    varied: list[Override] = []
    for word in words:
        try:
            parsed = parser.parse_override(word)
        except HydraException:
            fixed.append(word)  # composing the config says what is wrong with it
            continue
        if not parsed.is_sweep_override():
            fixed.append(word)
        elif parsed.is_choice_sweep() or parsed.is_range_sweep() or parsed.is_interval_sweep():
            varied.append(parsed)
        else:
            raise InputError(f"{one_line(word)}: list the values, KEY=A,B")
    if not varied:
        raise InputError("nothing varies: give a word several values, such as model.dim=64,128 or seed=range(1,5)")
    return fixed, varied


def _name(word: Override) -> str:
    return word.get_key_element()


def _listed(word: Override) -> list[str]:
    """The values of a word that lists them, as they are typed."""
    return [str(value) for value in word.sweep_string_iterator()]


def grid(varied: list[Override]) -> list[list[str]]:
    """Every combination.

    Raises:
        InputError: an interval has no end of values.
    """
    for word in varied:
        if word.is_interval_sweep():
            raise InputError(f"{word.input_line}: a grid lists its values; type sampler=random or sampler=optuna")
    return [list(point) for point in product(*([f"{_name(w)}={v}" for v in _listed(w)] for w in varied))]


def drawn(varied: list[Override], trials: int, seed: int) -> list[list[str]]:
    """Random points, none twice; fewer than asked for where there are no more."""
    import numpy as np

    random = np.random.default_rng(seed)
    listed = {_name(word): _listed(word) for word in varied if not word.is_interval_sweep()}
    most = math.prod(map(len, listed.values())) if len(listed) == len(varied) else math.inf

    def value(word: Override) -> str:
        if not word.is_interval_sweep():
            values = listed[_name(word)]
            return values[random.integers(len(values))]
        low, high, whole, logarithmic = _interval(word)
        number = math.exp(random.uniform(math.log(low), math.log(high))) if logarithmic else random.uniform(low, high)
        return str(min(int(number), int(high))) if whole else repr(float(number))

    points: dict[tuple[str, ...], None] = {}
    while len(points) < min(trials, most):
        points[tuple(f"{_name(word)}={value(word)}" for word in varied)] = None
    return [list(point) for point in points]


def _interval(word: Override) -> tuple[float, float, bool, bool]:
    """Lower and upper end, whether it is of whole numbers, and whether its logarithm is even.

    Raises:
        InputError: the ends are in the wrong order, or have no logarithm.
    """
    sweep: Any = word.value()
    low, high, logarithmic = sweep.start, sweep.end, "log" in sweep.tags
    if not low < high or (logarithmic and low <= 0):
        raise InputError(f"{word.input_line}: an interval runs from a smaller number to a larger one, above 0 for log")
    return low, high, isinstance(low, int) and isinstance(high, int), logarithmic


def make_points(varied: list[Override], sampler: str, trials: int, seed: int) -> list[list[str]]:
    """The words of each point; empty ones for Optuna, which is asked later.

    Raises:
        InputError: no such sampler, or words that it cannot use.
    """
    from .errors import suggest

    if sampler not in get_args(Sampler):
        raise InputError(f"sampler={sampler}: no such sampler; {suggest(sampler, get_args(Sampler))}")
    if trials < 1:
        raise InputError(f"trials={trials}: use a whole number of 1 or more")
    if sampler == "grid":
        return grid(varied)
    if sampler == "random":
        return drawn(varied, trials, seed)
    _distributions(varied)
    return [[] for _ in range(trials)]


# Optuna


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("sampler=optuna needs Optuna; type pip install 'optuna>=4,<6'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(varied: list[Override]) -> Mapping[str, BaseDistribution]:
    distributions = _optuna().distributions
    found: dict[str, BaseDistribution] = {}
    for word in varied:
        if word.is_interval_sweep():
            low, high, whole, logarithmic = _interval(word)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            found[_name(word)] = kind(low, high, log=logarithmic)
        else:
            found[_name(word)] = distributions.CategoricalDistribution(_listed(word))
    return found


def _study(sweep: Sweep, number: int = 0) -> Study:
    optuna = _optuna()
    backend = optuna.storages.journal.JournalFileBackend(str(sweep.folder / STUDY_FILE))
    # Of points that still run, the worst is assumed: those that run at a time should not be alike.
    sampler = optuna.samplers.TPESampler(seed=sweep.seed + number, constant_liar=True)
    return optuna.create_study(
        study_name="sweep",
        storage=optuna.storages.JournalStorage(backend),
        sampler=sampler,
        direction="minimize" if sweep.goal == "min" else "maximize",
        load_if_exists=True,
    )


def words_of(sweep: Sweep, number: int, ask: bool) -> list[str]:
    """The words of a point that is to be run now.

    Args:
        sweep: the sweep.
        number: of the point.
        ask: whether this process is the one that asks Optuna; the others wait for what it writes down. A point that
            was asked for before, such as a requeued one, keeps its words.

    Raises:
        InputError: no such point.
    """
    if not 0 <= number < len(sweep.points):
        raise InputError(f"point={number}: the sweep has points 0 to {len(sweep.points) - 1}")
    end = time.monotonic() + WAIT_SECONDS
    while (words := sweep.chosen(number)) is None:
        if ask:
            trial = _study(sweep, number).ask(dict(_distributions(split_words(sweep.varied)[1])))
            words = [f"{key}={value}" for key, value in trial.params.items()]
            _write(sweep.place(number) / POINT_FILE, json.dumps({"trial": trial.number, "words": words}))
        elif time.monotonic() > end:
            raise InputError(f"{sweep.place(number)}: no {POINT_FILE} there after {WAIT_SECONDS:.0f} s")
        else:
            time.sleep(0.2)
    return words


@contextmanager
def told(sweep: Sweep, number: int) -> Iterator[None]:
    """Tell Optuna how the point that runs within this context has ended; not where it was only preempted.

    Raises:
        InputError: the run has logged no metric of the objective's name.
    """
    try:
        yield
    except Exception:
        _tell(sweep, number, None)
        raise
    metrics = sweep.metrics(number)
    if metrics.get(sweep.objective) is None:
        _tell(sweep, number, None)
        known = ", ".join(key for key, value in metrics.items() if value is not None)
        raise InputError(f"objective={sweep.objective}: the run has no such number; choose from: {known}")
    _tell(sweep, number, metrics[sweep.objective])


def _tell(sweep: Sweep, number: int, value: float | None) -> None:
    if sweep.sampler != "optuna":
        return
    state = _optuna().trial.TrialState
    trial = json.loads((sweep.place(number) / POINT_FILE).read_text(encoding="utf-8"))["trial"]
    study = _study(sweep)
    if not study.trials[trial].state.is_finished():  # a point that failed is run again with the same words
        study.tell(trial, value, state=state.FAIL if value is None else state.COMPLETE)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
