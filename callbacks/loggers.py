"""Where logged values go: one CSV file that outlives interruptions, and Weights & Biases, offline without a key."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import netrc
import os
import uuid
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import _DummyExperiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from ..errors import InputError


class CSVMetrics(Logger):
    """Write `metrics.csv`: a row for each logged step, a column for each key, in the order in which they first came.

    What is logged at one step by several callers shares a row. Rows reach the file at once and are never lost: a new
    column rewrites the file beside itself, and a later run in the same folder goes on below. When it trains again from
    an earlier step (a resumed run), rows of the earlier process from its first logged step on make way, because these
    steps are being written again; evaluating writes below and takes nothing away.

    Args:
        folder: Where `metrics.csv` lies.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0
        self._file: IO[str] | None = None
        self._old_rows = False
        self._trainer: pl.Trainer | None = None

    @property
    def save_dir(self) -> str:
        """The folder; Lightning calls it the trainer's `log_dir`."""
        return str(self.path.parent)

    @property
    def name(self) -> str | None:
        """None: there is one file in a run directory."""
        return None

    @property
    def version(self) -> str | None:
        """None, as for `name`."""
        return None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_graph(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Remember the trainer. Lightning calls this before each run; a logger meets its trainer nowhere else."""
        self._trainer = model._trainer if isinstance(model, pl.LightningModule) else None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        row = {"step": "" if step is None else step, **metrics}
        file = self._file or self._open()
        if self._old_rows and step is not None and self._trainer is not None and self._trainer.state.fn == "fit":
            file = self._drop_from(step, metrics)
        merged = self._row | row
        if all(merged[key] == value for key, value in self._row.items()) and self._row:
            row = merged
            file.seek(self._row_start)  # same step: the row is written again, longer
        else:
            self._row_start = file.seek(0, os.SEEK_END)
        self._row = row
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self._read(self._row_start)
            self._columns += new
            self._rewrite([*rows, row])
            return
        csv.writer(file, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        file.truncate()
        file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; it opens again when more is logged."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._row = {}  # another process may write below before this one does again

    def _open(self) -> IO[str]:
        """Open the file for adding; a row cut short by a crash goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        file = self._file = self.path.open("r+", newline="", encoding="utf-8")
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if not self._columns:  # else: closed by finalize, and opened again by the same process
            self._columns = next(csv.reader([whole.partition("\n")[0]]), [])
            self._old_rows = bool(whole)
        if whole != text:
            file.truncate(len(whole.encode()))
        file.seek(0, os.SEEK_END)
        return file

    def _read(self, end: int | None = None) -> list[dict[str, Any]]:
        """Return the rows that lie before a position in the file."""
        text = self.path.read_bytes()[:end].decode("utf-8")
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def _rewrite(self, rows: list[dict[str, Any]]) -> IO[str]:
        """Write all rows beside the file, give them its name, and go on there."""
        if self._file is not None:
            self._file.close()
        fresh = self.path.with_name(f".{self.path.name}.partial")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            for row in rows:
                self._row_start = file.tell()
                writer.writerow(row)
        fresh.replace(self.path)
        self._file = self.path.open("r+", newline="", encoding="utf-8")
        self._file.seek(0, os.SEEK_END)
        return self._file

    def _drop_from(self, step: int, metrics: Mapping[str, float]) -> IO[str]:
        self._old_rows = False
        self._row = {}
        rows = self._read()
        kept = [row for row in rows if not row["step"] or int(row["step"]) < step]
        for row in rows:
            known = {key: value for key, value in row.items() if value and key != "epoch"}
            if row["step"] == str(step) and not known.keys() & metrics.keys():
                # A validation that is repeated: the step itself is not, and both share a row.
                kept.append(row)
                self._row = {**known, "step": step}
        return self._rewrite(kept)


class _RunLogger(WandbLogger):
    """W&B's logger with one history row a step, and closed in time when a cluster's signal comes.

    Several callers log at one step; each call to W&B costs a message to its process, so their values go in one. That
    process is killed together with the job's and writes an offline run only every few seconds: what came after the last
    time would be lost (https://github.com/wandb/wandb/issues/9963). Lightning's handler of the signal calls
    `finalize("finished")` before it saves a checkpoint; at the end of an ordinary run the word is "success".
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._row: dict[str, Any] = {}
        self._row_step: int | None = None
        self._closed = False
        self._wandb_init.pop("anonymous", None)  # Lightning passes None, and wandb 0.31 warns where anything is passed

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step != self._row_step or (metrics.keys() & self._row.keys()) - {"epoch"}:
            self._send()
        self._row_step = step
        self._row.update(metrics)

    def _send(self) -> None:
        row, self._row = self._row, {}
        if row and not self._closed:
            super().log_metrics(row, self._row_step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._send()
        super().finalize(status)
        if status == "finished" and self._experiment is not None and not isinstance(self._experiment, _DummyExperiment):
            self._experiment.mark_preempting()
            self._experiment.finish(exit_code=1)
            self._closed = True


def has_wandb_key() -> bool:
    """Tell, without asking anyone, whether there is a key for W&B: in `WANDB_API_KEY`, or left by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = os.environ.get("NETRC")
    for file in [Path(path)] if path else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file)).authenticators(host or ""):
                return True
    return False


@rank_zero_only
def _run_id(folder: Path) -> str:
    """Return the id kept in the run directory, so that a resumed run continues the same W&B run."""
    file = folder / "wandb" / "run_id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="ascii")
    return file.read_text(encoding="ascii").strip()


def wandb_logger(folder: str | Path, project: str = "kexue", offline: bool | None = None, **kwargs: Any) -> WandbLogger:
    """Make a W&B logger for a run directory: silent, resumable, offline unless there is a key.

    Values are plotted against `trainer/global_step`, the one axis that stays right over interruptions. Send an offline
    run later with `wandb sync FOLDER/wandb/offline-run-*`.

    Args:
        folder: Run directory; W&B's files and the run's id go to `folder/wandb`.
        project: W&B project.
        offline: True: keep everything here. False: send it. None: send it if there is a key; `WANDB_MODE` is obeyed.
        **kwargs: Passed to `WandbLogger`, and by it to `wandb.init` (`name`, `group`, `tags`, `entity`, ...).

    Raises:
        ImportError: If wandb is not installed.
        InputError: If `offline=False` and there is no key.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ImportError("wandb is not installed: pip install wandb, or choose logger=csv.")
    key = has_wandb_key()
    if offline is False and not key:
        raise InputError(
            "wandb_logger(offline=False): no key for W&B; run `wandb login`, set WANDB_API_KEY, or offline=true."
        )
    chosen = os.environ.get("WANDB_MODE", "")
    if offline is None and (key or chosen in ("offline", "dryrun", "disabled")):
        mode = chosen or "online"
    else:
        mode = "online" if offline is False else "offline"
    # `offline=True` of Lightning would set WANDB_MODE for the whole process and for every later run in it.
    return _RunLogger(
        project=project,
        save_dir=Path(folder),
        id=_run_id(Path(folder)),
        mode=mode,
        settings={"silent": True, "console": "off"},
        **kwargs,
    )
