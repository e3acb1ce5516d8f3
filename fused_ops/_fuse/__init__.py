"""fuse(model), unfuse(model) and FuseReport: the forwards of a model's own modules made to call the fused functions, in place.

What fuses is the source of the module that calls both a Linear and its activation, so that each of them stays what it is for
everyone else. Tracing could not do that: fx replaces nn.Module.__call__ for the whole process while it runs, leaves its proxies
in what a forward writes to, and stops at loops, type tests and branches.

Read: source (a function's syntax tree, proven to be what runs), flow (what its variables hold), sites (the forms), resolve (what
names stand for). Decide: methods, verdicts, blocks, neighbours, whole, norm_formula, plan. Change, and undo: edit, swap. Run in each
fused call: calls, chains, activations, conditions. Tell: rows, left, branches, count, report.
"""

from .engine import fuse, unfuse
from .report import Candidate, FuseReport

__all__ = ["Candidate", "FuseReport", "fuse", "unfuse"]
