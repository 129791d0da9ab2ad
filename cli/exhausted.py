"""What to do when a run needs more memory than there is: what `kexue plan` says of this very run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ..errors import InputError
from .errors import one_line
from .ranks import is_main_process

_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device or the host has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


@contextlib.contextmanager
def advised(trainer: pl.Trainer, config: Mapping[str, Any]) -> Iterator[None]:
    """Within this context, an error of exhausted memory says in one line what would fit.

    Raises:
        InputError: In place of the error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = trainer.strategy.root_device
        rank = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        line = f"out of memory at step {trainer.global_step}{rank}, {device}: {advice(trainer, config)}"
        raise InputError(line) from error


def advice(trainer: pl.Trainer, config: Mapping[str, Any]) -> str:
    """Return what to type, from the planner's counts of this run where they can be made."""
    from ..analysis.plan import DEVICES, PRECISIONS, best, forecasts, why_not
    from .plan import command_words, count_quietly

    device, memory = _device(trainer.strategy.root_device)
    ask = f"kexue plan experiment={config['name']} devices={trainer.world_size} memory={memory / 1e9:.0f}GB"
    precision = str(config["trainer"]["precision"])
    if not is_main_process() or precision not in PRECISIONS:
        return f"{ask} says what fits, or use a smaller data.batch_size"
    try:
        job = count_quietly(config, on_gpu=device != "cpu")[0]
    except Exception as error:  # the advice must not hide what it is about
        return f"use a smaller data.batch_size; {ask} does not work here ({one_line(error, 100)})"
    about, meaning = DEVICES[device], PRECISIONS[precision]
    options = forecasts(job, trainer.world_size, about, meaning)
    chosen = best(options, memory)
    if chosen is None:
        return why_not(job, trainer.world_size, about, meaning, memory)
    words = " ".join(command_words(chosen, trainer.world_size))
    fits = f"{words} needs {chosen.total / 2**30:.3g} of {memory / 2**30:.3g} GiB by kexue plan"
    return f"{fits}; if it was that, another program holds memory or batches grow: use a smaller data.batch_size"


def _device(device: torch.device) -> tuple[str, float]:
    """The planner's name for a device, and the bytes of its memory."""
    from ..analysis.plan import DEVICES

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name.lower().replace(" ", "")
        return next((known for known in DEVICES if known in name), "h100"), float(properties.total_memory)
    import psutil

    return "cpu", float(psutil.virtual_memory().total)
