"""IsoNext against a second implementation written from its formula, and the promises it makes about precision."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from isonext.flow.loss import flow_loss
from model import AdaGN, Block, DepthwiseConv, IsoNext, TimestepEmbedding, count_parameters

C, STYLES, GROUPS = 3, 2, 4
SMALL = {"hidden_dim": 16, "num_layers": 2, "kernel_size": 5, "style_dim": 8, "time_dim": 12, "num_groups": GROUPS}


def random_model(**options):
    """Every weight random, the head too, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    model = IsoNext(C, STYLES, **{**SMALL, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(height=6, width=6, count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, C, height, width, generator=generator)
    return x, torch.linspace(0.1, 0.9, count), torch.arange(count) % (STYLES + 1)


def sinusoid(t, dim):
    """cos and sin of 1000 t * 10^(-4 i / (dim / 2)), in float64."""
    angles = 1000 * t.double().numpy()[:, None] * 10.0 ** (-4 * np.arange(dim // 2) / (dim // 2))
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


def reference(model, x, t, style):
    """The network written out in float64 from its description, on the weights of `model`."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def adagn(h, name):
        grouped = h.reshape(len(h), GROUPS, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        scale, shift = linear(cond, f"{name}.affine")[:, :, None, None].split(h.shape[1], dim=1)
        return (1 + scale) * ((grouped - mean) / (variance + 1e-5).sqrt()).view_as(h) + shift

    time = linear(F.silu(linear(sinusoid(t, w["time.mlp.0.weight"].shape[1]), "time.mlp.0")), "time.mlp.2")
    cond = F.silu(linear(torch.cat([time, w["style.weight"][style]], dim=1), "join"))
    h = F.conv2d(x.double(), w["stem.weight"], w["stem.bias"], padding=1)
    for i in range(len(model.blocks)):
        name, kernel = f"blocks.{i}", w[f"blocks.{i}.depthwise.weight"]
        y = F.conv2d(h, kernel, w[f"{name}.depthwise.bias"], padding=kernel.shape[-1] // 2, groups=h.shape[1])
        y = adagn(y, f"{name}.norm").movedim(1, -1)
        y = linear(F.gelu(linear(y, f"{name}.widen")), f"{name}.narrow").movedim(-1, 1)
        h = h + w[f"{name}.gate"].view(1, -1, 1, 1) * y
    return F.conv2d(adagn(h, "norm"), w["head.weight"], w["head.bias"], padding=1)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


#################################################################################
#                                   The formula                                 #
#################################################################################


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (1, 1), (2, 13)], ids=str)
def test_the_network_is_its_formula_at_any_picture_size(size):
    # float32 against float64: relative roundings of 6e-8, through a few dozen operations; the sinusoid, of angles up
    # to 900, is off by 900 * 2^-24 = 5e-5, which the weights of the embedding hand on.
    model = random_model()
    with torch.no_grad():
        v = model(*inputs(*size))
    assert v.shape == (3, C, *size)
    assert relative_error(v, reference(model, *inputs(*size))) < 5e-5


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "num_layers": 1}, {"expansion": 2}], ids=str)
def test_the_output_is_exactly_zero_at_the_start(options):
    v = IsoNext(C, STYLES, **{**SMALL, **options})(*inputs())
    assert torch.equal(v, torch.zeros(3, C, 6, 6))


def parameters_by_hand(channels, styles, d, layers, kernel, style_dim, time_dim, expansion):
    time = 2 * (time_dim**2 + time_dim)
    style = (styles + 1) * style_dim
    join = (time_dim + style_dim) * time_dim + time_dim
    ends = (9 * channels * d + d) + (9 * d * channels + channels)
    norm = time_dim * 2 * d + 2 * d
    block = (kernel**2 * d + d) + norm + (expansion * d * d + expansion * d) + (expansion * d * d + d) + d
    return time + style + join + ends + layers * block + norm


@pytest.mark.parametrize(
    ("sizes", "total"),
    [((4, 2, 384, 12, 7, 256, 256, 4), 17_271_428), ((32, 11, 48, 3, 5, 24, 40, 2), None)],
    ids=["default", "other"],
)
def test_the_parameter_count_is_that_of_the_formula(sizes, total):
    channels, styles, d, layers, kernel, style_dim, time_dim, expansion = sizes
    model = IsoNext(channels, styles, d, layers, kernel, style_dim, time_dim, 16, expansion)
    assert count_parameters(model) == parameters_by_hand(*sizes)
    assert total in (None, count_parameters(model))


def test_the_defaults_are_the_seed_size():
    with torch.device("meta"):
        assert count_parameters(IsoNext(4, 2)) == parameters_by_hand(4, 2, 384, 12, 7, 256, 256, 4)
    assert IsoNext(4, 2, num_layers=1).blocks[0].depthwise.kernel_size == (7, 7)


def test_a_shifted_object_gives_the_shifted_velocity_away_from_the_border():
    # One 3x3 block between two 3x3 convolutions sees 3 pixels far. The object stays 6 from the border, so the border's
    # own pattern does not meet it, the group statistics are those of the same set of values, and only their order of
    # summation, a rounding, may differ.
    model, far, moved = random_model(num_layers=1, kernel_size=3), 3, 4
    generator = torch.Generator().manual_seed(2)
    x = torch.full((1, C, 24, 24), 0.5)
    x[:, :, 7:12, 7:12] = torch.randn(1, C, 5, 5, generator=generator)
    rolled = x.roll((moved, moved), (2, 3))
    t, style = torch.tensor([0.3]), torch.tensor([1])
    with torch.no_grad():
        before, after = model(x, t, style), model(rolled, t, style)
    inside = before[:, :, far : -far - moved, far : -far - moved]
    shifted = after[:, :, far + moved : -far, far + moved : -far]
    torch.testing.assert_close(shifted, inside, rtol=0, atol=1e-5)
    assert inside.std() > 0.1


#################################################################################
#                                     Parts                                     #
#################################################################################


def test_adagn_is_group_norm_with_one_plus_scale_and_shift_of_each_sample():
    torch.manual_seed(0)
    norm = AdaGN(8, 5, GROUPS)
    x, cond = torch.randn(3, 8, 4, 5), torch.randn(3, 5)
    with torch.no_grad():
        affine = cond @ norm.affine.weight.T + norm.affine.bias
        y = norm(x, affine)
        for i in range(3):
            alone = F.group_norm(x[i : i + 1], GROUPS, weight=1 + affine[i, :8], bias=affine[i, 8:])
            torch.testing.assert_close(y[i : i + 1], alone, rtol=0, atol=2e-6)  # a few float32 roundings below 8


def test_adagn_of_one_and_three_with_scale_one_and_shift_a_half_is_by_hand():
    norm = AdaGN(2, 1, 2)
    nn.init.zeros_(norm.affine.weight)
    norm.affine.bias.data = torch.tensor([1.0, 0.0, 0.5, -1.0])  # scale (1, 0), shift (0.5, -1)
    x = torch.tensor([[1.0, 3.0], [10.0, 2.0]]).view(1, 2, 1, 2)
    expected = torch.tensor([[-1.5, 2.5], [0.0, -2.0]]).view(1, 2, 1, 2)
    # the norm's 1e-5 beside a variance of 1 takes 5e-6 off, twice
    torch.testing.assert_close(norm(x, norm.affine(torch.ones(1, 1))), expected, rtol=0, atol=2e-5)


def test_adagn_computes_in_float32_under_autocast_and_keeps_the_dtype_of_its_input():
    torch.manual_seed(0)
    norm = AdaGN(8, 5, GROUPS)
    x, scale_shift = torch.randn(2, 8, 4, 4).bfloat16(), norm.affine(torch.randn(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, scale_shift)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x.float(), scale_shift).bfloat16())


def test_the_depthwise_convolution_keeps_channels_apart():
    torch.manual_seed(0)
    depthwise = Block(6, 4, 7, 2, 4).depthwise
    x = torch.randn(1, 6, 9, 9)
    changed = x.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        difference = (depthwise(changed) - depthwise(x)).abs().amax((0, 2, 3))
        one = F.conv2d(x[:, 4:5], depthwise.weight[4:5], depthwise.bias[4:5], padding=3)
        torch.testing.assert_close(depthwise(x)[:, 4:5], one, rtol=0, atol=1e-6)
    assert (difference > 0).tolist() == [False, False, True, False, False, False]


def test_the_time_embedding_is_the_sinusoid_of_a_thousand_t():
    embedding = TimestepEmbedding(16)
    embedding.mlp = nn.Identity()
    t = torch.tensor([0.0, 0.001, 0.5, 0.501, 1.0])
    # angles of up to 1000 in float32, three roundings of 2^-24 relative
    torch.testing.assert_close(embedding(t).double(), sinusoid(t, 16), rtol=0, atol=1000 * 3 * 2.0**-24)
    assert embedding(t)[0].tolist() == [1.0] * 8 + [0.0] * 8


def test_the_condition_stays_float32_under_autocast_and_tells_0_500_from_0_501():
    model = random_model()
    t, style = torch.tensor([0.5, 0.501]), torch.tensor([1, 1])  # both are 0.5 in bf16
    with torch.no_grad():
        plain = model.condition(t, style)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model.condition(t, style)
            v = model(inputs(count=1)[0].expand(2, -1, -1, -1), t, style)
    assert len(plain) == len(model.blocks) + 1
    for ours, theirs in zip(under_autocast, plain, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    # 1000 t moves by 1, and with it the fastest pair of the sinusoid by a chord of 2 sin(1/2) = 0.96
    assert (sinusoid(t, 12)[0] - sinusoid(t, 12)[1]).norm() > 0.95
    assert all(relative_error(each[1], each[0]) > 0.001 for each in plain)
    assert relative_error(v[1], v[0]) > 0.01


#################################################################################
#                           Precision, memory, training                         #
#################################################################################


def test_the_output_is_float32_under_bf16_autocast_and_near_that_of_float32():
    model = random_model()
    with torch.no_grad():
        full = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            v = model(*inputs())
    assert full.dtype == v.dtype == torch.float32
    # about ten roundings of 2^-9 in a row, so 2 percent at worst; and not zero, or nothing ran in bf16
    assert 1e-4 < relative_error(v, full) < 0.02


@pytest.mark.parametrize("recompute", ("selective", "full"))
def test_what_is_computed_again_backwards_changes_no_gradient(recompute):
    plain = random_model(recompute="none")
    saving = copy.deepcopy(plain)
    saving.recompute = recompute
    for model in (plain, saving):
        model(*inputs()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
        assert a.grad.abs().max() > 0, name


def test_channels_last_gives_the_same_velocity():
    model = random_model()
    x, t, style = inputs()
    with torch.no_grad():
        contiguous = model(x, t, style)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        v = last(x.to(memory_format=torch.channels_last), t, style)
    assert relative_error(v, contiguous) < 1e-5  # another order of summation: some tens of float32 roundings


def fit(fresh):
    """A model fitted to style 0 at -1 and style 1 at +1, each also unlabelled; its losses; the first target's power.

    With noise and times drawn anew each step, or once.
    """
    torch.manual_seed(0)
    model = IsoNext(C, STYLES, **SMALL)
    data = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat(4).view(16, 1, 1, 1).expand(16, C, 4, 4)
    style = torch.tensor([0, 1, 2, 2]).repeat(4)
    noise, t = torch.randn(16, C, 4, 4), torch.rand(16)
    power = (data - noise).square().mean().item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = flow_loss(model, noise, data, t, style).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if fresh:
            noise, t = torch.randn(16, C, 4, 4), torch.rand(16)
    return model, losses, power


def test_the_loss_on_one_batch_begins_at_the_targets_power_and_falls_below_half():
    _, losses, power = fit(fresh=False)
    assert losses[0] == pytest.approx(power, rel=1e-5)
    assert losses[-1] < power / 2


def test_every_style_and_the_null_style_have_their_own_velocity_once_trained():
    model, _, _ = fit(fresh=True)
    x = torch.randn(1, C, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.8
    with torch.no_grad():
        v = model(x.expand(3, -1, -1, -1), torch.full((3,), 0.2), torch.tensor([0, 1, STYLES]))
    minus, plus = (-1 - x[0]) / 0.8, (1 - x[0]) / 0.8  # (x1 - x_t) / (1 - t): each style is a single point
    assert (v[0] - minus).norm() < (v[0] - plus).norm()
    assert (v[1] - plus).norm() < (v[1] - minus).norm()
    assert v[0].mean() < v[2].mean() < v[1].mean()  # unlabelled, both are possible


@pytest.mark.parametrize("style", range(STYLES + 1))
def test_each_sample_of_a_batch_has_its_own_time_and_style(style):
    # Alone and in a batch the same, up to the rounding of another batch shape.
    model = random_model()
    x, t, styles = inputs()
    with torch.no_grad():
        together = model(x, t, styles)[style : style + 1]
        alone = model(x[style : style + 1], t[style : style + 1], styles[style : style + 1])
    assert relative_error(alone, together) < 1e-5


@pytest.mark.parametrize(
    ("batch", "dim", "height", "width", "kernel"), [(3, 8, 9, 7, 7), (2, 16, 5, 12, 5), (1, 4, 1, 1, 7)]
)
def test_depthwise_gradients_in_bf16_on_a_cpu_are_those_of_float64(batch, dim, height, width, kernel):
    torch.manual_seed(0)
    layer = DepthwiseConv(dim, kernel)
    reference = torch.nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
    reference.load_state_dict(layer.state_dict())
    reference.double()
    x = torch.randn(batch, dim, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    x64, weight = x.detach().double().requires_grad_(), torch.randn(batch, dim, height, width)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.grad_fn is not None and y.dtype == torch.bfloat16
    (y.float() * weight).sum().backward()
    (reference(x64) * weight.double()).sum().backward()
    # BF16 keeps 8 bits: inputs, products' sums and results are each off by at most 2^-8 of their size.
    for ours, theirs in ((x, x64), (layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert relative_error(ours.grad.double(), theirs.grad) < 2**-7


#################################################################################
#                             Derivatives taken forwards                        #
#################################################################################


def difference_quotient(model, x, t, style, dx, dt, step=1e-2):
    """The derivative of v along (dx, dt), by central differences in float32; their error is of order step^2."""
    with torch.no_grad():
        ahead, behind = (model(x + sign * step * dx, t + sign * step * dt, style) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("bf16", (False, True))
def test_jvp_is_the_difference_quotient(recompute, layout, bf16):
    model, (x, t, style) = random_model(recompute=recompute), inputs()
    dx, dt = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), torch.full_like(t, 1e-3)
    expected = difference_quotient(model, x, t, style, dx, dt)
    model, x, dx = (each.to(memory_format=layout) for each in (model, x, dx))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        _, tangent = torch.func.jvp(lambda x, t: model(x, t, style), (x, t), (dx, dt))
    assert relative_error(tangent, expected) < (0.02 if bf16 else 1e-3)  # 0.2 without the depthwise layers' own


def test_jvp_with_respect_to_the_weights_sees_the_depthwise_ones_in_bf16():
    model, (x, t, style) = random_model(), inputs()
    names = [name for name, _ in model.named_parameters() if "depthwise" in name]
    weights = dict(model.named_parameters())
    directions = {
        name: torch.ones_like(weights[name]) if name in names else torch.zeros_like(p) for name, p in weights.items()
    }

    def of(weights):
        return torch.func.functional_call(model, weights, (x, t, style))

    with torch.no_grad():
        step = 1e-3
        ahead, behind = (of({n: p + sign * step * directions[n] for n, p in weights.items()}) for sign in (1, -1))
    with torch.autocast("cpu", torch.bfloat16):
        _, tangent = torch.func.jvp(of, (weights,), (directions,))
    assert relative_error(tangent, (ahead - behind) / (2 * step)) < 0.03


#################################################################################
#                                   Compiled                                    #
#################################################################################


@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
def test_compiled_blocks_share_one_graph_and_change_no_number(recompute):
    plain, compiled = random_model(recompute=recompute), random_model(recompute=recompute)
    x, t, style = inputs(count=2)
    graphs = []

    def backend(graph, _inputs):
        if (
            recompute != "selective"
        ):  # whose choice torch cannot cache yet; the kernels made of it are cached all the same
            check_cacheable(graph)
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled.compile(backend=backend)
    outputs = []
    for model in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x, t, style))
        outputs[-1].square().sum().backward()
    assert len(compiled.blocks) > 1 and len(graphs) == 1
    assert torch.equal(*outputs)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    compiled.uncompile()
    assert torch.equal(compiled(x, t, style), plain(x, t, style)) and len(graphs) == 1
