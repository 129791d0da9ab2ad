"""Sinusoids and rotations: what the articles say of them, in numbers."""

import torch

from kexue.nn.transformer import position_angles, rotate, sinusoids


def test_inner_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 64, dtype=torch.float64)
    angles = position_angles(40, 64).double()
    scores = rotate(query.expand(40, 64), angles) @ rotate(key.expand(40, 64), angles).T
    for distance in (-30, -1, 0, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)


def test_rotation_is_the_written_one() -> None:
    vector = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    found = rotate(vector, position_angles(3, 4))
    for position in range(3):
        for plane, theta in enumerate((1.0, 0.01)):
            turned = torch.complex(*vector[position, 2 * plane : 2 * plane + 2]) * torch.exp(
                torch.tensor(1j * position * theta)
            )
            torch.testing.assert_close(torch.view_as_real(turned), found[position, 2 * plane : 2 * plane + 2])


def test_rotation_keeps_lengths_and_dtype() -> None:
    vectors = torch.randn(2, 3, 20, 16)
    turned = rotate(vectors, position_angles(20, 16))
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    assert torch.equal(turned[..., 0, :], vectors[..., 0, :])
    assert rotate(vectors.bfloat16(), position_angles(20, 16)).dtype == torch.bfloat16


def test_sinusoids_are_a_toeplitz_family() -> None:
    table = sinusoids(50, 64).double()
    gram = table @ table.T
    torch.testing.assert_close(gram.diagonal(), torch.full((50,), 32.0).double(), atol=1e-4, rtol=0)
    for distance in (1, 10, 30):
        diagonal = gram.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
