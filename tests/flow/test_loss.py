"""The flow against hand-written numbers: path, loss, sampling of t, label drop, noise pairing, guidance."""

from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from isonext.flow.guidance import GuidedField
from isonext.flow.loss import drop_labels, flow_loss, map_loss, pair_noise, path, sample_time
from isonext.models.flow_map import Pair
from model import IsoNext

X0 = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
X1 = torch.tensor([[5.0, -2.0], [8.0, 4.0]])
T = torch.tensor([0.25, 0.75])
V = torch.tensor([[4.0, -4.0], [8.0, 8.0]])  # X1 - X0

quick = settings(deadline=None, max_examples=40)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


#################################################################################
#                                  Path and loss                                #
#################################################################################


def test_path_is_one_minus_t_times_x0_plus_t_times_x1_and_v_is_x1_minus_x0():
    xt, v = path(X0, X1, T)
    assert torch.equal(xt, torch.tensor([[2.0, 1.0], [6.0, 2.0]]))
    assert torch.equal(v, V)


def test_path_starts_at_noise_and_ends_at_data_in_every_dimension():
    x0, x1 = torch.randn(2, 2, 3, 4, 5, generator=generator())
    xt, _ = path(x0, x1, torch.tensor([0.0, 1.0]))
    assert torch.equal(xt[0], x0[0])
    assert torch.equal(xt[1], x1[1])


def test_loss_of_the_map_is_each_samples_mean_absolute_error_at_xt_t_and_pair():
    def model(x, t, pair):  # sees all three: (2, 1) + 0.25 + 1 and (6, 2) + 0.75 + 2
        return x + t[:, None] + pair.target[:, None]

    loss = map_loss(model, X0, X1, T, Pair(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([2.0, 2.0])))
    # errors (-0.75, 6.25) and (0.75, -3.25)
    assert torch.equal(loss, torch.tensor([3.5, 2.0]))


@quick
@given(seed=st.integers(0, 1000), a=st.floats(0, 1), b=st.floats(0, 1))
def test_velocity_is_the_slope_of_the_path(seed, a, b):
    x0, x1 = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator(seed))
    at_a, v = path(x0, x1, torch.full((3,), a, dtype=torch.float64))
    at_b, _ = path(x0, x1, torch.full((3,), b, dtype=torch.float64))
    torch.testing.assert_close(at_b - at_a, (b - a) * v, rtol=0, atol=1e-14)  # a few float64 roundings of numbers < 10


def test_loss_is_each_samples_mean_squared_error_at_xt_t_and_style():
    def model(x, t, style):  # sees all three: (2, 1) + 0.25 + 1 and (6, 2) + 0.75 + 2
        return x + t[:, None] + style[:, None]

    loss = flow_loss(model, X0, X1, T, torch.tensor([1, 2]))
    # errors (-0.75, 6.25) and (0.75, -3.25)
    assert torch.equal(loss, torch.tensor([19.8125, 5.5625]))


def test_loss_is_float32_when_the_network_answers_in_bf16():
    loss = flow_loss(lambda x, t, style: torch.ones_like(x, dtype=torch.bfloat16), X0, X1, T, torch.tensor([0, 0]))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.tensor([17.0, 49.0]))  # (9 + 25) / 2, 49


def test_loss_at_zero_output_is_the_mean_square_of_the_target():
    loss = flow_loss(lambda x, t, style: torch.zeros_like(x), X0, X1, T, torch.tensor([0, 0]))
    assert torch.equal(loss, torch.tensor([16.0, 64.0]))


#################################################################################
#                               Times and labels                                #
#################################################################################

DRAWS = 100_000


def test_uniform_times_have_mean_a_half_and_variance_a_twelfth():
    t = sample_time(DRAWS, "uniform", generator()).double()
    five_sigma = 5 / DRAWS**0.5
    assert abs(t.mean() - 1 / 2) < five_sigma * (1 / 12) ** 0.5
    assert abs(t.var() - 1 / 12) < five_sigma * (1 / 80 - 1 / 144) ** 0.5  # fourth central moment 1 / 80


@pytest.mark.parametrize(
    ("kind", "quantile"),
    [("uniform", stats.uniform.ppf), ("logit_normal", lambda q: 1 / (1 + 2.718281828459045 ** -stats.norm.ppf(q)))],
)
@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.75, 0.99])
def test_times_have_the_quantiles_of_their_distribution(kind, quantile, q):
    t = sample_time(DRAWS, kind, generator(1))
    below = (t < quantile(q)).double().mean()
    assert abs(below - q) < 5 * (q * (1 - q) / DRAWS) ** 0.5


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_lie_in_the_unit_interval_and_follow_from_the_generator(kind):
    t = sample_time(1000, kind, generator(2))
    assert (t >= 0).all()
    assert (t < 1).all()
    assert torch.equal(t, sample_time(1000, kind, generator(2)))
    assert not torch.equal(t, sample_time(1000, kind, generator(3)))


