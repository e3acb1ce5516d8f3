"""What rows.py says of rows in memory, for every alignment of sizes and strides."""

from __future__ import annotations

import itertools

import pytest

from fused_ops.kernels.rows import row_vectors, whole_vectors

SIZES = (1, 4, 31, 32, 33, 64, 196, 197, 200, 512, 513, 1024)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("column_stride", [0, 1, 2])
def test_vectors_lie_where_they_are_read(itemsize: int, column_stride: int) -> None:
    """Without edges every row begins and ends at a whole vector, and with them heads that are called equal are equal."""
    kinds = set()
    for N, *added in itertools.product(SIZES, range(9), range(9)):
        strides = tuple(N + more for more in added)
        vec, edges, same = row_vectors(N, itemsize, column_stride, strides)
        assert vec in (1, 16 // itemsize)
        kinds.add((vec > 1, edges, same))
        if vec == 1:
            assert not edges
        else:
            assert column_stride == 1
            assert edges or all(size % vec == 0 for size in (N, *strides))
        assert not same or all(row * a % vec == row * b % vec for row in range(vec) for a in strides for b in strides)
        assert whole_vectors(N, itemsize, column_stride, strides) == (1 if edges else vec)
    assert len(kinds) == (4 if column_stride == 1 else 1)
