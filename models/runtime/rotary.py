"""Attention whose rotary positions are complex numbers of modulus 1, for inference with both diffusion models.

One product rotates queries and keys. It moves 20 bytes per 16-bit value, diffusers' formulas move 52 and 56; the
results are the same (a GPU may round differently).
"""

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel, FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

Angles = tuple[torch.Tensor, torch.Tensor]  # float32 cosines and sines [S, head size], each for two neighbours


def use_complex_rotary(
    network: CogVideoXTransformer3DModel | FluxTransformer2DModel | FluxControlNetModel, use: bool = True
) -> None:
    """Switch all blocks to this module's attention processors, or back to diffusers'. Wan has only diffusers'."""
    if isinstance(network, CogVideoXTransformer3DModel):
        network.set_attn_processor(CogVideoXComplexAttention() if use else CogVideoXAttnProcessor2_0())
    elif isinstance(network, FluxTransformer2DModel | FluxControlNetModel):
        network.set_attn_processor(FluxComplexAttention() if use else FluxAttnProcessor())


class CogVideoXComplexAttention:
    """Replaces diffusers' attention processor of CogVideoX."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: Angles | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: video tokens [B, S, D]. encoder_hidden_states: text [B, T, D]. Returns both in this order."""
        refuse_mask(attention_mask)
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = (layer(tokens) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in projected)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            rotation = rotation_of(image_rotary_emb)
            for part in (query, key):
                turn(part[:, :, text:], rotation)
        tokens = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = attn.to_out[0](tokens)
        return tokens[:, text:], tokens[:, :text]


class FluxComplexAttention:
    """Replaces diffusers' attention processor of FLUX and its ControlNets."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Angles | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: image tokens [B, S, D]; in single-stream blocks the text tokens come before them.

        encoder_hidden_states: text [B, T, D] in double-stream blocks, which return both.
        """
        refuse_mask(attention_mask)
        query, key, value = self._project(attn, hidden_states, "to_")
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = self._project(attn, encoder_hidden_states, "add_")
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if image_rotary_emb is not None:
            rotation = rotation_of(image_rotary_emb)
            for part in (query, key):
                turn(part, rotation)
        tokens = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return tokens
        text, image = tokens.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())

    def _project(self, attn: FluxAttention, tokens: torch.Tensor, prefix: str) -> list[torch.Tensor]:
        """Query, key, value [B, S, heads, head size]. prefix: to_ for the image's layers, add_ for the text's."""
        if attn.fused_projections:
            fused = attn.to_qkv if prefix == "to_" else attn.to_added_qkv
            parts = fused(tokens).chunk(3, dim=-1)
        elif prefix == "to_":
            parts = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        else:
            parts = attn.add_q_proj(tokens), attn.add_k_proj(tokens), attn.add_v_proj(tokens)
        return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def refuse_mask(mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise ValueError(f"an attention mask {tuple(mask.shape)} has no effect here: use diffusers' processors")


def rotation_of(angles: Angles) -> torch.Tensor:
    """The angles as complex numbers, complex64 [S, head size / 2]."""
    return torch.complex(*(part[:, ::2].contiguous() for part in angles))


def turn(x: torch.Tensor, rotation: torch.Tensor) -> None:
    """Multiply pairs of neighbours, as complex numbers, in place. x: [..., S, D]; rotation: complex64 [S, D/2]."""
    pairs = torch.view_as_complex(x.to(torch.float32, copy=True).unflatten(-1, (-1, 2)))
    x.copy_(torch.view_as_real(pairs.mul_(rotation)).flatten(-2))
