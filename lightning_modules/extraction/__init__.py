"""What is said in a text: events and, later, relations, entities and spans."""

from .gplinker import EventGPLinker

__all__ = ["EventGPLinker"]