def test_unknown_time_sampling_is_named():
    with pytest.raises(ValueError, match="beta"):
        sample_time(3, "beta", generator())


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_labels_are_dropped_at_the_given_rate(probability):
    style = torch.arange(10_000) % 3
    dropped = (drop_labels(style, probability, 3, generator()) == 3).sum().item()
    low, high = stats.binom.interval(1 - 1e-6, len(style), probability)
    assert low <= dropped <= high


def test_probability_zero_drops_no_label_and_one_drops_all():
    style = torch.arange(1000) % 3
    assert torch.equal(drop_labels(style, 0.0, 3, generator()), style)
    assert torch.equal(drop_labels(style, 1.0, 3, generator()), torch.full_like(style, 3))


@quick
@given(seed=st.integers(0, 1000), probability=st.floats(0, 1))
def test_labels_are_kept_or_become_the_null_style_and_nothing_else(seed, probability):
    style = torch.randint(0, 4, (64,), generator=generator(seed))
    kept = drop_labels(style, probability, 4, generator(seed + 1))
    assert kept.dtype == torch.int64
    assert ((kept == style) | (kept == 4)).all()


#################################################################################
#                                 Noise pairing                                 #
#################################################################################


def integer_batch(styles, seed):
    """Small whole numbers, so that every squared distance is exact."""
    x0, x1 = torch.randint(-9, 10, (2, len(styles), 2, 1, 2), generator=generator(seed)).float()
    return x0, x1, torch.tensor(styles)


styles_of_a_batch = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@quick
@given(styles=styles_of_a_batch, seed=st.integers(0, 1000))
def test_pairing_reaches_the_least_total_squared_distance_within_each_style(styles, seed):
    x0, x1, style = integer_batch(styles, seed)
    paired = pair_noise(x0, x1, style)
    for label in set(styles):
        noise, data = x0[style == label], x1[style == label]
        least = min((noise[list(p)] - data).square().sum().item() for p in permutations(range(len(noise))))
        assert (paired[style == label] - data).square().sum().item() == least


@quick
@given(styles=styles_of_a_batch, seed=st.integers(0, 1000))
def test_pairing_only_permutes_noise_and_never_across_styles(styles, seed):
    x0, x1, style = integer_batch(styles, seed)
    before = x0.clone(), x1.clone()
    paired = pair_noise(x0, x1, style)

    def rows(x, label):
        return Counter(tuple(row) for row in x[style == label].flatten(1).tolist())

    assert all(rows(paired, label) == rows(x0, label) for label in set(styles))
    assert torch.equal(x0, before[0])
    assert torch.equal(x1, before[1])


def test_pairing_does_not_take_the_nearer_noise_of_another_style():
    x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[9.0], [0.0]])
    assert torch.equal(pair_noise(x0, x1, torch.tensor([0, 1])), x0)
    assert torch.equal(pair_noise(x0, x1, torch.tensor([1, 1])), x1)


#################################################################################
#                                    Guidance                                   #
#################################################################################

CHANNEL = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
X = torch.arange(12.0).view(2, 3, 1, 2)
STYLE, REFERENCE = torch.tensor([3, 0]), torch.tensor([1, 2])


class Affine:
    """v = x + t + style * channel weight: another number for every channel, style and time. Remembers its calls."""

    def __init__(self):
        self.batches, self.times = [], []

    def __call__(self, x, t, style):
        self.batches.append(len(x))
        self.times.append(t)
        return x + t.view(-1, 1, 1, 1) + style.view(-1, 1, 1, 1) * CHANNEL


def expected(t, first, second):
    """The affine field with the styles replaced by these weights, one a picture."""
    return X + t + torch.tensor([first, second]).view(2, 1, 1, 1) * CHANNEL


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_scale_one_is_the_conditional_in_one_forward(reference):
    model = Affine()
    field = GuidedField(model, STYLE, 1.0, reference)
    assert torch.equal(field(X, 0.5), expected(0.5, 3.0, 0.0))
    assert model.batches == [2]
    assert field.nfe == 1


