"""Attention and transformer encoders of torch, with every projection as a layer and without the fused kernels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.factored.unpacked.base import Unpacked, linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class UnpackedAttention(Unpacked, nn.MultiheadAttention):
    """Multi-head attention whose projections of query, key and value are the layers q_proj, k_proj and v_proj.

    Attributes, arguments and outputs are those of ``nn.MultiheadAttention``.
    """

    kinds = (nn.MultiheadAttention,)
    packs = ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS))

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "attention with add_bias_kv or add_zero_attn is not factored"
        return None

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = [module._parameters[f"{name}_weight"] for name in PROJECTIONS]
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return {name: linear(*own) for name, *own in zip(PROJECTIONS, weights, biases, strict=True)}

    def packed(self, name: str) -> Tensor | None:
        layers: list[Any] = [getattr(self, part) for part in PROJECTIONS]
        if name == "in_proj_bias":
            return None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        if name == "in_proj_weight":
            return torch.cat([layer.weight for layer in layers]) if self._qkv_same_embed_dim else None
        return None if self._qkv_same_embed_dim else getattr(self, name.removesuffix("_weight")).weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, with ``need_weights``, the attention weights, as ``nn.MultiheadAttention`` does."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; pass attn_mask too")
        batched = query.dim() == 3
        dtype, batch_axis = query.dtype, 0 if self.batch_first or not batched else 1
        q, k, v = (self._heads(x, batched) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, q, k, dtype)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q * math.sqrt(1 / self.head_dim) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        together = mixed.transpose(1, 2).flatten(2)
        if not batched:
            together = together.squeeze(0)
        elif batch_axis == 1:
            together = together.transpose(0, 1)
        return self.out_proj(together), weights

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return projections as (samples, heads, positions, head_dim)."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return the sum of both masks, which broadcasts to (samples, heads, queries, keys)."""
    mask = None if attn_mask is None else _additive(attn_mask, dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (q.shape[0], -1))
    if key_padding_mask is None:
        return mask
    padding = _additive(key_padding_mask, dtype).reshape(q.shape[0], 1, 1, k.shape[2])
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of numbers to add. In a boolean one, True forbids."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


class UnpackedEncoderLayer(Unpacked, nn.TransformerEncoderLayer):
    """A transformer layer that calls its layers. ``nn.TransformerEncoderLayer`` passes their weights to a kernel."""

    kinds = (nn.TransformerEncoderLayer,)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        if self.norm_first:
            src = src + attend(self.norm1(src))
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + attend(src))
        return self.norm2(src + self._ff_block(src))


class UnpackedEncoder(Unpacked, nn.TransformerEncoder):
    """A stack of transformer layers that makes no nested tensors, which only the fused kernel takes.

    Where ``nn.TransformerEncoder`` would make them, it sets padded positions to zero. So does this one, traced or not.
    """

    kinds = (nn.TransformerEncoder,)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
        if src_key_padding_mask is not None and mask is None and self._may_make_nested(src):
            padded = _padded(src_key_padding_mask)
            if getattr(self, "mask_check", True):  # no branch on values, which torch.export could not trace
                padded = padded & (padded.int().diff(dim=1) >= 0).all()
            output = output.masked_fill(padded.unsqueeze(-1), 0)
        return output if self.norm is None else self.norm(output)

    def _may_make_nested(self, src: Tensor) -> bool:
        """Return whether ``nn.TransformerEncoder`` makes nested tensors if padding is at the end, as of torch 2.13."""
        possible = torch.backends.mha.get_fastpath_enabled() and getattr(self, "use_nested_tensor", False)
        if not possible or self.layers[0].training or src.dim() != 3 or torch.is_autocast_enabled():
            return False
        graded = src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())
        return not (torch.is_grad_enabled() and graded)


def _padded(padding: Tensor) -> Tensor:
    return padding if padding.dtype == torch.bool else padding != 0
