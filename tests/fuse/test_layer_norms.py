"""Layer norms of other classes than torch's: known by what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.test_fuse import assert_same, fused_calls
from tests.fuse.test_matching import x4


class Inherits(nn.LayerNorm):
    pass


class ByFunction(nn.LayerNorm):
    """As timm's, which is F.layer_norm unless told otherwise."""

    fast = False

    def forward(self, x):
        if self.fast:
            return x
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirst(nn.LayerNorm):
    """As ConvNeXt's: the norm between two permutations."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class OnePlus(nn.LayerNorm):
    """As Nemotron's."""

    def forward(self, x):
        args = self.normalized_shape, self.weight + 1, self.bias, self.eps
        return F.layer_norm(x, *args)


class InTwo(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x * 2) + F.layer_norm(x, self.normalized_shape)


@pytest.mark.parametrize("cls", [Inherits, ByFunction, ChannelsFirst, OnePlus, InTwo], ids=lambda c: c.__name__)
def test_layer_norms_are_known_by_what_they_compute(cls: type[nn.LayerNorm]):
    model = nn.Sequential(cls(3 if cls is ChannelsFirst else 4))
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert {(c.op, c.status) for c in report} == {("layer_norm", "fused")}, report.table()
    assert isinstance(model[0], cls)
    assert "layer_norm_fwd" in fused_calls(model, x4())
    assert_same(model, reference, x4())
    assert_same(copy.deepcopy(model), reference, x4())
    assert_same(pickle.loads(pickle.dumps(model)), reference, x4())
    assert unfuse(model) == 1
    assert type(model[0]) is cls
