"""Multi-head attention whose projections are layers of their own, so that they can be quantized."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules import replace_modules

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class MultiheadAttention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, from the linear layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    torch's own passes its weights to one function, which nothing can quantize. A state dict of torch's, with
    `in_proj_weight` and `in_proj_bias`, loads into this one.
    """

    # torch.nn.TransformerEncoderLayer asks for it, and would pass the weights to a kernel if it had one.
    in_proj_bias = None

    @classmethod
    def from_float(cls, attention: nn.MultiheadAttention) -> "MultiheadAttention":
        """The same function, mode and hooks; the input projections are copies, `out_proj` is shared.

        Raises:
            ValueError: `obstacle(attention)` says why there is none.
        """
        if reason := obstacle(attention):
            raise ValueError(reason)
        split = cls.__new__(cls)
        nn.Module.__init__(split)
        hooks = {key: value for key, value in vars(attention).items() if key.endswith("hooks")}
        vars(split).update({key: value.copy() for key, value in hooks.items()})
        for key in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first"):
            setattr(split, key, getattr(attention, key))
        state = split_projections({key: p.detach() for key, p in attention._parameters.items() if p is not None}, "")
        trained = any(p.requires_grad for p in attention._parameters.values() if p is not None)
        for name in PROJECTIONS:
            weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone(), trained)
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone(), trained)
            setattr(split, name, layer)
        split.out_proj = attention.out_proj
        return split.train(attention.training)

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
        """Arguments, shapes and results are those of `torch.nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch has it
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # [N, num_heads, L or S, head_dim]
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores [N, num_heads, L, S]; None without any."""
        masks = []
        if attn_mask is not None:  # [L, S] or [N * num_heads, L, S]
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:  # [N, S]
            masks.append(key_padding_mask[:, None, None])
        added = [q.new_zeros(m.shape).masked_fill(m, -math.inf) if m.dtype == torch.bool else m for m in masks]
        return sum(added) if added else None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.update(split := split_projections(state_dict, prefix))
        for key in [key for key in state_dict if key not in split]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def obstacle(attention: nn.MultiheadAttention) -> str | None:
    """Why `MultiheadAttention` cannot take the place of `attention`; None if it can."""
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} derives from MultiheadAttention and may compute something else"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "attention with add_bias_kv or add_zero_attn"
    return None


def split_projections(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A state dict with the projections of torch's attention at `prefix`, if it has any, under our names."""
    split = {}
    for key, tensor in state.items():
        local = key[len(prefix) :] if key.startswith(prefix) else ""
        if local in ("in_proj_weight", "in_proj_bias"):
            kind = local.removeprefix("in_proj_")
            split |= {f"{prefix}{name}.{kind}": part for name, part in zip(PROJECTIONS, tensor.chunk(3))}
        elif local in [f"{name}_weight" for name in PROJECTIONS]:
            split[f"{prefix}{local.removesuffix('_weight')}.weight"] = tensor
        else:
            split[key] = tensor
    return split


def split_attention(model: nn.Module) -> dict[nn.Module, nn.MultiheadAttention]:
    """Put a `MultiheadAttention` in the place of each of torch's in `model`, in place; returns torch's by the new one."""
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and obstacle(m) is None]
    replacements = {attention: MultiheadAttention.from_float(attention) for attention in attentions}
    replace_modules(model, replacements)
    for module in model.modules() if replacements else ():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its own way around its layers, to the same kernel
    return {new: attention for attention, new in replacements.items()}
