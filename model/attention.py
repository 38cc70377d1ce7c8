"""Causal attention with a window, in the form that suits the device.

PyTorch's fused bf16 attention has a slow backward on CPUs; two batched matrix products and a
softmax are faster there for rows of a few hundred tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_mask(seq_len: int, window: int, like: Tensor) -> Tensor:
    """0 where a query may look, minus infinity elsewhere: (T, T).

    Position i sees itself and the `window` - 1 positions before it.
    """
    position = torch.arange(seq_len, device=like.device)
    back = position[:, None] - position[None, :]
    hidden = (back < 0) | (back >= window)
    mask = torch.zeros(seq_len, seq_len, device=like.device, dtype=like.dtype)
    return mask.masked_fill_(hidden, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention: three (B, H, T, head_dim) and a (T, T) mask -> the same."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    batch, heads, length, channels = query.shape
    flat = (batch * heads, length, channels)
    q, k, v = query.reshape(flat), key.reshape(flat), value.reshape(flat)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(query.shape)
