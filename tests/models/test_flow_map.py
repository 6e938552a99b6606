"""The network of stage 2: what it is told of a pair of styles, and that it starts as stage 1 under the target style."""

import pytest
import torch

from isonext.models.flow_map import FlowMap, Pair
from model import IsoNext

SIZES = {"hidden_dim": 16, "num_layers": 2, "num_groups": 4, "style_dim": 6, "time_dim": 8}
SOURCE, TARGET, SCALE = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0]), torch.tensor([1.0, 2.5, 4.0])
PAIR = Pair(SOURCE, TARGET, SCALE)


@pytest.fixture
def model():
    """Every weight random, those that start at zero too."""
    torch.manual_seed(0)
    model = FlowMap(3, 3, **SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 5, 4, generator=generator), torch.tensor([0.0, 0.5, 1.0])


def test_a_pair_is_embedded_as_the_formula_says_row_by_row(model):
    with torch.no_grad():
        found = model.embed_pair(PAIR)
    table, source, matrix = (part.weight.detach().double() for part in (model.style, model.source, model.guidance))
    for row, (a, b, scale) in enumerate(zip(SOURCE, TARGET, SCALE, strict=True)):
        contrast = [float(table[b, i] - table[a, i]) for i in range(6)]
        for i in range(6):
            guided = sum(float(matrix[i, j]) * contrast[j] for j in range(6)) * (float(scale) - 1)
            assert found[row, i].item() == pytest.approx(float(table[b, i] + source[a, i]) + guided, abs=1e-5)


def test_the_velocity_is_that_of_stage_1_under_the_pairs_embedding(model, inputs):
    plain = IsoNext(3, 3, **SIZES)
    own = {name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()}
    assert model.state_dict().keys() - own.keys() == {"source.weight", "guidance.weight"}
    plain.load_state_dict(own)
    with torch.no_grad():
        assert torch.equal(model(*inputs, PAIR), plain(*inputs, model.embed_pair(PAIR)))


def test_it_starts_as_stage_1_under_the_target_style_at_every_scale(inputs):
    torch.manual_seed(0)
    plain = IsoNext(3, 3, **SIZES)
    torch.nn.init.normal_(plain.head.weight)
    model = FlowMap(3, 3, **SIZES)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"source.weight", "guidance.weight"} and not missing.unexpected_keys
    with torch.no_grad():
        expected = plain(*inputs, TARGET)
        assert expected.abs().max() > 0.1
        assert torch.equal(model(*inputs, PAIR), expected)


def test_source_and_scale_count_and_the_scale_of_equal_styles_does_not(model, inputs):
    with torch.no_grad():
        v = model(*inputs, PAIR)
        other_source = model(*inputs, PAIR._replace(source=TARGET))
        other_scale = model(*inputs, PAIR._replace(scale=SCALE + 1))
    assert (v - other_source).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    assert (v - other_scale).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    assert torch.equal(v[1], other_scale[1])  # its styles are equal


def test_the_embedding_of_a_style_is_its_id(model, inputs):
    with torch.no_grad():
        assert torch.equal(model(*inputs, PAIR), model(*inputs, PAIR._replace(target=model.embed(TARGET))))


def test_a_pair_is_embedded_in_float32_under_autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        within = model.embed_pair(PAIR)
    assert within.dtype == torch.float32
    assert torch.equal(within, model.embed_pair(PAIR))


def test_what_is_new_learns_from_the_first_step_on(inputs):
    torch.manual_seed(0)
    model = FlowMap(3, 3, **SIZES)
    for module in (model.head, model.norm.affine, *(block.norm.affine for block in model.blocks)):
        torch.nn.init.normal_(module.weight, std=0.3)  # as stage 1 leaves them
    (model(*inputs, PAIR) - 1).square().sum().backward()
    assert model.source.weight.grad.abs().sum() > 0 and model.guidance.weight.grad.abs().sum() > 0
