"""A tiny random multi-view transformer, laid out as VGGT: frame and global blocks, special tokens, 2-D rotation."""

import torch
from torch import nn
from torch.nn import functional


def rotate(x, places):
    """Rotate one half of each head by the row, the other by the column; ``places`` is ``(tokens, 2)``."""
    halves = []
    for half, place in zip(x.chunk(2, -1), places.unbind(-1), strict=True):
        quarter = half.shape[-1] // 2
        angle = place.unsqueeze(-1) * 10.0 ** -torch.arange(quarter)
        a, b = half.chunk(2, -1)
        halves += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat(halves, -1)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.fused_attn = heads, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x, pos):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(q, pos), rotate(k, pos), v

    def forward(self, x, pos=None):
        q, k, v = self.project(x, pos)
        if self.fused_attn:
            out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, pos=None):
        x = x + self.attn(self.norm1(x), pos=pos)
        return x + self.mlp(self.norm2(x))


class Aggregator(nn.Module):
    """``(batch, views, 3, H, W)`` to ``(batch, views, special + patches, dim)``."""

    def __init__(self, dim=16, heads=2, depth=2, special=3, patch_size=4):
        super().__init__()
        self.patch_size, self.patch_start_idx = patch_size, special
        self.patch_embed = nn.Conv2d(3, dim, patch_size, patch_size)
        self.special = nn.Parameter(torch.randn(2, special, dim))  # of the first view, and of all others
        self.frame_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def embed(self, images):
        batch, views = images.shape[:2]
        patches = self.patch_embed(images.flatten(0, 1))
        h, w = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2).unflatten(0, (batch, views))
        special = self.special[[0] + [1] * (views - 1)].expand(batch, -1, -1, -1)
        grid = torch.cartesian_prod(torch.arange(1, h + 1), torch.arange(1, w + 1))
        return torch.cat([special, patches], 2), torch.cat([torch.zeros(self.patch_start_idx, 2), grid])

    def forward(self, images):
        x, pos = self.embed(images)
        batch, views, tokens, _ = x.shape
        for frame, whole in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x.flatten(0, 1), pos=pos)
            x = whole(x.reshape(batch, views * tokens, -1), pos=pos.repeat(views, 1))
            x = x.view(batch, views, tokens, -1)
        return x


class MultiView(nn.Module):
    """The aggregator inside a model with a head, which takes a single scene too."""

    def __init__(self, **sizes):
        super().__init__()
        self.aggregator = Aggregator(**sizes)
        self.head = nn.Linear(self.aggregator.special.shape[-1], 1)

    def forward(self, images):
        x = self.aggregator(images=images if images.dim() == 5 else images.unsqueeze(0))
        return self.head(x[:, :, self.aggregator.patch_start_idx :])
