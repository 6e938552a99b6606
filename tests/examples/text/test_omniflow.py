"""examples/text: the adapter of the real OmniFlow against a stand-in with the calls that its published code has."""

import sys
import types

import pytest
import torch
from torch import nn

from isonext.errors import UserError
from textflow.data import Corpus
from textflow.head_stage import HeadRun, train_head
from textflow.heads import HeadConfig
from textflow.model import load_text_model
from textflow.omniflow import OmniFlow
from textflow.writing import Writing, write_texts

TEXTS = ["a red cat", "two dogs", "birds"]


class Tokens:
    """A T5 or Llama tokenizer: one token a letter, `a` is 3, after a start token 1; 0 is padding, 2 the end."""

    def __call__(self, texts, return_tensors=None, padding=None):
        rows = [[1, *(ord(letter) % 64 + 3 for letter in text), 2] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        batch = types.SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())
        batch.to = lambda device: batch
        return batch

    def batch_decode(self, rows, skip_special_tokens=False):
        return ["".join(chr(token + 61) for token in row if token > 2) for row in rows.tolist()]


class TextVae(nn.Module):
    """`encode`, `generate` and forward of omniflow.models.text_vae; the latents' first channel is the letter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 80)
        self.asked = []

    def encode(self, prompt=None, input_ids=None, drop=False, tokenizer=None, sample=False, legacy=None):
        assert tokenizer is not None
        latents = torch.zeros(len(prompt), 32, 64)
        for row, text in zip(latents, prompt, strict=True):
            row[: len(text), 0] = torch.tensor([ord(letter) % 64 / 32 for letter in text])
        return latents * (not drop)

    def generate(self, input_ids=None, latents=None, max_length=None, do_sample=None):
        assert latents.shape[1:] == (32, 64) and max_length == 256 and do_sample is False
        letters = (latents[:, :, 0] * 32).round().long()
        return torch.where(letters > 0, letters + 3, 0)

    def forward(self, input_ids=None, attention_mask=None, latents=None, return_dict=None):
        self.asked.append((input_ids, latents))
        return (self.head(latents.mean(1))[:, None].expand(-1, input_ids.shape[1], -1),)


class Transformer(nn.Module):
    """Says what it was asked; guesses the clean latents as 3 everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace(joint_attention_dim=96, pooled_projection_dim=20)
        self.asked = []

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep_text, **flags):
        assert hidden_states is None and encoder_hidden_states.shape[1:] == (32, 96)
        assert pooled_projections.shape == (len(encoder_hidden_states), 20)
        assert flags == {"use_text_output": True, "drop_image": True, "drop_audio": True, "return_dict": False}
        self.asked.append((encoder_hidden_states, timestep_text))
        return {"model_pred_text": torch.full((len(encoder_hidden_states), 32, 64), 3.0)}


@pytest.fixture
def real(tmp_path, monkeypatch):
    """OmniFlow as `load_text_model` opens it, from a folder with its layout and a package of its name."""
    tokens = Tokens()
    pipeline = types.SimpleNamespace(
        text_vae=TextVae(), transformer=Transformer(), tokenizer_3=tokens, text_vae_tokenizer=tokens
    )
    opened = types.SimpleNamespace(load_pretrained=lambda path, device: pipeline)
    monkeypatch.setitem(sys.modules, "omniflow", types.SimpleNamespace(OmniFlowPipeline=opened))
    (tmp_path / "OmniFlow-v0.5/transformer").mkdir(parents=True)
    return load_text_model(tmp_path / "OmniFlow-v0.5")


def test_encode_and_decode_are_channels_first_and_come_back(real):
    assert isinstance(real, OmniFlow)
    latents = real.encode(TEXTS)
    assert latents.shape == (3, 64, 32) and latents[1, 0, 0] == ord("t") % 64 / 32
    assert [text.replace("=", "").strip() for text in real.decode(latents)] == [
        text.replace(" ", "`") for text in TEXTS
    ]


def test_velocity_leads_to_the_guess_and_time_is_counted_as_noise(real):
    x, t = torch.randn(2, 64, 32), torch.tensor([0.25, 0.9])
    v = real.field(x, t, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(x + (1 - t)[:, None, None] * v, torch.full_like(x, 3.0), atol=1e-5, rtol=0)
    words, timestep = real.pipeline.transformer.asked[0]
    torch.testing.assert_close(timestep, torch.tensor([750.0, 100.0]))
    torch.testing.assert_close(words[:, :, :64], x.mT)
    assert not words[:, :, 64:].any()
    assert real.field(x, torch.ones(2), t).isfinite().all()  # at t = 1, where the formula is 0 / 0


def test_cross_entropy_is_shifted_and_leaves_padding_out(real):
    latents = real.encode(TEXTS[:2]).requires_grad_()
    loss = real.cross_entropy(latents, TEXTS[:2])
    ids, theirs = real.pipeline.text_vae.asked[0]
    assert torch.equal(theirs, latents.mT)
    log = real.pipeline.text_vae.head(latents.mT.mean(1)).log_softmax(1)
    wanted = [-log[b, token] for b in range(2) for token in ids[b, 1:] if token > 0]
    assert loss.item() == pytest.approx((sum(wanted) / len(wanted)).item(), rel=1e-5)
    loss.backward()
    assert latents.grad.abs().sum() > 0


def corpus():
    return Corpus(TEXTS, torch.tensor([2, 0, 1]), ["x", "y", "z"], [3], [3.0], ["lines"], ["error"])


def test_modes_and_heads_work_on_it(real, tmp_path):
    taken = real.accept(corpus())
    assert taken.classes == ["text"] and taken.styles.tolist() == [0, 0, 0]
    plain = write_texts(real, None, taken.texts, taken.styles, Writing("reconstruct"), quiet=True)
    assert plain == write_texts(real, None, taken.texts, taken.styles, Writing("roundtrip", num_steps=4), quiet=True)
    config = HeadConfig(use_text_decoder_head=True, text_decoder_head_hidden_dim=8)
    how = HeadRun(batch_size=2, max_steps=2, save_interval=0)
    figures = train_head(real, config, how, (corpus(), corpus()), tmp_path / "head", quiet=True)
    assert figures["steps"] == 2 and (tmp_path / "head/best.pt").exists()


def test_other_latents_and_a_missing_package_are_one_line(real, tmp_path, monkeypatch):
    monkeypatch.setattr(real.pipeline.text_vae, "encode", lambda *_, **__: torch.zeros(1, 24, 64))
    with pytest.raises(UserError, match="latents of 24 x 64, the adapter knows 32 x 64"):
        real.encode(["x"])
    monkeypatch.setitem(sys.modules, "omniflow", None)
    with pytest.raises(UserError, match=r"OmniFlow-v0\.5: is a folder of OmniFlow; to open it, install its package"):
        load_text_model(tmp_path / "OmniFlow-v0.5")
