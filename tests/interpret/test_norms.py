"""The norms' mixed dtypes, arguments and empty dimensions where the kernels compute: the tests of the ATen path, interpreted."""

from __future__ import annotations

from tests.ops.test_norm_arguments import test_empty_dimensions as test_empty
from tests.ops.test_norm_arguments import test_refusals_are_one_short_sentence as test_refusals
from tests.ops.test_norm_arguments import test_what_torch_takes_is_taken as test_taken
from tests.torch.test_mixed_dtypes import test_create_graph_and_a_gradient_penalty as test_second_order
from tests.torch.test_mixed_dtypes import test_eager as test_mixes
from tests.torch.test_mixed_dtypes import test_transforms as test_transformed_mixes

__all__ = ["test_empty", "test_mixes", "test_refusals", "test_second_order", "test_taken", "test_transformed_mixes"]
