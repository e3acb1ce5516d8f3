"""Norms written by hand: those that fused_rmsnorm computes, and those that differ from it in one thing each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

N = 24
HALVES = (torch.bfloat16, torch.float16)
MIXES = {(x, w) for x in (torch.float32, *HALVES) for w in (torch.float32, *HALVES)}
CALLS: list[torch.Tensor] = []


class Norm(nn.Module):
    """A weight and an eps; the classes below differ in their forward."""

    def __init__(self, n: int = N, eps: float = 1e-5, **attributes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps
        for name, value in attributes.items():
            setattr(self, name, value)


class Wide(Norm):
    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return (self.weight * x).to(dtype)


class WeightUp(Norm):
    def _norm(self, x):
        return x * torch.pow(x.square().mean(-1, keepdim=True) + self.eps, -0.5)

    def forward(self, x):
        output = self._norm(x.float())
        if self.with_scale:
            output = output * self.weight.float()
        return output.type_as(x)


class Divided(Norm):
    def forward(self, hidden):
        wide = hidden.float()
        return (self.weight.float() * (wide / torch.sqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-6))).to(
            hidden.dtype
        )


class PromotedByRoot(Norm):
    """x itself is not cast: the product with an fp32 root does."""

    def forward(self, x):
        rstd = 1 / (self.eps + (x.float() ** 2).mean((-1,), True)).sqrt()
        return ((x * rstd) * self.weight).to(dtype=x.dtype)


class Helped(Norm):
    @staticmethod
    def _root(x, eps):
        return x.pow(2).mean(dim=-1, keepdim=True).add(eps).sqrt().reciprocal()

    def forward(self, x):
        wide = x.float()
        return torch.mul(torch.mul(wide, self._root(wide, self.eps)), self.gain).type(x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.weight = self.weight, None


class Weightless(nn.Module):
    eps = 1e-6

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class WeightsDtype(Norm):
    """Its result has the weight's dtype: fused_rmsnorm's has the input's."""

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).type_as(self.weight)


MODE_E = {  # module -> weight, eps, pairs
    Wide: (lambda: Wide(), "weight", "eps", MIXES),
    WeightUp: (lambda: WeightUp(with_scale=True), "weight", "eps", MIXES | {(x, torch.float64) for x, _ in MIXES}),
    Divided: (lambda: Divided(), "weight", 1e-6, MIXES | {(x, torch.float64) for x, _ in MIXES}),
    PromotedByRoot: (lambda: PromotedByRoot(), "weight", "eps", MIXES),
    Helped: (lambda: Helped(), "gain", "eps", MIXES),
    Weightless: (lambda: Weightless(), None, "eps", {(x, None) for x, _ in MIXES}),
    WeightsDtype: (lambda: WeightsDtype(), "weight", "eps", {(x, x) for x, _ in MIXES}),
}


class Llama(Norm):
    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LlamaChecked(Norm):
    def forward(self, x):
        if x.size(-1) != self.width:
            raise AssertionError("another size")
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class WideChecked(Norm):
    def forward(self, x):
        if x.shape[-1] != self.width:
            raise ValueError("another size")
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class T5(Norm):
    def forward(self, x):
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


class Gemma(Norm):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


class Grouped(Gemma):
    def _norm(self, x):
        if self.group_size is not None:
            x = x.reshape(*x.shape[:-1], -1, self.group_size)
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return out.flatten(-2) if self.group_size is not None else out


class GroupedWide(Grouped):
    def forward(self, x):
        return (self._norm(x.float()) * self.weight.float()).type_as(x)


class OneAddedLow(Gemma):
    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight).float()).type_as(x)


class WeightFirst(Gemma):
    def forward(self, x):
        return self._norm((x.float() * (1.0 + self.weight).float()).type_as(x).float()).type_as(x)


class WeightIntoRoot(Norm):
    def forward(self, x):
        wide = x.float()
        return (wide * (self.weight * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).type_as(x)


class RootRounded(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class NoUpcast(Norm):
    def forward(self, x):
        return x / torch.sqrt(torch.mean(torch.square(x), axis=-1, keepdim=True) + self.eps) * self.weight


class StaysWide(Norm):
    def forward(self, x):
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Biased(Gemma):
    def forward(self, x):
        out = self._norm(x.float()) * self.weight
        return (out if self.bias is None else out + self.bias).type_as(x)


class Gated(Gemma):
    def forward(self, x, gate=None):
        if gate is not None:
            x = x * F.silu(gate)
        return (self._norm(x.float()) * self.weight).type_as(x)


class Cohere(Norm):
    def forward(self, x):
        wide = x.to(torch.float32)
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        return (self.weight.to(torch.float32) * ((wide - mean) * torch.rsqrt(variance + self.eps))).to(x.dtype)


class Simple(Norm):
    def forward(self, x):
        return x * torch.rsqrt(torch.var(x.float(), dim=-1, keepdim=True) + self.eps).to(x.dtype) * self.weight


class Summed(Norm):
    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Normalised(Norm):
    def forward(self, x):
        return F.normalize(x.float(), dim=-1).to(x.dtype) * self.weight


class FirstDimension(Norm):
    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class RootOnly(Norm):
    def forward(self, x):
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)


class TwoScales(Norm):
    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * 0.5).to(x.dtype)


