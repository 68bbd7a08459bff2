"""PyTorch's attention with its projections as layers, and its products as functions that can be observed."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

Mask = torch.Tensor | None


def is_plain_attention(module: nn.Module) -> bool:
    """Return whether :class:`Attention` can take the place of a module."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


class Attention(nn.Module):
    """Computes in eval mode what an ``nn.MultiheadAttention`` computes, with its arguments and results."""

    _qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from reading the weights itself

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.batch_first = attention.head_dim, attention.batch_first
        self.kdim, self.vdim, self.dropout = attention.kdim, attention.vdim, attention.dropout
        weights: Any = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = attention.out_proj
        self.eval()

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """Return the weights of the three projections as one."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """Return the biases of the three projections as one."""
        biases = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, Mask]:
        """Return the output of attention and, if wanted, its weights."""
        is_batched = query.ndim == 3
        q, k, v = (self._batched(x, is_batched) for x in (query, key, value))
        q, k, v = (self._heads(layer(x)) for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = weights @ v
        else:
            weights, mixed = None, functional.scaled_dot_product_attention(q, k, v, mask)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batched(self, x: torch.Tensor, is_batched: bool) -> torch.Tensor:
        if not is_batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)  # torch.compile: no x.unflatten

    def _mask(self, attn_mask: Mask, padding: Mask, q: torch.Tensor, k: torch.Tensor) -> Mask:
        """Return both masks as one that is added to the scores."""
        parts: list[torch.Tensor] = []
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            parts.append(mask if mask.ndim == 2 else mask.view(len(q), -1, *mask.shape[1:]))
        if padding is not None:
            parts.append(_added(padding, q).view(len(q), 1, 1, k.shape[2]))
        return parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer.eval()


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