@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [(2.5, 6.0, -3.0), (0.5, 2.0, 1.0), (0.0, 1.0, 2.0)],  # 3 + (w - 1) (3 - 1) and 0 + (w - 1) (0 - 2)
)
def test_guidance_moves_every_channel_away_from_the_reference_in_one_doubled_batch(scale, first, second):
    model = Affine()
    field = GuidedField(model, STYLE, scale, REFERENCE)
    assert torch.equal(field(X, 0.5), expected(0.5, first, second))
    assert model.batches == [4]
    assert field.nfe == 2


def test_the_change_between_a_plain_and_a_guided_field_costs_two_evaluations_and_has_one_size_both_ways():
    model = Affine()
    plain, guided = GuidedField(model, STYLE), GuidedField(model, STYLE, 2.5, REFERENCE)
    up = guided.change_from(plain, X, 0.5)
    assert torch.equal(up, expected(0.5, 6.0, -3.0) - expected(0.5, 3.0, 0.0))
    assert torch.equal(plain.change_from(guided, X, 0.5), -up)
    assert model.batches == [4, 4]
    assert (plain.nfe, guided.nfe) == (0, 4)
    assert torch.equal(plain.change_from(plain, X, 0.5), torch.zeros_like(X))


def test_contrast_with_an_equal_style_is_the_identity_in_one_forward():
    model = Affine()
    field = GuidedField(model, STYLE, 7.0, STYLE.clone())
    assert torch.equal(field(X, 0.5), expected(0.5, 3.0, 0.0))
    assert model.batches == [2]
    assert field.nfe == 1


def test_a_picture_whose_reference_is_its_own_style_is_not_moved_by_its_neighbours():
    assert torch.equal(GuidedField(Affine(), STYLE, 2.5, torch.tensor([3, 2]))(X, 0.5), expected(0.5, 3.0, -3.0))


TABLE = torch.tensor([[1.0, 3.0], [1.0, 2.0], [5.0, 5.0], [0.0, 8.0]]).view(4, 1, 1, 2)


def table(x, t, style):
    return TABLE[style] + 0 * x


