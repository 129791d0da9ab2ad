"""Products of few rows with a matrix: the quick form is the plain one, and is taken where it is meant to be."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kexue.nn.transformer.products import linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [10, 60])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (4, 1), (2, 2), (5, 1), (), (0, 1)], ids=str)
def test_equals_a_linear_layer(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(*shape, 20), torch.randn(outputs, 20)
    offset = torch.randn(outputs) if bias else None
    with torch.no_grad():
        found, plain = linear(inputs, weight, offset), F.linear(inputs, weight, offset)
    assert found.is_contiguous()
    assert found.shape == plain.shape
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_the_layout_of_the_rows_does_not_matter() -> None:
    rows, weight = torch.randn(20, 3).t(), torch.randn(60, 20)
    with torch.no_grad():
        torch.testing.assert_close(linear(rows, weight), F.linear(rows, weight), rtol=1e-5, atol=1e-5)


def columns(rows: int, outputs: int, inputs: int = 20, dtype: torch.dtype = torch.float32) -> float:
    """How many rows are really multiplied, by torch's counter, which sees the row that is doubled."""
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype))
    return counter.get_total_flops() / (2 * inputs * outputs)


def test_a_single_row_is_doubled_before_a_wide_matrix_only() -> None:
    with torch.no_grad():
        assert [columns(rows, 40) for rows in (1, 2, 3, 4, 5)] == [2, 2, 3, 4, 5]
        assert columns(1, 39) == columns(1, 40, dtype=torch.bfloat16) == 1
    assert columns(1, 40) == 1


def test_gradients_are_those_of_a_linear_layer() -> None:
    weight = torch.randn(60, 20, requires_grad=True)
    linear(torch.randn(2, 20), weight).sum().backward()
    assert weight.grad is not None
