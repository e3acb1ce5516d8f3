"""Which norms are recognised by what they compute, why the others are refused, and that finding out changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ops import fused_rmsnorm
from fused_ops._fuse import norm_formula as recogniser
from fused_ops._fuse.norm_formula import NormFormula, norm_formula
from tests.fuse.norm_formulas import verdicts
from tests.fuse.norm_modules import CALLS, MODE_E, NONE, REFUSED, Biased, Divided, GroupedWide, Llama, N, WeightUp, Wide


@pytest.mark.parametrize("cls", MODE_E)
def test_recognised(cls):
    make, weight, eps, pairs = MODE_E[cls]
    module = make()
    found = norm_formula(module)
    assert isinstance(found, NormFormula), found
    assert (found.op, found.weight, found.eps, set(found.pairs)) == ("rms_norm", weight, eps, pairs)
    assert found.input == ("hidden" if cls is Divided else "x")
    assert found == norm_formula(make()), "a second instance has the verdict of the first"
    for x_dtype, weight_dtype in sorted(found.pairs, key=str):
        assert_fused_is_equal(module, found, x_dtype, weight_dtype)


def assert_fused_is_equal(module, found, x_dtype, weight_dtype):
    """A subclass that calls fused_rmsnorm as the formula says gives the module's numbers."""

    class Fused(type(module)):
        def forward(self, x):
            weight = None if found.weight is None else getattr(self, found.weight)
            eps = getattr(self, found.eps) if isinstance(found.eps, str) else found.eps
            return fused_rmsnorm(x, x.shape[-1:], weight, eps)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, N, generator=generator).to(x_dtype)
    if found.weight is not None:
        weight = nn.Parameter(torch.randn(N, generator=generator).to(weight_dtype))
        setattr(module, found.weight, weight)
    expected = module(x)
    module.__class__ = Fused
    got = module(x)
    module.__class__ = Fused.__mro__[1]
    assert got.dtype is expected.dtype is x_dtype
    integers = {torch.float32: torch.int32}.get(x_dtype, torch.int16)
    ulps = (got.view(integers).long() - expected.view(integers).long()).abs()
    assert ulps.max() <= (4 if x_dtype is torch.float32 else 1)  # the sum in another order and the root: some ulp of fp32


@pytest.mark.parametrize("cls", REFUSED)
def test_refused_with_its_reason(cls):
    make, words = REFUSED[cls]
    module = make()
    before = dict(vars(module))
    found = norm_formula(module)
    assert isinstance(found, str)
    assert re.search(words, found), found
    assert vars(module) == before
    assert CALLS == []


@pytest.mark.parametrize("kind", NONE)
def test_none_where_the_module_computes_no_norm_of_its_own(kind):
    assert norm_formula(NONE[kind]()) is None


def test_the_verdict_is_of_the_instance_s_constants():
    with_scale, without = norm_formula(WeightUp(with_scale=True)), norm_formula(WeightUp(with_scale=False))
    assert (with_scale.weight, with_scale.constants) == ("weight", (("with_scale", True),))
    assert (without.weight, without.constants) == (None, (("with_scale", False),)), "an unused weight does no harm"
    assert norm_formula(GroupedWide(group_size=None)).constants == (("group_size", None),)
    assert "groups" in norm_formula(GroupedWide(group_size=8))
    assert norm_formula(Biased(bias=None)).constants == (("bias", None),)
    assert norm_formula(Wide(eps=0)).constants == (("eps", 0),), "an int is held by value"


def test_a_changed_class_has_a_verdict_of_its_own(monkeypatch):
    assert isinstance(norm_formula(Wide()), NormFormula)
    monkeypatch.setattr(Wide, "forward", Llama.forward)
    assert "rounds before the weight" in norm_formula(Wide())


def _hook(*args):
    raise AssertionError("the module was called")


def test_nothing_of_the_process_or_the_module_changes():
    module = Divided().eval()
    module.register_forward_pre_hook(_hook)
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    call, state = nn.Module.__call__, torch.get_rng_state()
    recogniser._VERDICTS.clear()
    assert isinstance(norm_formula(module), NormFormula)
    assert vars(module) == before
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def _quantised():
    module = Wide()
    module.weight = nn.Parameter(torch.ones(N, dtype=torch.int8), requires_grad=False)
    return module


def _fake():
    with FakeTensorMode():
        return Wide()


def _lazy():
    module = Wide()
    module.weight = nn.UninitializedParameter()
    return module


def _computed():
    module = Wide()
    del module.weight
    module.weight = torch.ones(N)  # as weight_norm leaves it
    return module


STRANGE = {
    "meta": (lambda: Wide().to("meta"), True),
    "large": (lambda: Wide(16384), True),
    "fake": (_fake, True),
    "quantised": (_quantised, True),
    "empty": (lambda: Wide(0), True),
    "two dimensions": (lambda: Wide((2, N)), False),
    "lazy": (_lazy, False),
    "computed": (_computed, False),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(Wide((2, N))), False),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_weights(kind):
    """The formula is the code's, whatever the weight is; where that is not sure, there is a reason."""
    make, known = STRANGE[kind]
    recogniser._VERDICTS.clear()
    found = norm_formula(make())
    assert isinstance(found, NormFormula if known else str), found


def test_inside_modes_of_the_process():
    recogniser._VERDICTS.clear()
    with torch.device("meta"), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert isinstance(norm_formula(Wide()), NormFormula)


def test_an_interrupt_passes(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(recogniser, "check_code", interrupt)
    with pytest.raises(KeyboardInterrupt):
        norm_formula(Wide())


def test_a_norm_that_is_not_its_formula_when_tried_is_refused(monkeypatch):
    """The trial is the last word: here the formula of the match is made another one."""
    recogniser._VERDICTS.clear()
    monkeypatch.setitem(recogniser._ROOTS, "rsqrt", lambda x, v: x * torch.rsqrt(v + 1))
    assert "not its formula when tried" in norm_formula(Wide())
    recogniser._VERDICTS.clear()


TRANSFORMERS = {
    "gpt_oss": ("GptOssRMSNorm", "weight weight"),
    "gemma3n": ("Gemma3nRMSNorm", "weight weight"),
    "llama": ("LlamaRMSNorm", "rounds before the weight"),
    "t5": ("T5LayerNorm", "T5's way"),
    "falcon_h1": ("FalconH1RMSNormGated", "takes hidden_states, gate"),
    "cohere": ("CohereLayerNorm", "a mean is subtracted"),
}


@pytest.mark.parametrize("folder", TRANSFORMERS)
def test_transformers(folder):
    name, words = TRANSFORMERS[folder]
    table = verdicts([folder], exact=True)
    assert [verdict for verdict, names in table.items() if name in names and words in verdict], table
