"""examples/text: tokenizer, autoencoder, the stages' loop."""

import json
import math

import pytest
import torch

from isonext.config import TrainingConfig
from isonext.errors import UserError
from textflow.autoencoder import AutoencoderConfig, FrozenT5, TextAutoencoder, load_tokenizer, train_tokenizer
from textflow.data import load_corpora, read_data_config, within_limit
from textflow.loop import Schedule, Stopped, fit
from textflow.stages import latent_spec

TEXTS = ["the red cat sits", "the blue dog runs fast", "a é <pad> 日本 x", "cats, dogs & co."]
TINY = AutoencoderConfig(latents=3, latent_dim=8, width=16, layers=1, heads=2, max_tokens=24, vocabulary=300)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


@pytest.fixture
def autoencoder(tokenizer):
    torch.manual_seed(0)
    return TextAutoencoder(TINY, tokenizer).eval()


def test_tokenizer_gives_every_text_back_and_survives_its_json(tokenizer):
    again = load_tokenizer(tokenizer.to_str())
    for text in [*TEXTS, "never seen: ß 🙂 <eos>"]:
        ids = again.encode(text).ids
        assert again.decode(ids, skip_special_tokens=True).strip() == text
        assert min(ids) > 2  # what looks like a special token is text
    assert len(again.encode("the red cat sits").ids) < len("the red cat sits")


def test_latents_are_normalised_and_do_not_know_their_batch(autoencoder):
    together = autoencoder.encode(TEXTS)
    assert together.shape == (4, 3, 8)
    torch.testing.assert_close(together.mean(2), torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.var(2, correction=0), torch.ones(4, 3), atol=1e-3, rtol=0)
    alone = autoencoder.encode(TEXTS[:1])  # without the padding that longer ones bring
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_decoder_sees_the_latents_and_the_tokens_before(autoencoder):
    latents, tokens = torch.randn(1, 3, 8), torch.tensor([[10, 11, 12, 13]])
    logits = autoencoder.logits(latents, tokens)
    assert logits.shape == (1, 5, autoencoder.tokenizer.get_vocab_size())
    changed = tokens.clone()
    changed[0, 2] = 20
    other = autoencoder.logits(latents, changed)
    torch.testing.assert_close(other[:, :3], logits[:, :3])
    assert not torch.allclose(other[:, 3], logits[:, 3], atol=1e-4)
    for which in range(3):
        moved = latents.clone()
        moved[0, which, 0] += 1
        assert not torch.allclose(autoencoder.logits(moved, tokens)[:, 0], logits[:, 0], atol=1e-5)


def test_cross_entropy_by_hand_leaves_padding_out(autoencoder):
    latents = torch.randn(2, 3, 8)
    tokens = autoencoder.tokenize([TEXTS[0], TEXTS[1]])
    lengths = (tokens != 0).sum(1).tolist()
    assert lengths[0] < lengths[1] and tokens[0, lengths[0] - 1] == 2  # the end mark is predicted, too
    log = autoencoder.logits(latents, tokens[:, :-1]).log_softmax(2)
    total = sum(-log[b, i, tokens[b, i]] for b in range(2) for i in range(lengths[b]))
    assert autoencoder.cross_entropy(latents, TEXTS[:2]).item() == pytest.approx(total.item() / sum(lengths), rel=1e-5)


def test_decoding_is_greedy_and_ends_at_the_end_mark_or_the_limit(autoencoder, monkeypatch):
    vocabulary = autoencoder.tokenizer.get_vocab_size()
    cat, dog = (autoencoder.tokenizer.encode(word).ids for word in ("cat", "dog"))

    def scripted(latents, tokens):
        logits = torch.zeros(len(tokens), tokens.shape[1] + 1, vocabulary)
        place = tokens.shape[1]
        logits[:, -1, 0] = 9.0  # padding is the likeliest, and must not be taken
        logits[0, -1, cat[place] if place < len(cat) else 2] = 5.0
        logits[1, -1, dog[place % len(dog)]] = 5.0  # never ends
        return logits

    monkeypatch.setattr(autoencoder, "logits", scripted)
    first, second = autoencoder.decode(torch.zeros(2, 3, 8))
    assert first == "cat"
    assert len(autoencoder.tokenizer.encode(second).ids) <= TINY.max_tokens and second.startswith("dog dog")


def test_sentence_over_the_limit_is_one_line(autoencoder):
    with pytest.raises(UserError, match=r"a sentence of \d+ tokens, the limit is 24: 'the cat the cat") as error:
        autoencoder.encode(["x", "the cat " * 30])
    assert "\n" not in str(error.value)


def write_lines(folder, lines, **source):
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    tree = {"val_fraction": 0, "sources": [{"type": "text", "path": "lines.txt"} | source]}
    (folder / "data.json").write_text(json.dumps(tree))
    return load_corpora(read_data_config(folder / "data.json"))[0]


