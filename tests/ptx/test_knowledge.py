"""What threads know of one another does not depend on how it is kept."""

from __future__ import annotations

import numpy as np

from fused_ops.testing.ptx.knowledge import Knowledge


def test_numbering_the_rows_anew_changes_no_knowledge() -> None:
    """Rows are numbered anew where they run out, in the midst of a barrier, a fence or a wait by threads that know unlike things."""
    kept, roomy = Knowledge(64, 1, 0, {"phase"}), Knowledge(64, 1, 0, {"phase"})
    roomy.rows = np.zeros((2, 1 << 13, roomy.agents), np.int32)
    rng = np.random.default_rng(0)
    for step in range(100):
        threads = np.flatnonzero(rng.random(64) < 0.5)
        for one in (kept, roomy):
            if step % 4 == 0:
                one.arrive("mbarrier", int(threads[0]))
                one.complete("mbarrier")
            elif step % 4 == 1:
                one.waited("mbarrier", threads)
            elif step % 4 == 2:
                one.fence_async(threads)
            else:
                one.join(threads[threads < 32])
        assert np.array_equal(kept.rows[:, kept.row_of], roomy.rows[:, roomy.row_of]), step
    assert kept.rows.shape[1] < roomy.used < roomy.rows.shape[1]
