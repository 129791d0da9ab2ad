"""Packed rows and back: values, gradients, every dtype, and what kernels of variable length are told."""

import pytest
import torch
from torch import Tensor

from kexue.nn.transformer.packing import cumulative_lengths, pack, unpack, unpacked_mask

# Three rows of at most 7: [1 1 1 1 0 0 2 ...]
STARTS = torch.tensor([[0, 0], [2, 0], [0, 4], [1, 0], [1, 5]])
LENGTHS = torch.tensor([4, 1, 3, 5, 1])
SHAPE = (3, 7)
SEQUENCES = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 2, 0], [1, 0, 0, 0, 0, 0, 0]])


def plain_unpack(values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """The loop over sequences that the gather stands for."""
    unpacked = values.new_zeros(len(lengths), int(lengths.max()), *values.shape[2:])
    for sequence, ((row, start), length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        unpacked[sequence, :length] = values[row, start : start + length]
    return unpacked


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_unpack_is_the_plain_loop_and_pack_its_inverse(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    values = torch.randint(0, 2 if dtype == torch.bool else 50, (*SHAPE, *trailing)).to(dtype)
    unpacked = unpack(values, STARTS, LENGTHS)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, plain_unpack(values, STARTS, LENGTHS))
    packed = pack(unpacked, STARTS, LENGTHS, SHAPE)
    real = SEQUENCES != 0
    assert torch.equal(packed[real], values[real])
    assert not packed[~real].any()
    assert torch.equal(unpack(packed, STARTS, LENGTHS), unpacked)


def test_mask() -> None:
    mask = unpacked_mask(LENGTHS)
    assert mask.shape == (5, 5)
    assert mask.sum(1).tolist() == LENGTHS.tolist()
    assert torch.equal(mask, plain_unpack(torch.ones(SHAPE, dtype=torch.bool), STARTS, LENGTHS))


def test_padding_does_not_leak() -> None:
    """What lies between the sequences, or after them, is neither seen nor given a gradient, even where it is NaN."""
    values = torch.full((*SHAPE, 2), torch.nan)
    values[SEQUENCES != 0] = torch.randn(14, 2)
    values.requires_grad_()
    unpacked = unpack(values, STARTS, LENGTHS)
    assert unpacked.isfinite().all()
    (gradient,) = torch.autograd.grad(unpacked.square().sum(), values)
    assert torch.equal(gradient[SEQUENCES == 0], torch.zeros(7, 2))
    torch.testing.assert_close(gradient[SEQUENCES != 0], 2 * values[SEQUENCES != 0])
    rows = torch.full((5, 5, 2), torch.nan)
    rows[unpacked_mask(LENGTHS)] = 1.0
    assert torch.equal(pack(rows, STARTS, LENGTHS, SHAPE)[..., 0], (SEQUENCES != 0).float())


def test_gradients() -> None:
    values = torch.randn(*SHAPE, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: unpack(values, STARTS, LENGTHS), values)
    rows = torch.randn(5, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: pack(rows, STARTS, LENGTHS, SHAPE), rows)
    # Each is the other's transpose: <unpack(a), b> = <a, pack(b)>.
    left = (unpack(values, STARTS, LENGTHS) * rows).sum()
    right = (values * pack(rows, STARTS, LENGTHS, SHAPE)).sum()
    torch.testing.assert_close(left, right)


def test_empty_sequences_are_rows_of_zeros() -> None:
    starts, lengths = torch.tensor([[0, 3], [0, 0], [1, 3]]), torch.tensor([0, 3, 0])
    values = torch.randn(2, 3, 4)
    unpacked = unpack(values, starts, lengths)
    assert torch.equal(unpacked[1], values[0])
    assert not unpacked[[0, 2]].any()
    assert torch.equal(pack(unpacked, starts, lengths, (2, 3))[0], values[0])
    nothing = torch.zeros(2, dtype=torch.long)
    assert unpack(values[:, :0], starts[:2], nothing).shape == (2, 0, 4)
    assert unpack(values, starts[:0], nothing[:0]).shape == (0, 0, 4)
    assert pack(values.new_zeros(2, 0, 4), starts[:2], nothing, (1, 0)).shape == (1, 0, 4)


def test_the_layout_of_a_view_does_not_matter() -> None:
    values = torch.randn(4, *SHAPE).permute(1, 2, 0)
    assert torch.equal(unpack(values, STARTS, LENGTHS), plain_unpack(values, STARTS, LENGTHS))
    rows = torch.randn(4, 5, 5).permute(1, 2, 0)
    assert torch.equal(pack(rows, STARTS, LENGTHS, SHAPE), pack(rows.contiguous(), STARTS, LENGTHS, SHAPE))


def test_a_big_batch_takes_the_memory_of_its_result() -> None:
    """One gather: the backward pass keeps the places and the mask, not a copy of the values."""
    lengths = torch.randint(1, 64, (512,))
    starts = torch.stack((torch.arange(512) // 8, torch.arange(512) % 8 * 64), 1)
    values = torch.randn(64, 512, 64, requires_grad=True)
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        unpacked = unpack(values, starts, lengths)
    assert unpacked.shape == (512, int(lengths.max()), 64)
    assert saved < 0.05 * unpacked.numel() * unpacked.element_size()


def test_cumulative_lengths() -> None:
    borders, longest = cumulative_lengths(SEQUENCES)
    assert (borders.tolist(), longest) == ([0, 4, 7, 12, 13, 14], 5)
    assert borders.dtype == torch.int32
    gaps = torch.tensor([[0, 0, 3, 3, 0, 1], [1, 0, 0, 0, 2, 2]])  # a sequence ends with its row
    borders, longest = cumulative_lengths(gaps)
    assert (borders.tolist(), longest) == ([0, 2, 3, 4, 6], 2)
    for empty in (torch.zeros(2, 3), torch.zeros(1, 0)):
        borders, longest = cumulative_lengths(empty.long())
        assert (borders.tolist(), longest) == ([0], 0)


def test_attention_over_the_borders_is_attention_over_the_sequences() -> None:
    """The convention in use: tokens without padding, row by row, cut at the borders."""
    values = torch.randn(*SHAPE, 4)
    borders, longest = cumulative_lengths(SEQUENCES)
    pieces = values[SEQUENCES != 0].tensor_split(borders[1:-1].long())
    order = (STARTS[:, 0] * SHAPE[1] + STARTS[:, 1]).argsort()
    unpacked = unpack(values, STARTS, LENGTHS)[order]
    assert longest == unpacked.shape[1]
    for piece, row, length in zip(pieces, unpacked, LENGTHS[order], strict=True):
        assert torch.equal(piece, row[:length])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    values = torch.randn(*SHAPE, 8)
    there = unpack(values.cuda(), STARTS.cuda(), LENGTHS.cuda())
    assert torch.equal(there.cpu(), unpack(values, STARTS, LENGTHS))
    assert torch.equal(
        pack(there, STARTS.cuda(), LENGTHS.cuda(), SHAPE).cpu(), pack(there.cpu(), STARTS, LENGTHS, SHAPE)
    )
