"""Whether long rows run in kernels written in Gluon, which keep a row in shared memory: where the GPU and Triton support it.

FUSED_OPS_GLUON=0 turns them off. A GPU that refuses one, or a Triton that fails to compile one, runs none from then on, and
Triton's interpreter runs none: a row is then shared by a cluster, or read twice. A compiler that traces launches cannot print
them, and gets the others as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import settings
from .compiled import Planned
from .device import interpreting, properties_of
from .notices import warn_once
from .plans import forget_plans, may_be_refused

GLUON_CAPABILITIES = (9, 10)  # major: 12 and 8 have less shared memory than the kernels take

_given_up: set[int] = set()


@functools.cache
def _importable() -> bool:
    """Whether this Triton has all of Gluon that the kernels name."""
    try:
        from ..kernels import shared_rows  # noqa: F401 - imported to see whether it can be
    except Exception as error:  # Gluon is experimental: a name may be missing, and what that raises is up to Triton
        warn_once("gluon", f"not used, for it cannot be imported ({type(error).__name__}: {error})")
        return False
    return True


def gluon_wanted(device: int) -> bool:
    """Whether a kernel in Gluon may run on a device. device: a GPU's index, or -1 for the CPU."""
    able = not interpreting() and device not in _given_up and properties_of(device)[0][0] in GLUON_CAPABILITIES
    return settings.GLUON and able and _importable()


def or_no_gluon(planned: Planned, plan_again: Callable[[], Planned]) -> Planned:
    """planned, a launch of a kernel in Gluon; where it is refused, plan_again() plans the launch of the same rows without."""

    def instead(error: Exception) -> Planned:
        _given_up.add(planned.device)
        forget_plans()
        said = next(filter(None, str(error).splitlines()), "")
        reason = f"GPU {planned.device} runs none ({type(error).__name__}: {said[:200]}); long rows run as without them"
        warn_once("gluon", reason)
        return plan_again()

    return planned if planned.device < 0 else may_be_refused(planned, instead)
