# SPDX-License-Identifier: Apache-2.0
"""Owns the zoo, part two: attention, sequences, tables, and the forwards that give tools trouble."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import shape, shape_of

TOKENS = 11


def tokens(*size: int) -> Tensor:
    """Random words."""
    return torch.randint(0, TOKENS, size)


# -- attention ----------------------------------------------------------------------------------------------------------


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Any:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


@shape(4, 6, 8)
class AttentionEncoder(nn.Module):
    """A transformer encoder with MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([AttentionBlock(8, 2) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@shape(4, 6, 8)
class TorchEncoder(nn.Module):
    """torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encoder(x).mean(dim=1))


class HandAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        return x.view(n, length, self.heads, dim // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e4)
        out = torch.matmul(F.softmax(scores, dim=-1), v)
        return self.proj(out.transpose(1, 2).contiguous().view(x.shape))


@shape(4, 6, 8)
class HandEncoder(nn.Module):
    """A transformer encoder with matmul and softmax, norms behind the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2 = HandAttention(8, 2), nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm1(x + self.dropout(self.attn(x)))
        x = self.norm2(x + self.dropout(self.fc2(F.relu(self.fc1(x)))))
        return self.head(x.mean(1))


@shape_of(lambda: (tokens(4, 6),))
class TiedDecoder(nn.Module):
    """A causal language model whose output layer is its embedding."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(TOKENS, 8), nn.Parameter(torch.randn(1, 6, 8) * 0.1)
        self.norm1, self.attn = nn.LayerNorm(8), HandAttention(8, 2)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.lm_head = nn.LayerNorm(8), nn.Linear(8, TOKENS, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("causal", torch.tril(torch.ones(6, 6)), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) * math.sqrt(8) + self.position[:, : ids.shape[1]]
        x = x + self.attn(self.norm1(x), self.causal[: ids.shape[1], : ids.shape[1]])
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return self.lm_head(self.norm(x))


@shape_of(lambda: (tokens(4, 6),))
class TiedFunctional(nn.Module):
    """Tied without a second layer: the output reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(TOKENS, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Any:
        x = torch.tanh(self.fc(self.embed(ids)))
        return F.linear(x, self.embed.weight)


@shape(4, 3, 16, 16)
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8) * 0.1), nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, 2, dim // 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, dim)
        x = x + self.proj(out)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token = nn.Sequential(nn.Linear(length, 8), nn.GELU(), nn.Linear(8, length))
        self.channel = nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim))

    def forward(self, x: Tensor) -> Any:
        x = x + self.token(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.norm2(x))


@shape(4, 3, 16, 16)
class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).flatten(2).permute(0, 2, 1)
        return self.head(self.norm(self.blocks(x)).mean(1))


class WindowBlock(nn.Module):
    def __init__(self, dim: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.heads = window, shift, 2
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(2, window * window, window * window) * 0.1)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim))

    def forward(self, x: Tensor) -> Any:
        n, h, w, c = x.shape
        m, shortcut = self.window, x
        x = self.norm1(x)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(n, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m, c)
        qkv = self.qkv(x).reshape(x.shape[0], m * m, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, m * m, c)
        x = self.proj(x).view(n, h // m, w // m, m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x
        return x + self.mlp(self.norm2(x))


@shape(4, 3, 16, 16)
class SwinWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(WindowBlock(8, 2, 0), WindowBlock(8, 2, 1))
        self.reduction, self.head = nn.Linear(32, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.embed(x).permute(0, 2, 3, 1))
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.head(self.reduction(torch.cat(parts, -1)).mean((1, 2)))


# -- sequences ----------------------------------------------------------------------------------------------------------


@shape_of(lambda: (tokens(4, 7),))
class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(TOKENS, 6), nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.dropout, self.tag = nn.Dropout(0.1), nn.Linear(10, 3)

    def forward(self, sentence: Tensor) -> Any:
        out, _ = self.lstm(self.embed(sentence))
        return F.log_softmax(self.tag(self.dropout(out)), dim=-1)


@shape(4, 12, 6)
class GRUForecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.gru, self.out = nn.GRU(8, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        _, hidden = self.gru(x)
        return self.out(hidden[-1])


class TemporalBlock(nn.Module):
    def __init__(self, cin: int, cout: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv1d(cin, cout, 3, dilation=dilation))
        self.conv2, self.bn2 = nn.Conv1d(cout, cout, 3, dilation=dilation), nn.BatchNorm1d(cout)
        self.downsample = nn.Conv1d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        out = F.dropout(F.relu(self.conv1(F.pad(x, (self.padding, 0)))), 0.1, self.training)
        out = F.dropout(F.relu(self.bn2(self.conv2(F.pad(out, (self.padding, 0))))), 0.1, self.training)
        return F.relu(out + self.downsample(x))


@shape(4, 3, 16)
class TemporalConvNet(nn.Module):
    """Causal pads, dilation, weight norm on some convolutions, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.fc = nn.Sequential(TemporalBlock(3, 6, 1), TemporalBlock(6, 6, 2)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.network(x)[..., -1])


@shape(4, 4, 16)
class WaveNet(nn.Module):
    """Gates (tanh times sigmoid), a residual and a sum of skips."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList([nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2)])
        self.gates = nn.ModuleList([nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2)])
        self.residuals, self.skips = (nn.ModuleList([nn.Conv1d(4, 4, 1) for _ in range(2)]) for _ in range(2))
        self.end1, self.end2 = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        total: Any = 0
        for dilation, filt, gate, residual, skip in zip(
            (1, 2), self.filters, self.gates, self.residuals, self.skips, strict=True
        ):
            padded = F.pad(x, (dilation, 0))
            z = torch.tanh(filt(padded)) * torch.sigmoid(gate(padded))
            total = total + skip(z)
            x = residual(z) + x
        return self.end2(F.relu(self.end1(F.relu(total))))


# -- tables, pairs and graphs -------------------------------------------------------------------------------------------


@shape_of(lambda: {"numbers": torch.randn(8, 5), "category": tokens(8)})
class TabularNet(nn.Module):
    """Batch norm before linear layers and behind them, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bn0 = nn.Embedding(TOKENS, 3), nn.BatchNorm1d(5)
        self.fc1, self.bn1 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.bn2, self.fc2 = nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.bn3, self.out = nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, numbers: Tensor, category: Tensor) -> Any:
        x = torch.cat([self.bn0(numbers), self.embed(category)], dim=1)
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.fc2(self.bn2(x)))
        return self.out(self.bn3(x)).squeeze(1)


@shape(8, 6)
class BatchNormFirst(nn.Module):
    """Raw features are normalised right before the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 16), nn.SiLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        )

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@shape_of(lambda: (torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8)))
class Siamese(nn.Module):
    """One trunk on both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
        self.out = nn.Linear(8, 1)

    def forward(self, first: Tensor, second: Tensor) -> Any:
        a, b = self.trunk(first), self.trunk(second)
        return torch.sigmoid(self.out(torch.abs(a - b)))


@shape_of(lambda: (torch.randn(2, 6, 4), torch.eye(6).repeat(2, 1, 1)))
class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Any:
        x = F.relu(torch.bmm(adjacency, self.lin1(x)))
        x = torch.relu(adjacency @ self.lin2(x)) + x
        return self.out(x.max(dim=1).values)


@shape_of(lambda: {"user": tokens(8), "item": tokens(8)})
class Recommender(nn.Module):
    """Two embeddings, their product beside an MLP of both."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(TOKENS, 4), nn.Embedding(TOKENS, 4)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, item: Tensor) -> Any:
        u, i = self.user(user), self.item(item)
        return self.out(torch.cat([u * i, self.mlp(torch.cat([u, i], -1))], -1)).flatten()


