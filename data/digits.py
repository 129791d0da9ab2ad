"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with the library, no download."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .base import KexueDataModule, Split
from .rows import OnBadRow


@dataclass(frozen=True, slots=True)
class DigitRecord:
    """An image (8, 8) of pixel values 0 to 16 and the digit it shows."""

    image: np.ndarray
    digit: int


class DigitsDataModule(KexueDataModule):
    """Batches for one image and three tasks: which digit, odd or even, and the sum of all pixels.

    The split is 60 / 20 / 20 per digit. It depends on `split_seed` alone, so that runs with different `seed` are tested
    on the same images.

    Args:
        batch_size: most images in a training batch of one process.
        split_seed: of the split.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 32,
        *,
        split_seed: int = 0,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_row: OnBadRow = "raise",
        bad_rows_file: str | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        self.split_seed = split_seed

    def prepare(self) -> None:
        """Nothing: the model's shape does not depend on the data."""

    def model_arguments(self) -> dict[str, Any]:
        """No argument of the model depends on the data."""
        return {}

    def read_split(self, split: Split) -> Sequence[DigitRecord]:
        """Read the images of train, val or test."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        images, labels = digits.images.astype(np.float32), digits.target
        train, rest = train_test_split(
            np.arange(len(labels)), train_size=0.6, stratify=labels, random_state=self.split_seed
        )
        val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=self.split_seed)
        rows = {"train": train, "val": val, "test": test}[split]
        return [DigitRecord(images[row], int(labels[row])) for row in sorted(rows)]

    def collator(self) -> Callable[[list[DigitRecord]], dict[str, Any]]:
        """The function `collate_digits`."""
        return collate_digits


def collate_digits(records: list[DigitRecord]) -> dict[str, torch.Tensor]:
    """Stack records into image (B, 1, 8, 8) in 0..1, digit (B,), parity (B,) and the raw pixel_sum (B,)."""
    images = torch.from_numpy(np.stack([record.image for record in records])).unsqueeze(1)
    digit = torch.tensor([record.digit for record in records])
    return {"image": images / 16, "digit": digit, "parity": digit % 2, "pixel_sum": images.sum(dim=(1, 2, 3))}
