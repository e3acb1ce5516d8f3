"""One block each of BERT, GPT-2 and Llama, and attention with a softmax of its own: in torch's functions, or in ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops import REGISTRY

B, S, D, H, HIDDEN = 2, 32, 64, 4, 256


class Functions(NamedTuple):
    """What a block calls."""

    layer_norm: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    softmax: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    gated_linear: Callable[..., Tensor]


EAGER = Functions(*(REGISTRY[name].torch_fn for name in Functions._fields))
OURS = Functions(*(REGISTRY[name].public for name in Functions._fields))


class Block(nn.Module):
    """Parameters of all blocks, and attention."""

    def __init__(self, functions: Functions, dropout: float = 0.1) -> None:
        super().__init__()
        self.f, self.p = functions, dropout
        shapes = {"qkv": (3 * D, D), "out": (D, D), "up": (HIDDEN, D), "gate": (HIDDEN, D), "down": (D, HIDDEN)}
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) * shape[1] ** -0.5))
            setattr(self, f"{name}_b", nn.Parameter(torch.randn(shape[0], generator=generator) * 0.1))
        for name in ("w1", "b1", "w2", "b2"):
            setattr(self, name, nn.Parameter(torch.randn(D, generator=generator)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def heads(self, x: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
        qkv = self.f.linear(x, self.qkv, self.qkv_b if bias else None)
        return tuple(t.view(*x.shape[:-1], H, D // H).transpose(-2, -3) for t in qkv.chunk(3, -1))

    def joined(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -3).reshape(*x.shape[:-3], x.shape[-2], D)


class Bert(Block):
    """After the norm; attention with a mask, and a softmax in words."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = (x[:, None, None, :S, 0] < 9.0).to(x.dtype).log()
        scores = q @ k.transpose(-1, -2) / (D // H) ** 0.5 + mask
        a = self.joined(self.drop(self.f.softmax(scores, -1)) @ v)
        x = self.f.layer_norm(x + self.drop(self.f.linear(a, self.out, self.out_b)), (D,), self.w1, self.b1)
        h = self.f.linear(x, self.up, self.up_b, "gelu")
        return self.f.layer_norm(x + self.drop(self.f.linear(h, self.down, self.down_b)), (D,), self.w2, self.b2)


class Gpt2(Block):
    """Before the norm; causal SDPA; tanh-GELU."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.f.layer_norm(x, (D,), self.w1, self.b1))
        a = self.joined(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.drop(self.f.linear(a, self.out, self.out_b))
        h = self.f.linear(self.f.layer_norm(x, (D,), self.w2, self.b2), self.up, self.up_b, "gelu_tanh")
        return x + self.drop(self.f.linear(h, self.down, self.down_b))


class Llama(Block):
    """RMS norms, rotated heads, a gate of SiLU; no biases."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.f.rms_norm(x, (D,), self.w1, 1e-6), bias=False)
        a = self.joined(F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True))
        x = x + self.f.linear(a, self.out)
        h = self.f.gated_linear(self.f.rms_norm(x, (D,), self.w2, 1e-6), self.gate, self.up, "silu")
        return x + self.f.linear(h, self.down)


class Alone(Block):
    """Norms between products, and a softmax over the vocabulary: nothing stands next to our operators."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.f.layer_norm(x @ self.out, (D,), self.w1, self.b1) @ self.qkv.t()
        x = self.f.softmax(x, -1) @ self.qkv
        return self.f.rms_norm(x, (D,), self.w2, 1e-6) @ self.out


def rotated(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None]
    angles = positions * 10000 ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    cos, sin = angles.cos().repeat(1, 2).to(x.dtype), angles.sin().repeat(1, 2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


BLOCKS = (Bert, Gpt2, Llama)
