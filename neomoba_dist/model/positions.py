"""Rotary position embedding (RoPE, arXiv 2104.09864, section 3.4).

Shape letters: T tokens, N heads, D head size.
"""

import torch


def rope_cos_sin(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i/D), each float64 [T, D/2].

    The angle is taken in float64: in float32 it would be off by up to 0.06 rad at position one million.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids.device) / head_dim
    angle_TD = position_ids.to(torch.float64)[:, None] * theta**-exponent
    return angle_TD.cos(), angle_TD.sin()


def apply_rope(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head, in at least float32; returns x's dtype and shape."""
    dtype = torch.promote_types(x_TND.dtype, torch.float32)
    cos, sin = cos_TD.to(dtype)[:, None, :], sin_TD.to(dtype)[:, None, :]
    first, second = x_TND.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TND.dtype)
