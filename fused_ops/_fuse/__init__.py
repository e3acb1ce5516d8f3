"""fuse(model), unfuse(model) and FuseReport: a model's own modules made to call the fused functions, in place."""

from .engine import fuse, unfuse
from .report import Candidate, FuseReport

__all__ = ["Candidate", "FuseReport", "fuse", "unfuse"]
