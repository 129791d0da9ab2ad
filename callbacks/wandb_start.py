"""How a run directory gets its run of W&B: sent or kept here, which id, in which group."""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.utilities import rank_zero_only

from ..errors import InputError
from ..strategies.checkpoints import describe, newest
from .wandb_run import FLUSH_SECONDS, LogModel, WandbRun, Watch

INIT_SECONDS = 30.0


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
    """Return the id of the run in this directory, so that a resumed run continues the same W&B run.

    It is kept in `wandb/run_id`, and in every checkpoint in case that folder was cleaned away. A new run takes the id
    that W&B's sweep agent gives it, or one of its own.
    """
    file = folder / "wandb" / "run_id"
    if not file.is_file():
        checkpoint = newest(folder / "checkpoints")
        kept = describe(checkpoint).get("loggers", {}).get(WandbRun.__name__) if checkpoint else None
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(kept or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8], encoding="ascii")
    return file.read_text(encoding="ascii").strip()


def _sweep_group(name: str | None) -> str | None:
    """The runs of an array job belong together, as those of a sweep of W&B do by themselves."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{name or 'array'}-{array}" if array else None


def wandb_logger(
    folder: str | Path,
    project: str = "kexue",
    offline: bool | None = None,
    *,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | None = None,
    watch: Watch | None = None,
    watch_every: int = 100,
    log_model: LogModel | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> WandbRun:
    """Make a W&B logger for a run directory: silent, resumable, offline unless there is a key.

    Send an offline run later with `wandb sync FOLDER/wandb/offline-run-*`.

    Args:
        folder: Run directory; W&B's files and the run's id go to `folder/wandb`.
        project: W&B project.
        offline: True: keep everything here. False: send it. None: send it if there is a key; `WANDB_MODE` is obeyed.
        name: Shown for the run.
        group: Runs shown together; None: the name and the job, for the runs of an array job.
        job_type: What the run does within its group.
        tags: To find runs by.
        watch: Log histograms of "gradients", "parameters" or "all"; None: nothing.
        watch_every: Steps between histograms.
        log_model: Upload checkpoints as versions of `model-ID`: "last": the last and the best at the end of training,
            "all": each when it is saved; None: none. Aliases are `latest` and `best`.
        settings: Of `wandb.Settings`, over the ones that are set here.
        **kwargs: Passed to `wandb.init` (`entity`, `notes`, ...).

    Raises:
        ImportError: If wandb is not installed.
        InputError: If `offline=False` and there is no key, or an option has a wrong value.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ImportError("wandb is not installed: pip install wandb, or choose logger=csv.")
    if watch_every < 1:
        raise InputError(f"wandb_logger(watch_every={watch_every}): use 1 or more.")
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
    own = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_SECONDS,
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
    }
    # `offline=True` of Lightning would set WANDB_MODE for the whole process and for every later run in it.
    return WandbRun(
        project=project,
        save_dir=Path(folder),
        id=_run_id(Path(folder)),
        mode=mode,
        name=name,
        group=group or _sweep_group(name),
        job_type=job_type,
        tags=tags,
        watch=watch,
        watch_every=watch_every,
        log_model=log_model,
        settings=own | (settings or {}),
        **kwargs,
    )