# -- forwards that give tools trouble -----------------------------------------------------------------------------------


@shape(8, 3, 8, 8)
class ModuleContainers(nn.Module):
    """Layers by index and by key, and a choice among activations."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])
        self.acts = nn.ModuleDict({"lrelu": nn.LeakyReLU(0.1), "relu": nn.ReLU(), "tanh": nn.Hardtanh()})
        self.heads = nn.ModuleDict({"cls": nn.Linear(4, 3), "box": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv, bn, act in zip(self.convs, self.bns, self.acts.values(), strict=True):
            x = act(bn(conv(x)))
        x = x.amax((2, 3))
        return {name: head(x) for name, head in self.heads.items()}


@shape(8, 3, 8, 8)
class BranchOnShape(nn.Module):
    """Branches on sizes and on training, which export decides for good; an auxiliary head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.step = nn.Conv2d(8, 8, 3, padding=1)
        self.aux, self.fc = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn(self.conv(x)))
        while x.shape[-1] > 2:
            x = F.max_pool2d(F.relu(self.step(x)), 2)
        x = x.flatten(2).mean(-1)
        if self.training:
            return self.fc(x), self.aux(x)
        return self.fc(x)


@shape(8, 3, 8, 8, exports=False)
class BranchOnData(nn.Module):
    """A branch on values: every run may take another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.extra = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.bn(self.conv(x)))
        if x.abs().mean() > 0.01:
            x = torch.relu(self.extra(x)) + x
        return self.fc(x.mean((2, 3)))


@shape_of(lambda: ((), {"batch": {"image": torch.randn(8, 3, 8, 8), "meta": torch.randn(8, 2)}}))
class DictInTupleOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.side, self.fuse, self.value = nn.Linear(2, 4), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.relu(self.bn(self.conv(batch["image"]))).mean((-2, -1))
        both = torch.cat((image, F.relu(self.side(batch["meta"]))), dim=-1)
        return self.fuse(both), {"value": torch.tanh(self.value(both))}


@shape(8, 3, 8, 8)
class ArgmaxTopk(nn.Module):
    """Integer outputs beside a float one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.fc(F.relu(self.conv(x)).flatten(1))
        scores, indices = logits.softmax(-1).topk(2)
        return scores, indices, logits.argmax(-1)


@shape(8, 4)
class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        features = self.shared(observation)
        return F.softmax(self.actor(features), dim=-1), self.critic(features)


@shape(8, 6)
class HighwayNet(nn.Module):
    """A gate and its complement; GLU; a product of three."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate, self.glu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12)
        self.bilinear, self.out = nn.Bilinear(6, 6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        gate = torch.sigmoid(self.gate(x))
        x = gate * F.relu(self.transform(x)) + (1 - gate) * x
        return self.out(F.elu(self.bilinear(x, F.glu(self.glu(x), dim=-1))))
