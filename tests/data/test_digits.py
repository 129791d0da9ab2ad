"""The digits: a fixed, stratified split and batches for three tasks."""

from collections import Counter

import torch

from kexue.data.digits import DigitsDataModule


def test_split_is_fixed_and_stratified() -> None:
    data, other = DigitsDataModule(seed=1), DigitsDataModule(seed=2)
    sizes = {split: len(data.records(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1078, "val": 359, "test": 360}
    for split, size in sizes.items():
        shares = Counter(record.digit for record in data.records(split))
        assert all(abs(count / size - 0.1) < 0.01 for count in shares.values())
        assert [record.image.tobytes() for record in data.records(split)] == [
            record.image.tobytes() for record in other.records(split)
        ]
    assert [r.digit for r in DigitsDataModule(split_seed=1).records("test")] != [r.digit for r in data.records("test")]


def test_batches() -> None:
    data = DigitsDataModule(batch_size=50, eval_batch_size=200)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 22
    assert sum(len(batch["digit"]) for batch in batches) == 1078
    batch = batches[0]
    assert batch["image"].shape == (len(batch["digit"]), 1, 8, 8)
    assert batch["image"].dtype == batch["pixel_sum"].dtype == torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert torch.equal(batch["parity"], batch["digit"] % 2)
    assert torch.allclose(batch["pixel_sum"], batch["image"].sum(dim=(1, 2, 3)) * 16)
    assert [len(batch["digit"]) for batch in data.test_dataloader()] == [180, 180]
    assert data.model_arguments() == {}
