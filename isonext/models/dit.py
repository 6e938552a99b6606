"""DiT: a transformer over patches of the latent, the other velocity field `v = model(x, t, style)`.

    x (B, C, *space) -> patches -> N blocks -> adaptive norm -> patches -> v (B, C, *space)

Space has two axes for pictures, (h, w), and one for sequences, (L,); a model takes the one size it was made for.
Time and style set scale, shift and gate of every block, all gates closed at start (adaLN-Zero: Peebles & Xie,
"Scalable Diffusion Models with Transformers", arXiv:2212.09748). SwiGLU, RMSNorm, rotary positions and normed queries
and keys are those of LightningDiT (Yao et al., arXiv:2501.01423).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Recompute, TimestepEmbedding, VelocityNetwork, run_block

#################################################################################
#                               Patches and places                              #
#################################################################################


def to_patches(x: Tensor, size: int) -> Tensor:
    """(B, C, *space) -> (B, T, C size^n): the n axes of space cut into patches, `size` a side, in reading order."""
    n = x.ndim - 2
    cut = [number for side in x.shape[2:] for number in (side // size, size)]  # h / p, p, w / p, p
    outer, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.reshape(*x.shape[:2], *cut).permute(0, *outer, 1, *inner).flatten(n + 1).flatten(1, n)


def from_patches(tokens: Tensor, size: int, space: tuple[int, ...]) -> Tensor:
    """The inverse of `to_patches`."""
    n = len(space)
    x = tokens.reshape(len(tokens), *(side // size for side in space), -1, *[size] * n)
    order = [axis for pair in zip(range(1, n + 1), range(n + 2, 2 * n + 2), strict=True) for axis in pair]
    return x.permute(0, n + 1, *order).reshape(len(tokens), -1, *space)


def angles(space: tuple[int, ...], dim: int) -> Tensor:
    """(T, dim) angles of the T places of a grid: dim / n frequencies 1 to 1/10000 for each of its n axes."""
    each = dim // len(space)
    frequencies = 10_000.0 ** (-torch.arange(each) / each)
    places = torch.cartesian_prod(*(torch.arange(side) for side in space)).view(-1, len(space))  # (T, n)
    return (places[:, :, None] * frequencies).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, 2 m), its pairs (i, i + m) turned by the angles (T, m) of its places (Su et al., arXiv:2104.09864)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


#################################################################################
#                                  The network                                  #
#################################################################################


class Attention(nn.Module):
    """Multi-head self-attention by PyTorch's fused kernels; (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cpu_in_float32 = True  # whose BF16 kernel is several times slower backward, see docs/speed.md
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """cos, sin (T, D / heads / 2) of the places' rotations; empty ones rotate nothing."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if len(cos):
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if x.device.type == "cpu" and self.cpu_in_float32:
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q, k, v.float())
        else:
            y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Gelu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x), approximate="tanh"))


class SwiGlu(nn.Module):
    """Shazeer, arXiv:2002.05202; two thirds as wide as `hidden`, so that it has as many parameters as the other."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = 2 * hidden // 3
        self.widen, self.narrow = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.widen(x).chunk(2, dim=-1)
        return self.narrow(F.silu(a) * b)


