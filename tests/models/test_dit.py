"""DiT against a second implementation written from its formula, its published sizes, and the promises it makes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isonext.flow.loss import flow_loss
from isonext.models.cost import step_flops
from isonext.models.dit import DiT, from_patches, rotate, to_patches
from model import count_parameters

C, STYLES = 3, 2
SMALL = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "time_dim": 12}
PLAIN = {"norm": "layer", "mlp": "gelu", "pos": "sincos", "qk_norm": False}
MODERN = {"norm": "rms", "mlp": "swiglu", "pos": "rope", "qk_norm": True}


def random_model(size=(4, 6), **options):
    """Every weight random, those that start at zero too."""
    torch.manual_seed(0)
    model = DiT(C, STYLES, size, **{**SMALL, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(size=(4, 6), count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, C, *size, generator=generator)
    return x, torch.linspace(0.1, 0.9, count), torch.arange(count) % (STYLES + 1)


#################################################################################
#                      The same network, written out again                      #
#################################################################################


def places(grid):
    """Every place of the grid in reading order."""
    return list(np.ndindex(*grid))


def turn(vector, place):
    """One head's query or key (d,) at one place, as complex numbers: pair (i, i + d / 2) turned by its axis's angle."""
    half = len(vector) // 2
    each = half // len(place)
    angle = [coordinate * 10_000 ** (-i / each) for coordinate in place for i in range(each)]
    turned = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * torch.tensor(angle, dtype=torch.float64))
    return torch.cat([turned.real, turned.imag])


def reference(model, x, t, style, size, patch, options):
    """In float64, one picture, token and head at a time."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}
    dim, heads, grid = model.hidden_dim, SMALL["num_heads"], [side // patch for side in size]

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(y, name):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def norm(y, name):
        if options["norm"] == "rms":
            return rms(y, name)
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def attention(y, name):
        q, k, v = linear(y, f"{name}.qkv").split(dim, dim=-1)  # (T, D) each
        outputs = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            qh, kh = q[:, part], k[:, part]
            if options["qk_norm"]:
                qh, kh = rms(qh, f"{name}.q_norm"), rms(kh, f"{name}.k_norm")
            if options["pos"] == "rope":
                qh, kh = (torch.stack([turn(row, p) for row, p in zip(m, places(grid), strict=True)]) for m in (qh, kh))
            scores = (qh @ kh.T / math.sqrt(dim // heads)).softmax(-1)
            outputs.append(scores @ v[:, part])
        return linear(torch.cat(outputs, -1), f"{name}.out")

    def mlp(y, name):
        y = linear(y, f"{name}.widen")
        if options["mlp"] == "swiglu":
            a, b = y.chunk(2, -1)
            return linear(a / (1 + (-a).exp()) * b, f"{name}.narrow")
        return linear(F.gelu(y, approximate="tanh"), f"{name}.narrow")

    results = []
    for picture, time, label in zip(x.double(), t.double(), style, strict=True):
        angles = 1000 * time * 10.0 ** (-4 * torch.arange(6, dtype=torch.float64) / 6)
        embedded = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()]), "time.mlp.0")), "time.mlp.2")
        cond = F.silu(embedded + w["style.weight"][label])
        tokens = [
            picture[(slice(None), *(slice(p * patch, (p + 1) * patch) for p in place))].flatten()
            for place in places(grid)
        ]
        h = linear(torch.stack(tokens), "stem")
        if options["pos"] == "sincos":
            each = dim // 2 // len(grid)
            frequency = [10_000 ** (-i / each) for i in range(each)]
            table = torch.tensor([[c * f for c in place for f in frequency] for place in places(grid)]).double()
            h = h + torch.cat([table.sin(), table.cos()], -1)
        for i in range(SMALL["num_layers"]):
            s1, m1, g1, s2, m2, g2 = linear(cond, f"blocks.{i}.affine").split(dim)
            h = h + g1 * attention((1 + m1) * norm(h, f"blocks.{i}.norm1") + s1, f"blocks.{i}.attention")
            h = h + g2 * mlp((1 + m2) * norm(h, f"blocks.{i}.norm2") + s2, f"blocks.{i}.mlp")
        shift, scale = linear(cond, "affine").split(dim)
        made = linear((1 + scale) * norm(h, "norm") + shift, "head")
        v = torch.empty_like(picture)
        for token, place in zip(made, places(grid), strict=True):
            window = (slice(None), *(slice(p * patch, (p + 1) * patch) for p in place))
            v[window] = token.view(C, *[patch] * len(grid))
        results.append(v)
    return torch.stack(results)


