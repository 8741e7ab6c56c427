"""Rows in blocks of columns against a plain matrix, at every way the columns can fall."""

from __future__ import annotations

import pytest
import torch

from stableopt.curvature.products.blocked_rows import WIDTH, Rows


@pytest.mark.parametrize("size", [0, 1, 4 * WIDTH - 1, 4 * WIDTH, 4 * WIDTH + 5, 6 * WIDTH])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_products_are_those_of_a_matrix(size: int, count: int) -> None:
    """Catches columns that fall between the blocks and the rest, and rows that are not in use."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, size, generator=generator, dtype=torch.float64)
    vectors = torch.randn(2, size, generator=generator, dtype=torch.float64)
    weights = torch.randn(count, generator=generator, dtype=torch.float64)
    rows = Rows(5, vectors[0])
    for i, row in enumerate(matrix):
        rows.write(i, torch.full_like(row, torch.nan))
    for i in range(count):
        rows.write(i, matrix[i], 0.5)
        assert torch.equal(rows.read(i), 0.5 * matrix[i])
    used = 0.5 * matrix[:count]
    # Sums of up to 5e4 products of size one, in another order: some 1e3 roundings of 2e-16.
    close = {"rtol": 1e-12, "atol": 1e-10}
    torch.testing.assert_close(rows.inner(vectors, count), vectors @ used.T, **close)
    added = rows.added(vectors[0], weights, beta=-2.0, alpha=3.0)
    torch.testing.assert_close(added, -2 * vectors[0] + 3 * weights @ used, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Catches a kernel that a dtype lacks, and sums over blocks in the dtype itself."""
    size = 5 * WIDTH
    vector = torch.ones(size, dtype=dtype)
    rows = Rows(2, vector)
    rows.write(0, vector, 0.25)
    products = rows.inner(vector[None], 1)
    assert products.dtype == torch.float64
    # Exact: a block sums to 2048, a power of two, and all of them to 10,240, which bfloat16 is not.
    assert products.tolist() == [[0.25 * size]]
    assert rows.added(vector, torch.ones(1), beta=1.0, alpha=2.0).unique().tolist() == [1.5]