def make_norm(kind: str, dim: int) -> nn.Module:
    """Over the last dimension: `layer` without affine (shift and scale come from the condition), or `rms` with one."""
    return nn.RMSNorm(dim, eps=1e-6) if kind == "rms" else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    """Attention, then an MLP, each normed, modulated, gated and added; what is added to stays float32."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm: str, mlp: str, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(norm, dim), make_norm(norm, dim)
        self.attention = Attention(dim, num_heads, qk_norm)
        self.mlp = (SwiGlu if mlp == "swiglu" else Gelu)(dim, int(mlp_ratio * dim))
        self.affine = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, recompute: Recompute = "none") -> Tensor:
        return run_block(recompute, self._forward, x, condition, cos, sin)

    def _forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = condition[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        x = x + gate1 * self.attention((1 + scale1) * self.norm1(x) + shift1, cos, sin)
        return x + gate2 * self.mlp((1 + scale2) * self.norm2(x) + shift2)


class DiT(VelocityNetwork):
    """The velocity of the flow for every class at once, on latents (B, latent_channels, *size).

    With one style there is nothing to tell apart, and no embedding.
    """

    places: Tensor  # added to the tokens, or empty

    attends = True

    def __init__(
        self,
        latent_channels: int,  # C, from the latent store
        num_styles: int,  # the null style comes on top
        size: tuple[int, ...],  # of the latents, in cells: (h, w), or (L,)
        hidden_dim: int = 384,  # D
        num_layers: int = 12,  # N
        num_heads: int = 6,  # divides hidden_dim
        patch_size: int = 2,  # side of a token in cells; divides the size
        mlp_ratio: float = 4.0,
        norm: str = "layer",  # or "rms"
        mlp: str = "gelu",  # or "swiglu"
        pos: str = "rope",  # or "sincos", added to the patches
        qk_norm: bool = False,
        time_dim: int = 256,  # of the sinusoid; even
        recompute: Recompute = "selective",
    ) -> None:
        super().__init__(num_styles, recompute)
        self.size, self.patch_size, self.hidden_dim = tuple(size), patch_size, hidden_dim
        if any(side % patch_size for side in size):
            raise ValueError(f"latents of {size} cells cannot be cut into patches of {patch_size}")
        patch = latent_channels * patch_size ** len(size)
        self.time = TimestepEmbedding(time_dim, hidden_dim)
        self.style = nn.Embedding(num_styles + 1, hidden_dim) if num_styles > 1 else None
        self.stem = nn.Linear(patch, hidden_dim)
        self.blocks = nn.ModuleList(
            Block(hidden_dim, num_heads, mlp_ratio, norm, mlp, qk_norm) for _ in range(num_layers)
        )
        self.norm = make_norm(norm, hidden_dim)
        self.affine = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.head = nn.Linear(hidden_dim, patch)
        grid = tuple(side // patch_size for side in size)
        turned = angles(grid, hidden_dim // num_heads // 2) if pos == "rope" else torch.empty(0)
        added = angles(grid, hidden_dim // 2) if pos == "sincos" else torch.empty(0)
        self.register_buffer("cos", turned.cos(), persistent=False)
        self.register_buffer("sin", turned.sin(), persistent=False)
        self.register_buffer("places", torch.cat([added.sin(), added.cos()], dim=-1), persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Classes begin at deviation 1, nn.Embedding's own, and not at DiT's 0.02: short runs tell them apart sooner.
        for layer in self.time.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block):  # the identity at start
                nn.init.zeros_(module.affine.weight)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.head.weight)  # v = 0 at start: the loss begins at the data's own variance

    def embed(self, style: Tensor) -> Tensor:
        """Style ids (B,) int64 -> their embeddings (B, D)."""
        return self.affine.weight.new_zeros(len(style), self.hidden_dim) if self.style is None else self.style(style)

    def condition(self, t: Tensor, style: Tensor) -> list[Tensor]:
        """t (B,), style ids or embeddings -> what modulates each block (B, 6 D), and the end (B, 2 D), in float32."""
        with torch.autocast(t.device.type, enabled=False):
            embedding = style if style.is_floating_point() else self.embed(style)
            cond = F.silu(self.time(t) + embedding)
            affines = (*(block.affine for block in self.blocks), self.affine)
            return [affine(cond) for affine in affines]  # type: ignore[operator]  # they are nn.Linear

    def forward(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        if x.shape[2:] != self.size:
            raise ValueError(f"latents of {tuple(x.shape[2:])} cells: this network takes {self.size} alone")
        *conditions, last = self.condition(t, style)
        h = self.stem(to_patches(x, self.patch_size)).float()  # (B, T, D)
        h = h + self.places if len(self.places) else h
        for block, condition in zip(self.blocks, conditions, strict=True):
            h = block(h, condition, self.cos, self.sin, self.recompute)
        shift, scale = last[:, None].chunk(2, dim=-1)
        v = self.head((1 + scale) * self.norm(h) + shift)
        return from_patches(v, self.patch_size, self.size).float()
