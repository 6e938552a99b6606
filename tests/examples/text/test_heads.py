"""examples/text: the heads by hand: what each part does to a latent, its codes, its loss, its errors."""

import math

import pytest
import torch
from torch import nn

from isonext.errors import UserError
from model import count_parameters
from textflow.heads import Codebook, HeadConfig, Heads, MlpHead, Refiner, usage

ALL = {"use_text_decoder_head": True, "use_vq_codebook": True, "use_latent_refiner": True}


def make(**flags):
    torch.manual_seed(0)
    return Heads(HeadConfig(**flags), 64).eval()


def test_parameters_are_those_of_the_issue():
    mlp = (64 * 4096 + 4096) + 2 * 4096 + (4096 * 64 + 64) + 2 * 64
    refiner = (64 * 256 + 256) + (256 * 256 + 256) + (256 * 64 + 64)
    assert count_parameters(make(use_text_decoder_head=True)) == mlp
    assert count_parameters(make(use_latent_refiner=True)) == refiner
    assert count_parameters(make(**ALL)) == mlp + refiner + 8192 * 64
    kinds = [type(layer) for layer in make(use_text_decoder_head=True).head.layers]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Linear, nn.LayerNorm]


def test_without_codes_a_fresh_head_changes_nothing_and_then_each_latent_by_itself():
    latents = torch.randn(2, 64, 3)
    heads = make(use_text_decoder_head=True, use_latent_refiner=True)
    assert torch.equal(heads(latents).latents, latents)
    nn.init.normal_(heads.head.layers[-1].weight)
    nn.init.normal_(heads.refiner.layers[-1].weight)
    made = heads(latents)
    assert not torch.allclose(made.latents, latents, atol=0.1)
    by_hand = latents[1, :, 2] + heads.head.layers(latents[1, :, 2])
    by_hand = by_hand + heads.refiner.layers(by_hand)
    torch.testing.assert_close(made.latents[1, :, 2], by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        made.outputs[5], latents[1, :, 2] + heads.head.layers(latents[1, :, 2]), atol=1e-4, rtol=0
    )


def test_every_part_takes_part_in_the_loss():
    heads = make(**ALL).train()
    made = heads(torch.randn(4, 64, 3))
    (made.latents.square().mean() + made.vq_loss).backward()
    for part, name in ((heads.head, "layers.5.weight"), (heads.refiner, "layers.4.weight"), (heads.codebook, "codes")):
        assert dict(part.named_parameters())[name].grad.abs().sum() > 0


def codebook(codes):
    book = Codebook(2, len(codes))
    with torch.no_grad():
        book.codes.copy_(torch.tensor(codes))
    return book


def test_codes_are_the_nearest_and_gradients_go_straight_through():
    book = codebook([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    x = torch.tensor([[0.4, 0.1], [0.8, 0.7], [3.0, -1.0]], requires_grad=True)
    taken, index, loss = book(x)
    assert index.tolist() == [0, 1, 2]
    torch.testing.assert_close(taken, book.codes[index])
    # Squared distances 0.17, 0.13, 2 over 6 numbers; the codes' own loss and a quarter of it for the commitment.
    assert loss.item() == pytest.approx(1.25 * (0.17 + 0.13 + 2) / 6, rel=1e-5)
    (3 * taken[0, 0]).backward(retain_graph=True)
    assert x.grad[0].tolist() == [3, 0] and book.codes.grad is None
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, 0.25 * 2 * (x - book.codes[index]).detach() / 6)
    torch.testing.assert_close(book.codes.grad, 2 * (book.codes[index] - x).detach() / 6)


def test_codes_start_as_outputs_and_dead_ones_start_again():
    torch.manual_seed(0)
    book = Codebook(2, 4)
    outputs = torch.arange(12.0).view(6, 2)
    book.start_from(outputs)
    rows = {tuple(row) for row in outputs.tolist()}
    assert len({tuple(row) for row in book.codes.tolist()} & rows) == 4
    book.start_from(outputs[:3])  # fewer outputs than codes: some are taken twice
    assert {tuple(row) for row in book.codes.tolist()} == {tuple(row) for row in outputs[:3].tolist()}
    book = codebook([[0.0, 0.0], [9.0, 9.0]])
    x = torch.tensor([[0.1, 0.2]])
    restarted = [book.restart_dead(x, torch.tensor([0])) for _ in range(100)]
    assert restarted == [0] * 99 + [1]
    torch.testing.assert_close(book.codes, torch.tensor([[0.0, 0.0], [0.1, 0.2]]))
    assert book.unused.tolist() == [0, 0]


def test_usage_by_hand():
    assert usage(torch.tensor([0, 0, 1, 2]), 8) == {
        "codes_used": 3,
        "perplexity": pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
    }
    assert usage(torch.arange(8), 8)["perplexity"] == pytest.approx(8)


def test_parts_switched_off():
    latents = torch.randn(2, 64, 3)
    heads = make(**ALL)
    nn.init.normal_(heads.refiner.layers[-1].weight)
    outcomes = [make(**ALL).without([]), make(**ALL).without(["codes"])]
    for each in (*outcomes, heads):
        each.load_state_dict(heads.state_dict(), strict=False)
    without = heads(latents).latents, outcomes[1](latents).latents, heads.without(["refiner"])(latents).latents
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in ((without[0], without[1]), (without[0], without[2])))
    flat = without[2].mT.flatten(0, 1)  # with the refiner off what comes out are codes
    torch.testing.assert_close(flat, heads.codebook.codes[heads.codebook.nearest(flat)], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"--without codes: this checkpoint's head has none \(MLP head\)"):
        make(use_text_decoder_head=True).without(["codes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "without parts"),
        ({"use_vq_codebook": True, "use_latent_refiner": True}, "give --use_text_decoder_head as well"),
        ({"use_text_decoder_head": True, "text_decoder_head_dim": 128}, "128: the latents are 64 wide, and the head's"),
    ],
)
def test_impossible_heads_are_refused_with_the_reason(flags, message):
    with pytest.raises(UserError, match=message):
        make(**flags)


def test_names_tell_the_heads_apart():
    assert HeadConfig(**ALL).name == "VQ head + refiner" and HeadConfig(use_latent_refiner=True).name == "refiner"
    assert MlpHead(4, 8, 0.0)(torch.ones(4)).shape == Refiner(4, 8, 3)(torch.ones(4)).shape == (4,)
    assert sum(isinstance(layer, nn.Linear) for layer in Refiner(4, 8, 3).layers) == 4