@pytest.mark.parametrize(("rescale", "factor"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_rescaling_brings_the_deviation_back_by_hand(rescale, factor):
    # (1, 3) against (1, 2) at scale 3: (1, 3) + 2 (0, 1) = (1, 5), of deviation 2 where (1, 3) has 1. The second
    # picture: (0, 8) + 2 (0 - 1, 8 - 2) = (-2, 20), of deviation 11 where (0, 8) has 4.
    v = GuidedField(table, torch.tensor([0, 3]), 3.0, torch.tensor([1, 1]), rescale=rescale)(
        torch.zeros(2, 1, 1, 2), 0.5
    )
    second = 1 + rescale * (4 / 11 - 1)
    by_hand = [factor * 1, factor * 5, second * -2, second * 20]
    assert v.flatten().tolist() == pytest.approx(by_hand, rel=1e-6)  # some roundings in float32


@quick
@given(seed=st.integers(0, 1000), scale=st.floats(0, 8), rescale=st.floats(0, 1))
def test_rescaling_is_a_factor_a_picture_that_at_one_gives_each_the_unguided_deviation(seed, scale, rescale):
    values = torch.randn(4, 3, 4, 4, generator=generator(seed)) * torch.tensor([0.1, 1, 5, 50]).view(4, 1, 1, 1)
    style, reference, x = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1]), torch.zeros(3, 3, 4, 4)

    def velocity(scale, rescale):
        return GuidedField(lambda x, t, style: values[style], style, scale, reference, rescale=rescale)(x, 0.5)

    plain, guided, whole, part = velocity(1, 0), velocity(scale, 0), velocity(scale, 1), velocity(scale, rescale)
    before, after, wanted = (v.flatten(1).double().std(1, correction=0) for v in (guided, whole, plain))
    # 48 values in float32: each deviation rounds by some 1e-6 of itself, and the factor, made as 1 + (shrink - 1), by
    # another 1e-7 of what it is applied to.
    assert ((after - wanted).abs() <= 2e-6 * wanted + 2e-7 * before).all()
    torch.testing.assert_close(part, guided + rescale * (whole - guided), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_leaves_a_picture_whose_reference_is_its_own_style_alone_to_the_bit(rescale):
    x = torch.randn(2, 3, 4, 4, generator=generator(7))
    style = torch.tensor([3, 1])
    v = GuidedField(Affine(), style, 4.0, torch.tensor([3, 2]), rescale=rescale)(x, 0.3)
    plain = GuidedField(Affine(), style)(x, 0.3)
    assert torch.equal(v[0], plain[0])
    assert not torch.equal(v[1], plain[1])


def test_rescaling_leaves_a_velocity_without_deviation_alone():
    style, reference = torch.tensor([2, 2]), torch.tensor([2, 1])
    v = GuidedField(table, style, 2.0, reference, rescale=1.0)(torch.zeros(2, 1, 1, 2), 0.5)
    assert v[0].flatten().tolist() == [5.0, 5.0]  # its reference is its own style


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_missing_reference_is_an_error_that_names_the_scale(scale):
    with pytest.raises(ValueError, match=str(scale)):
        GuidedField(Affine(), STYLE, scale)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_network_gets_t_as_float32_once_a_row(scale):
    model = Affine()
    GuidedField(model, STYLE, scale, REFERENCE)(X, 0.1)
    rows = 2 if scale == 1 else 4
    assert torch.equal(model.times[0], torch.full((rows,), 0.1, dtype=torch.float32))


def real_network():
    """A small IsoNext with random weights, so that the style matters."""
    torch.manual_seed(0)
    model = IsoNext(3, 4, hidden_dim=8, num_layers=1, style_dim=8, time_dim=8, num_groups=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def test_a_real_network_at_scale_one_gives_the_very_bits_of_its_conditional():
    model = real_network()
    with torch.no_grad():
        v = GuidedField(model, STYLE)(X, 0.3)
        assert torch.equal(v, model(X, torch.tensor([0.3, 0.3]), STYLE))
    assert v.abs().min() > 0


def test_source_guidance_leaves_alone_the_pictures_of_a_mixed_batch_whose_styles_are_equal():
    def model(x, t, style):
        return x * (1.0 + style.view(-1, 1, 1, 1)) + 1e-3 * torch.arange(len(x)).view(-1, 1, 1, 1)  # a kernel's whims

    x, source, target = torch.ones(2, 1, 1, 1), torch.tensor([0, 1]), torch.tensor([0, 0])
    guided = GuidedField(model, target, 3.0, source)(x, 0.5)
    plain = model(torch.cat([x, x]), None, torch.cat([target, source]))[:2]
    assert guided[0] == plain[0]
    assert guided[1] != plain[1]


#################################################################################
#                             Styles as embeddings                              #
#################################################################################

NETWORK = real_network()


def between(share):
    """Embeddings from STYLE towards REFERENCE."""
    return torch.lerp(NETWORK.embed(STYLE), NETWORK.embed(REFERENCE), share)


@pytest.mark.parametrize("rescale", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_embeddings_of_ids_give_the_very_bits_of_the_ids_and_the_reference_may_be_either(scale, rescale):
    by_id = GuidedField(NETWORK, STYLE, scale, REFERENCE, rescale=rescale)
    v = by_id(X, 0.3)
    for reference in (REFERENCE, NETWORK.embed(REFERENCE)):
        field = GuidedField(NETWORK, NETWORK.embed(STYLE), scale, reference, rescale=rescale)
        assert torch.equal(field(X, 0.3), v)
        assert field.nfe == by_id.nfe
    assert not torch.equal(v, GuidedField(NETWORK, REFERENCE)(X, 0.3))


def test_an_embedding_between_two_styles_is_guided_against_an_id():
    both = [GuidedField(NETWORK, style)(X, 0.3) for style in (between(0.25), REFERENCE)]
    v = GuidedField(NETWORK, between(0.25), 3.0, REFERENCE)(X, 0.3)
    # The definition in float32; a doubled batch may round each velocity, here of size 10, otherwise: 1e-6 of it.
    torch.testing.assert_close(v, both[0] + 2 * (both[0] - both[1]), rtol=0, atol=1e-4)
    assert (v - both[0]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 7.5])
def test_guidance_is_off_where_the_embedding_is_that_of_the_reference(scale):
    field = GuidedField(NETWORK, between(1.0), scale, REFERENCE)
    assert torch.equal(field(X, 0.3), GuidedField(NETWORK, REFERENCE)(X, 0.3))
    assert field.nfe == 1


def test_one_entry_of_an_embedding_that_differs_is_another_style_and_its_neighbours_are_not_moved():
    table = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    reference = table.clone()
    reference[1, 1] = 3.0

    def model(x, t, style):
        return x + style.sum(1).view(-1, 1, 1, 1)

    v = GuidedField(model, table, 2.0, reference)(X, 0.5)
    assert torch.equal(v[0], X[0] + 1)
    assert torch.equal(v[1], X[1] + 3 + (3 - 4))
