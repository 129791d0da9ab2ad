"""Weights & Biases: offline without a key, one run over interruptions, and no step lost when a job is ended."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from ..errors import InputError
from ..redaction import hide, without_secrets
from ..strategies.checkpoints import describe
from ..wandb_records import history, read_records

log = logging.getLogger("kexue.wandb")

STEP = "trainer/global_step"
"""The one axis that stays right over interruptions; W&B's own `_step` counts rows."""

FLUSH_SECONDS = 1.0
KEPT_SECONDS = 300.0  # rows are kept so long, to be sent again if W&B's process dies before it has written them
FINISH_SECONDS = 20.0  # a job that was told to end has about 30
_MAX_REOPENED = 3

Watch = Literal["gradients", "parameters", "all"]
LogModel = Literal["last", "all"]


class WandbRun(WandbLogger):
    """W&B's logger as a run of kexue needs it; made by `wandb_logger`.

    *One row a step.* Several callers log at one step; their values go in one row, `trainer/global_step` among them.

    *Nothing is lost at a signal.* W&B writes through a process of its own, which a cluster's SIGTERM ends together with
    the job's, unwritten rows and all (https://github.com/wandb/wandb/issues/9963). Here it writes every second, rows of
    the last minutes are kept, and when that process is gone a new one is started, which continues the run with the rows
    that the file on disk does not hold. After three such losses the logger says so and stays silent.

    *Closed in time.* `mark_preempting` marks, alerts and finishes; what is logged afterwards is ignored. Lightning's
    handler of a cluster's signal calls `finalize("finished")` before it saves a checkpoint, which does the same; at the
    end of an ordinary run the word is "success".

    *The config once.* After `log_config`, hyperparameters that Lightning collects itself are left out: they would stand
    beside the nested config a second time, flat. Secrets are replaced.

    *Training does not depend on it.* Without a connection at the start, the run is recorded offline.
    """

    def __init__(
        self,
        *,
        watch: Watch | None = None,
        watch_every: int = 100,
        log_model: LogModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.watch_what = watch
        self.watch_every = watch_every
        self.log_model: LogModel | None = log_model
        self._row: dict[str, Any] = {}
        self._row_step: int | None = None
        self._sent: deque[tuple[float, int | None, dict[str, Any]]] = deque()
        self._closed = False
        self._reopened = 0
        self._files: list[Path] = []  # of the processes that have died
        self._config: dict[str, Any] = {}
        self._has_run_config = False
        self._watched: nn.Module | None = None
        self._checkpoints: Any = None
        self._uploaded: set[tuple[str, int]] = set()
        self._wandb_init.pop("anonymous", None)  # Lightning passes None, and wandb 0.31 warns where anything is passed

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun at the first call; offline if the server cannot be reached."""
        import wandb
        from wandb.errors import AuthenticationError, CommError

        if self._experiment is None:
            _leave_inherited_process()
        if self._experiment is None and self._wandb_init["mode"] == "online":
            wandb.setup(wandb.Settings(silent=True))  # else it says where it found the key
            try:
                return super().experiment
            except AuthenticationError as error:
                raise InputError(
                    f"W&B refuses the key ({hide(str(error)).splitlines()[0]}); "
                    "run `wandb login --relogin`, or set logger.wandb.offline=true"
                ) from error
            except CommError as error:
                reason = hide(str(error)).splitlines()[0]
                log.warning("no connection to W&B (%s): recording offline, send it later with `wandb sync`", reason)
                self._wandb_init["mode"] = "offline"
                _forget_process()  # it goes on trying, and holds the run's id
        return super().experiment

    @property
    def is_open(self) -> bool:
        """Whether this process has a run and has not closed it."""
        return self._experiment is not None and not isinstance(self._experiment, _DummyExperiment) and not self._closed

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values, which may be W&B's tables and pictures, to the row of a step."""
        if step != self._row_step or (metrics.keys() & self._row.keys()) - {"epoch"}:
            self._send()
        self._row_step = step
        self._row.update(metrics)

    @rank_zero_only
    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the run's config, nested as it is, in place of the hyperparameters that Lightning collects."""
        self._has_run_config = True
        self._update_config(config)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters, unless there is a config that holds them."""
        if not self._has_run_config:
            self._update_config(vars(params) if isinstance(params, Namespace) else params)

    def _update_config(self, params: Mapping[str, Any]) -> None:
        self._config.update(without_secrets(params))
        if not self._closed:
            with self._alive():
                super().log_hyperparams(self._config)

    @rank_zero_only
    def log_graph(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Watch gradients if asked to. Lightning calls this before each run."""
        fits = isinstance(model, pl.LightningModule) and model._trainer is not None and model.trainer.state.fn == "fit"
        if self.watch_what is not None and fits and self._watched is None and not self._closed:
            self.watch(model, log=self.watch_what, log_freq=self.watch_every, log_graph=False)
            self._watched = model

    @rank_zero_only
    def alert(self, title: str, text: str = "", level: Literal["INFO", "WARN", "ERROR"] = "WARN") -> None:
        """Send an alert (by W&B: mail or Slack); offline it is recorded and sent by `wandb sync`."""
        if not self._closed:
            with self._alive():
                self.experiment.alert(title=title, text=hide(text), level=level)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Remember the checkpoints; log the newest at once with `log_model="all"`."""
        self._checkpoints = checkpoint_callback
        if self.log_model == "all":
            self._log_checkpoint(checkpoint_callback.last_model_path, keeps_changing=True)

    @rank_zero_only
    def mark_preempting(self) -> None:
        """Close the run because the job is about to be ended and requeued; a second call does nothing.

        Waits at most 20 seconds for the server; what has not arrived by then lies on disk for `wandb sync`.
        """
        self._send()
        if not self.is_open:
            return
        if self._watched is not None:
            self.experiment.unwatch(self._watched)
        with self._alive():
            self.experiment.alert(title="preempted", text="the job was told to end; it is requeued", level="INFO")
        with self._alive():
            self.experiment.mark_preempting()
        self._finish(exit_code=1)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left. "finished": a signal came, see `mark_preempting`; "success": log the model if asked to."""
        self._send()
        if status == "finished":
            self.mark_preempting()
        elif status == "success" and self.log_model is not None and self._checkpoints is not None and self.is_open:
            for path in dict.fromkeys([self._checkpoints.best_model_path, self._checkpoints.last_model_path]):
                self._log_checkpoint(path)

    def _send(self) -> None:
        row, self._row = self._row, {}
        if not row or self._closed:
            return
        now = time.monotonic()
        self._sent.append((now, self._row_step, row))
        while self._sent[0][0] < now - KEPT_SECONDS:
            self._sent.popleft()
        with self._alive():
            super().log_metrics(row, self._row_step)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Start W&B's process again if it turns out to be gone, and send what it has not written."""
        try:
            yield
        except Exception as error:
            if not _is_lost(error):
                raise
            while not self._closed:
                try:
                    self._reopen()
                    return
                except Exception as again:
                    if not _is_lost(again):
                        raise

    def _reopen(self) -> None:
        """Continue the run in a new process of W&B with the rows that the dead one has not written."""
        assert self._experiment is not None
        self._files.append(Path(self._experiment.settings.sync_file))
        _forget_process()
        self._reopened += 1
        if self._reopened > _MAX_REOPENED:
            self._closed = True
            log.warning("W&B's process ended %d times: nothing more goes to W&B", self._reopened)
            return
        self._experiment = None
        run = self.experiment
        if self._config:
            super().log_hyperparams(self._config)
        last = run.summary.get(STEP) if self._wandb_init["mode"] == "online" else None
        files = self._files if last is None else []  # all of them: the process may die again as it begins
        written = {_identity(row.get(STEP), row) for file in files for row in history(read_records(file))}
        for _, step, row in list(self._sent):
            missing = _identity(step, row) not in written if last is None else step is None or step > last
            if missing:
                super().log_metrics(row, step)

    def _finish(self, exit_code: int) -> None:
        """Finish in time; afterwards nothing is logged any more."""

        run: Any = self._experiment

        def finish() -> None:
            with contextlib.suppress(Exception):
                run.finish(exit_code=exit_code)

        self._closed = True
        thread = threading.Thread(target=finish, daemon=True, name="wandb-finish")
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            log.warning("W&B took more than %.0f s to finish; `wandb sync` sends the rest later", FINISH_SECONDS)

    def _log_checkpoint(self, name: str, keeps_changing: bool = False) -> None:
        """Log a checkpoint, a file or a directory of ZeRO, as a version of the artifact `model-ID`."""
        import wandb

        path = Path(name)
        if not name or not path.exists():
            return
        callback = self._checkpoints
        aliases = [alias for alias, other in _named(callback).items() if other == name]
        mark = (name, len(aliases))
        if mark in self._uploaded:
            return
        about = describe(path)
        metadata = {key: about[key] for key in ("step", "epoch", "base", "stage", "world_size") if key in about}
        metadata |= {"monitor": getattr(callback, "monitor", None), "score": getattr(callback, "best_value", None)}
        artifact = wandb.Artifact(f"model-{self.version}", type="model", metadata=metadata)
        # A file that stays is not copied; one that the next checkpoint replaces must be.
        policy = "mutable" if keeps_changing else "immutable"
        if path.is_dir():
            artifact.add_dir(str(path), name=path.name, policy=policy)
        else:
            artifact.add_file(str(path), name=path.name, policy=policy)
        with self._alive():
            self.experiment.log_artifact(artifact, aliases=aliases)
            self._uploaded.add(mark)


def _named(checkpoints: Any) -> dict[str, str]:
    return {"latest": checkpoints.last_model_path, "best": checkpoints.best_model_path}


def _identity(step: int | None, row: Mapping[str, Any]) -> tuple[int | None, frozenset[str]]:
    """What tells one logged row from another: its step and the keys of its numbers.

    W&B adds keys that begin with an underscore, and spreads a picture or table over keys such as `name._type`.
    """
    media = tuple(f"{key.removesuffix('_type')}" for key in row if key.endswith("._type"))
    numbers = (key for key, value in row.items() if isinstance(value, int | float) and not key.startswith(media))
    return step, frozenset(key for key in numbers if not key.startswith("_") and key != STEP)


def _forget_process() -> None:
    """End W&B's process, if it lives, so that the next run starts a new one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    wandb.run = None  # else Lightning takes the dead run for one in progress


def _leave_inherited_process() -> None:
    """Do not share the process of W&B that a parent process has started and named in the environment.

    It may still hold a run of the same id, of a child that was killed, and would be ended with ours.
    """
    parts = os.environ.get("WANDB_SERVICE", "").split("-")  # version-pid-...
    if len(parts) > 1 and parts[1] != str(os.getpid()):
        del os.environ["WANDB_SERVICE"]


def _is_lost(error: Exception) -> bool:
    return isinstance(error, ConnectionError) or type(error).__name__ == "MailboxClosedError"
