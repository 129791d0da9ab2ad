"""Typed records: what a reader gives, what a model is trained on and what a writer takes.

Positions count characters (Python's, that is Unicode code points) of the original text, from 0; ends are exclusive.
"""

from dataclasses import dataclass

TRIGGER_ROLE = "触发词"
"""The role under which an event's trigger stands among its arguments: corpora without triggers need no special case."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One span of the text and the role it plays in an event."""

    role: str
    text: str
    start: int

    @property
    def end(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its type and its arguments, the trigger (if any) among them under `TRIGGER_ROLE`."""

    type: str
    arguments: tuple[Argument, ...]

    @property
    def trigger(self) -> Argument | None:
        """The argument that names the event, or None when there is none."""
        return next((argument for argument in self.arguments if argument.role == TRIGGER_ROLE), None)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A text and the events it tells of: gold from a reader, predicted from a model, none for a text to be read."""

    id: str
    text: str
    events: tuple[Event, ...] = ()