class Frozen(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(N))

    def forward(self, x):
        return x * (self.weight * (self.running_var + self.eps).rsqrt())


class InPlace(Norm):
    def forward(self, x):
        wide = x.float()
        wide *= torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Remembers(Wide):
    def forward(self, x):
        self.last = x.float().pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(self.last + self.eps)


class Appends(Wide):
    def forward(self, x):
        CALLS.append(x)
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


class OwnFloat(Wide):
    """self.float() is nn.Module's, and writes the module's parameters."""

    def forward(self, x):
        self.float()
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


class Loops(Wide):
    def forward(self, x):
        while True:
            x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


class Decorated(Wide):
    @torch.no_grad()
    def forward(self, x):
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


class Superior(Wide):
    def forward(self, x):
        return super().forward(x).rsqrt()


class DiffersInTraining(Wide):
    def forward(self, x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return (y if self.training else y + 1).to(x.dtype)


class Property(Wide):
    @property
    def eps(self):
        raise AssertionError("no code of the user runs")

    @eps.setter
    def eps(self, value):
        pass


class Rooted(Norm):
    """It is only in fp32 that eps is what it is; in half precision another number."""

    def forward(self, x):
        wide = x.float()
        eps = self.eps if x.dtype is torch.float32 else 1e-3
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * self.weight).to(x.dtype)


class OthersNorm(Norm):
    def forward(self, x):
        return my_norm(x, self.weight)


def my_norm(x, weight):
    return x * weight


REFUSED = {
    Llama: (lambda: Llama(), "rounds before the weight"),
    LlamaChecked: (lambda: LlamaChecked(width=N), "rounds before the weight"),
    WideChecked: (lambda: WideChecked(width=N), "branches on the input's shape"),
    T5: (lambda: T5(), "dtype depends on the weight's"),
    Gemma: (lambda: Gemma(), r"1 \+ weight \(added in fp32\)"),
    Grouped: (lambda: Grouped(group_size=8), "groups or heads"),
    OneAddedLow: (lambda: OneAddedLow(), r"1 \+ weight \(added in the weight's dtype\)"),
    WeightFirst: (lambda: WeightFirst(), "weight before the statistics"),
    WeightIntoRoot: (lambda: WeightIntoRoot(), "does not know"),
    RootRounded: (lambda: RootRounded(), "rounds rstd"),
    NoUpcast: (lambda: NoUpcast(), "not compute in fp32"),
    StaysWide: (lambda: StaysWide(), "not in the input's dtype"),
    Biased: (lambda: Biased(bias=nn.Parameter(torch.zeros(N))), "adds a bias"),
    Gated: (lambda: Gated(), "takes x, gate"),
    Cohere: (lambda: Cohere(), "a mean is subtracted"),
    Simple: (lambda: Simple(), r"spread \(var\)"),
    Summed: (lambda: Summed(), r"L2 norm \(sum\)"),
    Normalised: (lambda: Normalised(), r"L2 norm \(normalize\)"),
    FirstDimension: (lambda: FirstDimension(), "over the last dimension alone"),
    RootOnly: (lambda: RootOnly(), "returns the factor"),
    TwoScales: (lambda: TwoScales(), "more than normalise"),
    Frozen: (lambda: Frozen(), "frozen batch norm"),
    InPlace: (lambda: InPlace(), "in place"),
    Remembers: (lambda: Remembers(), "writes or imports last"),
    Appends: (lambda: Appends(), "uses CALLS"),
    OwnFloat: (lambda: OwnFloat(), "uses float"),
    Loops: (lambda: Loops(), "loops"),
    Decorated: (lambda: Decorated(), "decorated"),
    Superior: (lambda: Superior(), "closure"),
    DiffersInTraining: (lambda: DiffersInTraining(), "training and evaluation"),
    Property: (lambda: Property(), "eps is a property"),
    Rooted: (lambda: Rooted(), "another weight or eps"),
    OthersNorm: (lambda: OthersNorm(), "calls my_norm"),
}


class Squares(nn.Module):
    """A loss: it takes the mean of squares, and is no norm."""

    def forward(self, x, y):
        return (x - y).pow(2).mean().sqrt()


class CallsTorch(Norm):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


NONE = {
    "torch's own": lambda: nn.RMSNorm(N),
    "a subclass of LayerNorm": lambda: type("Own", (nn.LayerNorm,), {"forward": Cohere.forward})(N),
    "with children": lambda: Wide(child=nn.Linear(1, 1)),
    "no norm": lambda: nn.GELU(),
    "a loss": Squares,
    "calls F.rms_norm": CallsTorch,
    "no forward": nn.Module,
}
