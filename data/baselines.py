"""Plain baselines that a trained model is stated beside."""

from collections.abc import Iterable

from .records import TRIGGER_ROLE, Argument, Event, EventRecord


class TriggerDictionary:
    """Predicts an event type when one of the words that named such an event in training occurs in the text."""

    def __init__(self, triggers: dict[str, set[str]]) -> None:
        self.triggers = triggers
        """Event type -> its trigger words."""

    @classmethod
    def fit(cls, records: Iterable[EventRecord]) -> "TriggerDictionary":
        """Collect the triggers of annotated records."""
        triggers: dict[str, set[str]] = {}
        for record in records:
            for event in record.events:
                if event.trigger is not None:
                    triggers.setdefault(event.type, set()).add(event.trigger.text)
        return cls(triggers)

    def predict(self, record: EventRecord) -> EventRecord:
        """Return the record with one event for each type found, its only argument the trigger.

        Of several triggers of one type the longest is taken, at its first place.
        """
        events = []
        for event_type, words in self.triggers.items():
            found = [word for word in words if word in record.text]
            if found:
                word = max(found, key=lambda word: (len(word), -record.text.index(word)))
                events.append(Event(event_type, (Argument(TRIGGER_ROLE, word, record.text.index(word)),)))
        return EventRecord(record.id, record.text, tuple(events))