def test_long_sentences_are_an_error_or_skipped(autoencoder, tmp_path, capsys):
    lines = ["the cat", "the dog " * 30, "a dog"]
    with pytest.raises(UserError, match=r"source lines: a sentence of \d+ tokens.*\"longer\": \"skip\""):
        within_limit(write_lines(tmp_path, lines), autoencoder.tokenizer, 24)
    kept = within_limit(write_lines(tmp_path, lines, longer="skip"), autoencoder.tokenizer, 24)
    assert kept.texts == ["the cat", "a dog"] and kept.counts == [2] and len(kept.styles) == 2
    assert "1 of 3 sentences" in capsys.readouterr().out


def test_spec_standardises_the_training_latents(autoencoder, tmp_path):
    corpus = write_lines(tmp_path, [f"the cat {n}" for n in range(50)])
    spec = latent_spec(autoencoder, corpus)
    assert (spec.channels, spec.image_size, spec.styles) == (8, 3, ["lines"])
    with torch.no_grad():
        latents = autoencoder.encode(corpus.texts).mT
    z = spec.standardise(latents)
    assert z.shape == (50, 8, 3)
    torch.testing.assert_close(z.mean((0, 2)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2), correction=0), torch.ones(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(spec.restore(z), latents, atol=1e-5, rtol=0)


def test_t5_reads_frozen_from_its_folder(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    model = TextAutoencoder(AutoencoderConfig(**vars(TINY) | {"t5": str(tmp_path)}), tokenizer).eval()
    assert not [name for name in model.state_dict() if "shared" in name or "encoder.block" in name]
    latents = model.encode(TEXTS)
    torch.testing.assert_close(model.encode(TEXTS[:1])[0], latents[0], atol=1e-5, rtol=1e-5)
    model.cross_entropy(latents, TEXTS).backward()
    assert model.t5.project.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.t5.frozen[1].parameters())
    with pytest.raises(UserError, match="no T5 can be loaded"):
        TextAutoencoder(AutoencoderConfig(**vars(TINY) | {"t5": str(tmp_path / "none")}), tokenizer)


def test_t5_runs_in_float32_whatever_its_file_is_in(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    t5 = T5EncoderModel(config).to(torch.bfloat16)
    t5.save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    frozen = FrozenT5(str(tmp_path), 8)
    assert {parameter.dtype for parameter in frozen.frozen[1].parameters()} == {torch.float32}
    batch = fast(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():  # the same rounded weights, computed with in float32
        states = t5.float().eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        torch.testing.assert_close(frozen(TEXTS, torch.device("cpu"))[0], frozen.project(states), atol=1e-6, rtol=1e-5)


#################################################################################
#                                    The loop                                   #
#################################################################################


def line():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))


def train_line(folder, stop_at=None, steps=8, **options):
    model = line()

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 2, generator=torch.Generator().manual_seed(step))
        return (model(x)[:, 0] - x.sum(1)).square().mean(), {"step_seen": step}

    training = TrainingConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, **options)
    averaged = fit(model, loss_of, training, Schedule(steps, 1, 0, 2), folder / "line.pt", quiet=True)
    return model.state_dict() | {f"ema.{name}": value for name, value in averaged.state_dict().items()}


def test_loop_goes_on_exactly_after_a_kill(tmp_path):
    whole = train_line(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train_line(tmp_path / "b", stop_at=5)
    assert (tmp_path / "b/line.pt").exists()
    resumed = train_line(tmp_path / "b")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    averaged = whole["ema.0.weight"]
    assert not torch.equal(averaged, whole["0.weight"]) and not torch.equal(averaged, line()[0].weight)
    assert not (tmp_path / "b/line.pt").exists()
    lines = [json.loads(text) for text in (tmp_path / "b/line/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == list(range(1, 9)) and lines[-1]["step_seen"] == 7


def test_loop_refuses_the_state_of_another_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_line(tmp_path, stop_at=3)
    with pytest.raises(UserError, match="of a run with other settings"):
        train_line(tmp_path, steps=9)


def test_loop_stops_on_a_signal_and_gives_up_where_the_loss_is_no_number(tmp_path, monkeypatch):
    import os
    import signal

    model = line()

    def loss_of(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(torch.ones(1, 2)).sum(), {}

    with pytest.raises(Stopped, match="stopped at step 3"):
        fit(model, loss_of, TrainingConfig(), Schedule(9), tmp_path / "s.pt", quiet=True)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["step"] == 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="not finite, or leapt, in 20 steps"):
        fit(model, lambda _: (model(torch.ones(1, 2)).sum() * math.nan, {}), TrainingConfig(), Schedule(99),
            tmp_path / "n.pt", quiet=True)  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
