"""Small models with random weights, unmodified classes of transformers and torch.nn: name -> (model, its arguments) for a number of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]
WIDTH, HEADS, INNER, VOCAB = 16, 2, 24, 31


def _ids() -> torch.Tensor:
    return torch.arange(2 * 7).reshape(2, 7) % VOCAB


def bert(layers: int) -> Made:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=INNER, vocab_size=VOCAB
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return BertModel(config), {"input_ids": _ids(), "attention_mask": mask}


def distilbert(layers: int) -> Made:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(dim=WIDTH, n_layers=layers, n_heads=HEADS, hidden_dim=INNER, vocab_size=VOCAB)
    return DistilBertModel(config), {"input_ids": _ids()}


def gpt2(layers: int) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=layers,
        n_head=HEADS,
        n_inner=INNER,
        vocab_size=VOCAB,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config), {"input_ids": _ids()}


def vit(layers: int) -> Made:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config), {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}


def llama(layers: int) -> Made:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=1, intermediate_size=INNER,
        vocab_size=VOCAB, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": _ids()}


def t5(layers: int) -> Made:
    return _t5("relu", layers)


def t5_gated(layers: int) -> Made:
    return _t5("gated-gelu", layers)


def _t5(projection: str, layers: int) -> Made:
    from transformers import T5Config, T5Model

    config = T5Config(
        d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=layers, num_heads=HEADS, vocab_size=VOCAB, feed_forward_proj=projection,
        use_cache=False,
    )  # fmt: skip
    return T5Model(config), {"input_ids": _ids(), "decoder_input_ids": _ids()[:, :4]}


def clip_text(layers: int) -> Made:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=INNER, vocab_size=VOCAB,
        max_position_embeddings=9, eos_token_id=6, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config), {"input_ids": _ids()}


def clip_vision(layers: int) -> Made:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=8,
        patch_size=4,
    )
    return CLIPVisionModel(config), {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}


def whisper_encoder(layers: int) -> Made:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=layers, encoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_layers=1,
        decoder_attention_heads=HEADS, decoder_ffn_dim=INNER, num_mel_bins=5, max_source_positions=8, vocab_size=VOCAB,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=4, dropout=0.1, activation_dropout=0.1,
    )  # fmt: skip
    features = torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16)
    return WhisperModel(config).encoder, {"input_features": features}


def torch_encoder(layers: int) -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, activation="gelu", batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH))
    return model, {"src": torch.linspace(-1, 1, 2 * 7 * WIDTH).reshape(2, 7, WIDTH)}


class Attention(nn.Module):
    """As timm writes it: one qkv Linear, softmax as a module here."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop(self.softmax(q @ k.transpose(-2, -1) * (C // self.heads) ** -0.5))
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """As timm writes it: the normalisation between the layers is an Identity."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.1)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    """norm, attention, norm, MLP, with a LayerScale each."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.gamma1 = nn.Parameter(torch.full((dim,), 0.1))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.gamma2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) * self.gamma1
        return x + self.mlp(self.norm2(x)) * self.gamma2


def timm_vit(layers: int) -> Made:
    model = nn.Sequential(*[TimmBlock(WIDTH, HEADS, INNER) for _ in range(layers)], nn.LayerNorm(WIDTH))
    return model, {"input": torch.linspace(-1, 1, 2 * 7 * WIDTH).reshape(2, 7, WIDTH)}


MODELS: dict[str, Callable[[int], Made]] = {
    f.__name__: f
    for f in (
        bert, distilbert, gpt2, vit, llama, t5, t5_gated, clip_text, clip_vision, whisper_encoder, torch_encoder, timm_vit
    )
}  # fmt: skip