@pytest.mark.parametrize("options", [PLAIN, MODERN, PLAIN | {"pos": "rope"}, MODERN | {"mlp": "gelu"}])
@pytest.mark.parametrize(("size", "patch"), [((4, 6), 2), ((3, 2), 1), ((6,), 2), ((5,), 1)])
def test_forward_is_the_formula(options, size, patch):
    model = random_model(size, patch_size=patch, **options)
    x, t, style = inputs(size)
    expected = reference(model, x, t, style, size, patch, options)
    assert torch.allclose(model(x, t, style).double(), expected, rtol=1e-3, atol=2e-4 * expected.abs().max())
    assert expected.std() > 0.1


@pytest.mark.parametrize(("size", "patch"), [((4, 6), 2), ((4,), 2), ((4, 6), 1)])
def test_patches_go_there_and_back(size, patch):
    x = torch.arange(2 * C * math.prod(size)).view(2, C, *size).float()
    tokens = to_patches(x, patch)
    assert tokens.shape == (2, math.prod(size) // patch ** len(size), C * patch ** len(size))
    assert torch.equal(from_patches(tokens, patch, size), x)


def test_a_rotation_by_a_right_angle_swaps_the_halves():
    turned = rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert turned.tolist() == [[-3.0, 2.0, 1.0, 4.0]]


#################################################################################
#                                Published sizes                                #
#################################################################################


@pytest.mark.parametrize(
    ("arguments", "options", "count"),
    [
        # the published CelebA-HQ model; its own config says 512 x 8
        ((4, 1, (32, 32)), {"hidden_dim": 512, "num_layers": 8, "num_heads": 16}, 38_746_640),
        # LightningDiT-XL/1
        (
            (32, 1000, (16, 16)),
            {"hidden_dim": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 1, "norm": "rms", "mlp": "swiglu"},
            674_961_824,
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(arguments, options, count):
    with torch.device("meta"):
        assert count_parameters(DiT(*arguments, **options)) == count


#################################################################################
#                                   Promises                                    #
#################################################################################


@pytest.mark.parametrize("options", [PLAIN, MODERN])
def test_at_start_the_velocity_is_zero_and_every_block_the_identity(options):
    torch.manual_seed(0)
    model = DiT(C, STYLES, (4, 6), **SMALL, **options)
    assert torch.equal(model(*inputs()), torch.zeros(3, C, 4, 6))
    h = torch.randn(2, 6, 16)
    *conditions, _ = model.condition(torch.rand(2), torch.tensor([0, 1]))
    assert torch.equal(model.blocks[0](h, conditions[0], model.cos, model.sin), h)


def test_one_style_needs_no_embedding_and_guides_nowhere():
    model = DiT(C, 1, (4, 6), **SMALL)
    assert "style.weight" not in model.state_dict() and model.null_style == 1
    assert torch.equal(model.embed(torch.tensor([0, 1])), torch.zeros(2, 16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, _ = inputs()
    assert torch.equal(model(x, t, torch.zeros(3, dtype=torch.int64)), model(x, t, torch.ones(3, dtype=torch.int64)))


def test_embeddings_stand_for_their_ids():
    model, (x, t, style) = random_model(), inputs()
    assert torch.equal(model(x, t, model.embed(style)), model(x, t, style))


@pytest.mark.parametrize("options", [PLAIN, MODERN])
def test_what_is_recomputed_backwards_changes_no_gradient(options):
    gradients = {}
    for recompute in ("none", "selective", "full"):
        model, (x, t, style) = random_model(recompute=recompute, **options), inputs()
        flow_loss(model, x, x.flip(0), t, style).mean().backward()
        gradients[recompute] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.equal(gradients["selective"], gradients["none"])
    assert torch.equal(gradients["full"], gradients["none"])


@pytest.mark.parametrize("options", [PLAIN, MODERN])
def test_bf16_is_near_float32_and_condition_and_result_stay_float32(options):
    model, (x, t, style) = random_model(**options), inputs()
    exact = model(x, t, style)
    with torch.autocast("cpu", torch.bfloat16):
        conditions, rounded = model.condition(t, style), model(x, t, style)
    assert rounded.dtype == torch.float32 and all(each.dtype == torch.float32 for each in conditions)
    assert all(torch.equal(a, b) for a, b in zip(conditions, model.condition(t, style), strict=True))
    assert 1e-5 < (rounded - exact).abs().mean() / exact.abs().mean() < 0.03


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 4\) cells: this network takes \(4, 6\)"):
        random_model()(*inputs((6, 4)))
    with pytest.raises(ValueError, match="patches of 4"):
        DiT(C, STYLES, (4, 6), patch_size=4)


def test_the_operations_of_a_step_are_those_counted_by_hand():
    with torch.device("meta"):
        model = DiT(C, STYLES, (4, 6), **SMALL)
    # 6 tokens of 12 numbers: stem and head 12 * 16; a block 3 + 1 + 4 + 4 squares of 16, and 2 * 6 * 16 for attention.
    block = 12 * 256 + 2 * 6 * 16
    assert step_flops(model, 5, (4, 6)) == 2 * 5 * 6 * (3 * (2 * 192 + 2 * block) - 192)
