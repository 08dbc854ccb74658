"""Tiny random encoders of texts, and a vision transformer with timm's names."""

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}
TEXTS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=80)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=24, n_layers=3, n_heads=2, hidden_dim=48, vocab_size=50)
    ),
    "clip-text": lambda: CLIPTextModel(CLIPTextConfig(**SIZES, eos_token_id=3, bos_token_id=4, pad_token_id=1)),
}


def text_encoder(name, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    return spread(TEXTS[name]().eval(), attention)


def spread(model, attention="sdpa"):
    """Weights of one scale for all families: large enough to tell tokens apart."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    return model


def texts(*lengths, seed=1):
    """``input_ids`` and ``attention_mask`` of padded texts that begin with 4 and end with 3 (EOS)."""
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(5, 50, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids[:, 0] = 4
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 3
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


class TimmAttention(nn.Module):
    def __init__(self, dim, heads, qk_norm=False):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, dim, heads, qk_norm=False):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), TimmAttention(dim, heads, qk_norm)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, attn_mask=None):
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 8, 8)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimmLike(nn.Module):
    """A vision transformer laid out as timm's, with the mean over the patches and a head."""

    def __init__(self, dim=24, heads=2, depth=3, qk_norm=False):
        super().__init__()
        self.patch_embed, self.cls_token = PatchEmbed(dim), nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*(TimmBlock(dim, heads, qk_norm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward_features(self, x):
        x = self.patch_embed(x)
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)))

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 1:].mean(1))
