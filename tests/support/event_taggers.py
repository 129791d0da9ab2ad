"""Small taggers of events, and what they can say of a record, counted without their code."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch

from kexue.data.events import EventDataModule
from kexue.data.records import TRIGGER_ROLE, EventRecord
from kexue.lightning_modules.extraction import Lic2020Event

OUTPUTS = ("unique", "multi")
TINY: dict[str, Any] = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}
Triple = tuple[str, str, str]


def data(rows: int = 24, batch_size: int = 8, **options: Any) -> EventDataModule:
    module = EventDataModule(batch_size, num_generated=rows, **options)
    module.setup("fit")
    return module


def model(source: EventDataModule, **options: Any) -> Lic2020Event:
    pl.seed_everything(0, verbose=False)
    settings = {"optimizer": functools.partial(torch.optim.AdamW, lr=3e-3), "crf_rate": 3.0, **TINY, **options}
    return Lic2020Event(**source.model_arguments(), **settings)


def built(source: EventDataModule, **options: Any) -> Lic2020Event:
    module = model(source, **options)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def triples(record: EventRecord, triggers: bool = False) -> set[Triple]:
    """(type, role, text) of the arguments."""
    parts = [(event.type, part.role, part.text) for event in record.events for part in event.arguments]
    return {part for part in parts if triggers or part[1] != TRIGGER_ROLE}


def sayable(record: EventRecord, layered: bool) -> set[Triple]:
    """What tags can say: longer spans take their characters first, of one layer for all or of one for each label.

    In one layer each text that stays says one triple, which is not told here: a set of (text,) then.
    """
    parts = {(e.type, a.role, a.start, a.end, a.text) for e in record.events for a in e.arguments}
    taken: dict[Any, set[int]] = {}
    said: set[Any] = set()
    for kind, role, start, end, text in sorted(parts, key=lambda part: (part[2] - part[3], part[2])):
        if role == TRIGGER_ROLE:
            continue
        used, places = taken.setdefault((kind, role) if layered else None, set()), set(range(start, end))
        if not used & places:
            used |= places
            said.add((kind, role, text) if layered else (text,))
    return said
