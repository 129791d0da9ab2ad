"""What a text is like: encoders that learn it from texts without labels."""

from .masked_lm import MaskedLM

__all__ = ["MaskedLM"]
