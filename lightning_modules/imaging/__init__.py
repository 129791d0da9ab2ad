"""Models of images."""

from .digits_multitask import DigitsMultitaskModule

__all__ = ["DigitsMultitaskModule"]
