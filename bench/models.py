"""Models for the end-to-end measurements, of torch.nn layers with random weights: the sizes are real, the weights need not be.

Attention is torch's scaled_dot_product_attention for everybody: what is compared is all around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), activation, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PreNormBlock(nn.Module):
    """The block of GPT-2 and ViT: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: nn.Module, causal: bool, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention, self.mlp = Attention(width, heads, causal), MLP(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNormBlock(nn.Module):
    """The block of BERT: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)
        self.attention, self.mlp = Attention(width, heads, False), MLP(width, hidden, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """An encoder of all-MiniLM-L6-v2's size: token and position embeddings, 6 blocks of width 384, mean pooling."""

    def __init__(
        self, vocabulary: int = 30522, positions: int = 512, width: int = 384, heads: int = 12, layers: int = 6
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, 4 * width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.normalize(x.mean(1), dim=-1)


@dataclass(frozen=True)
class Model:
    """build() gives the module in fp32 on the CPU; inputs(batch, device, dtype) one batch for it.

    latency, throughput: the batch sizes of the two inference measurements; training: that of a training step.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, str, torch.dtype], Tensor]
    length: int
    latency: int = 1
    throughput: int = 64
    training: int = 32


def _ids(batch: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 30522, (batch, 128), device=device)


def _hidden(length: int, width: int) -> Callable[[int, str, torch.dtype], Tensor]:
    return lambda batch, device, dtype: torch.randn(batch, length, width, device=device, dtype=dtype)


MODELS = (
    Model("minilm", Encoder, _ids, 128),
    Model(
        "gpt2_block",
        lambda: PreNormBlock(768, 12, 3072, nn.GELU(approximate="tanh"), True, 1e-5),
        _hidden(1024, 768), 1024, throughput=8, training=8,
    ),
    Model("vit_l_block", lambda: PreNormBlock(1024, 16, 4096, nn.GELU(), False, 1e-6), _hidden(197, 1024), 197),
)  # fmt: skip
