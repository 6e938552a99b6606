"""examples/text: a small text model trained end to end, its heads, and the commands as users run them."""

import dataclasses
import itertools
import json
import re
import shutil
import sys

import pytest
import torch

import eval_text
import generate_text
import train_text
from helpers import refused
from isonext.config import TrainingConfig
from isonext.flow.transfer import TransferSettings, transfer
from isonext.utils import cli
from textflow import experiment as experiment_module
from textflow.autoencoder import AutoencoderConfig
from textflow.data import load_corpora, read_data_config
from textflow.experiment import Plan, experiment, figures_of
from textflow.head_stage import WHAT, HeadRun, guess, load_head, losses, save_head, train_head, validate
from textflow.heads import HeadConfig, Heads
from textflow.metrics import score
from textflow.model import FlowConfig, load_part, load_text_model, make_field, save_flow
from textflow.run import make_model
from textflow.stages import Shape
from textflow.writing import Writing, decode_latents, write_texts

WORDS = (
    ["one", "two", "three", "four", "five", "six"],
    ["red", "blue", "green", "white"],
    ["cats", "dogs", "birds"],
    ["run", "sit"],
)
CPU = torch.device("cpu")
SHAPE = Shape(
    AutoencoderConfig(latents=3, width=48, layers=1, heads=2, max_tokens=8, vocabulary=320),
    FlowConfig(hidden_dim=48, num_layers=2, num_heads=2),
    autoencoder_steps=260,
    flow_steps=500,
    training=TrainingConfig(
        batch_size=48, learning_rate=2e-3, ema_decay=0.98, warmup_steps=20, time_sampling="uniform"
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data.json (144 sentences, the animal is the class) and the trained text model `model`."""
    root = tmp_path_factory.mktemp("text")
    rows = [{"text": " ".join(words), "animal": words[2]} for words in itertools.product(*WORDS)]
    (root / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "path": "lines.jsonl", "label_field": "animal"}
    (root / "data.json").write_text(json.dumps({"val_fraction": 0.25, "sources": [source]}))
    corpora = load_corpora(read_data_config(root / "data.json"))
    make_model(root / "model", SHAPE, corpora, CPU, "autoencoder", quiet=True)
    faster = dataclasses.replace(SHAPE, training=dataclasses.replace(SHAPE.training, learning_rate=4e-3))
    make_model(root / "model", faster, corpora, CPU, "flow", quiet=True)
    return root


@pytest.fixture(scope="module")
def corpora(folder):
    return load_corpora(read_data_config(folder / "data.json"))


@pytest.fixture(scope="module")
def model(folder):
    return load_text_model(folder / "model")


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run a command in the folder without a new process: returns (status, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(module, *arguments):
        flags = () if module is eval_text else ("--model_path", "model", "--data_config", "data.json")
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.build_parser())
        return ended.value.code, *capsys.readouterr()

    return run


def written(model, corpus, mode, t_start=0.0, heads=None, **how):
    return write_texts(model, heads, corpus.texts, corpus.styles, Writing(mode, t_start, 10, **how), quiet=True)


#################################################################################
#                               The model's sanity                              #
#################################################################################


def test_latents_are_standardised_and_channels_first(model, corpora):
    latents = model.encode(corpora[0].texts)
    assert latents.shape == (len(corpora[0]), 64, 3) and model.field.size == (3,)
    torch.testing.assert_close(latents.mean((0, 2)), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2), correction=0), torch.ones(64), atol=1e-2, rtol=0)


def test_modes_are_in_their_order(model, corpora):
    """reconstruct >= denoise from 0.7 >= from 0.3 > from nothing but noise, and far above shuffled references."""
    corpus = corpora[0]

    def bleu(references, texts):
        return score(references, texts, ["bleu"])["BLEU-4"].value

    ceiling = written(model, corpus, "reconstruct")
    values = [bleu(corpus.texts, ceiling)]
    values += [bleu(corpus.texts, written(model, corpus, "denoise", t)) for t in (0.7, 0.3, 0.0)]
    shuffled = bleu(corpus.texts[7:] + corpus.texts[:7], ceiling)
    assert values[0] > 95 and values[0] >= values[1] >= values[2] > values[3], values
    assert values[3] < 60 and shuffled < 30, (values, shuffled)


def test_roundtrip_equals_reconstruct_and_is_exact(model, corpora):
    texts = [written(model, corpora[1], mode) for mode in ("roundtrip", "reconstruct")]
    assert texts[0] == texts[1]
    x1 = model.encode(corpora[1].texts)
    back = transfer(model.field, x1, corpora[1].styles, corpora[1].styles, TransferSettings(num_steps=10)).latents
    assert (back - x1).abs().max() <= 2.0**-21  # what rounding to the lattice costs, and nothing more


def test_samples_are_of_their_class_and_many(model):
    styles = torch.arange(60) % 3
    texts = write_texts(model, None, None, styles, Writing("sample", num_steps=10), quiet=True)
    right = [text.split()[2:3] == [model.spec.styles[style]] for text, style in zip(texts, styles, strict=True)]
    assert sum(right) > 40 and len(set(texts)) > 20, texts
    assert texts == write_texts(model, None, None, styles, Writing("sample", 0.9, 10, batch_size=60), quiet=True)


def test_denoise_starts_between_noise_and_the_reference(model, corpora, monkeypatch):
    """At t_start 1 nothing is done; below it the noise, and no more of the reference than its latents, is used."""
    corpus = corpora[1]
    assert written(model, corpus, "denoise", 1.0) == written(model, corpus, "reconstruct")
    seen = []
    monkeypatch.setattr("textflow.writing.integrate", lambda field, x, grid, method: seen.append((x, grid)) or x)
    written(model, corpus, "denoise", 0.25, batch_size=500)
    (x, grid), x1 = seen[0], model.encode(corpus.texts)
    assert grid[0] == 0.25 and grid[-1] == 1 and len(grid) == 11
    x0 = (x - 0.25 * x1) / 0.75
    assert abs(x0.mean()) < 0.1 and abs(x0.std() - 1) < 0.1


#################################################################################
#                                     Heads                                     #
#################################################################################


def heads_of(model, **flags):
    torch.manual_seed(1)
    small = {"text_decoder_head_hidden_dim": 64, "vq_codes": 64}
    return Heads(HeadConfig(use_text_decoder_head=True, **small, **flags), 64)


def test_guess_is_x1_hat_of_the_frozen_flow(model, corpora):
    x1, style = model.encode(corpora[0].texts[:4]), corpora[0].styles[:4]
    x1_hat = guess(model, x1, style, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    t, x0 = torch.rand(4, generator=generator), torch.randn(x1.shape, generator=generator)
    for b in range(4):
        xt = ((1 - t[b]) * x0[b] + t[b] * x1[b])[None]
        v = model.field(xt, t[b : b + 1], style[b : b + 1])
        torch.testing.assert_close(x1_hat[b], (xt + (1 - t[b]) * v)[0], atol=1e-4, rtol=1e-4)


def test_loss_is_the_sum_of_its_parts_and_moves_the_heads_alone(model, corpora):
    texts = corpora[0].texts[:8]
    x1 = model.encode(texts).clone()
    heads = heads_of(model, use_vq_codebook=True, use_latent_refiner=True)
    made = heads.eval()(x1 + 0.1)
    loss, numbers, (outputs, codes) = losses(model, heads, texts, x1, x1 + 0.1)
    mse = (made.latents - x1).square().mean().item()
    words = model.cross_entropy(made.latents, texts).item()
    assert numbers == pytest.approx({"cross_entropy": words, "mse": mse, "vq": made.vq_loss.item()}, rel=1e-4)
    assert loss.item() == pytest.approx(words + 0.1 * mse + made.vq_loss.item(), rel=1e-4)
    assert outputs.shape == (24, 64) and codes.shape == (24,)
    loss.backward()
    assert heads.refiner.layers[-1].weight.grad.abs().sum() > 0
    assert not any(p.grad is not None for part in (model.autoencoder, model.field) for p in part.parameters())


def test_training_helps_the_heads_and_leaves_the_rest_frozen(model, corpora, tmp_path):
    config = HeadConfig(True, False, True, text_decoder_head_hidden_dim=64)
    how = HeadRun(batch_size=32, max_steps=60, lr=2e-3, log_interval=1, eval_interval=20, save_interval=0)
    before = {name: value.clone() for name, value in model.autoencoder.state_dict().items()}
    untrained = validate(model, Heads(config, 64).eval(), corpora[0], how)["val_loss"]
    figures = train_head(model, config, how, (corpora[0], corpora[0]), tmp_path, quiet=True)
    assert figures["val_loss"] < 0.95 * untrained
    assert all(torch.equal(before[name], value) for name, value in model.autoencoder.state_dict().items())
    best = load_part(tmp_path / "best.pt", WHAT, ("config", "model", "weights", "figures"))["figures"]
    lines = [json.loads(text) for text in (tmp_path / "state/metrics.jsonl").read_text().splitlines()]
    assert best["val_loss"] == min(line["val_loss"] for line in lines if "val_loss" in line) <= figures["val_loss"]


def test_the_head_that_is_trained_is_the_head_that_speaks_and_each_part_says_something(model, corpora, tmp_path):
    config = HeadConfig(True, True, True, text_decoder_head_hidden_dim=64, vq_codes=64)
    how = HeadRun(batch_size=32, max_steps=20, lr=3e-3, log_interval=1, save_interval=0)
    figures = train_head(model, config, how, corpora, tmp_path, quiet=True)
    first = json.loads((tmp_path / "state/metrics.jsonl").read_text().splitlines()[0])
    assert {"perplexity", "codes_used", "restarted", "cross_entropy", "mse", "vq"} <= first.keys()
    assert 1 < figures["perplexity"] <= figures["codes_used"] <= 64 and figures["steps"] == 20
    heads = load_head(tmp_path / "best.pt", model)
    x1 = model.encode(corpora[1].texts)
    assert decode_latents(model, heads, x1) == model.decode(heads(x1).latents)
    spoken = written(model, corpora[0], "denoise", 0.3, heads)
    assert spoken != written(model, corpora[0], "denoise", 0.3)
    for part in ("codes", "refiner"):
        fewer = load_head(tmp_path / "best.pt", model).without([part])
        assert written(model, corpora[0], "denoise", 0.3, fewer) != spoken, part


#################################################################################
#                                   Commands                                    #
#################################################################################


def test_the_issues_commands(command, folder, model):
    head = ("--use_text_decoder_head", "--use_vq_codebook", "--text_decoder_head_dim", 64, "--use_latent_refiner")
    sizes = ("--latent_refiner_hidden_dim", 256, "--latent_refiner_layers", 2, "--batch_size", 32, "--num_epochs", 1)
    steps = ("--lr", "1e-4", "--log_interval", 1, "--eval_interval", 2, "--save_interval", 2)
    status, out, err = command(train_text, *head, *sizes, *steps, "--output_dir", "vq")
    assert status == 0, err
    assert "is there already" in out and "vq/best.pt: VQ head + refiner" in out
    checkpoint = ("--checkpoint", "vq/best.pt")
    status, out, err = command(generate_text, *checkpoint, "--output", "p.json", "--batch_size", 4, "--t_start", 0.9)
    assert status == 0, err
    entries = json.loads((folder / "p.json").read_text())
    assert [list(entry) for entry in entries] == [["id", "reference", "prediction"]] * len(entries)
    assert [entry["id"] for entry in entries] == list(range(len(entries)))
    status, out, err = command(
        eval_text, "--predictions", "p.json", "--metrics", "bleu", "rouge", "--output_json", "r.json"
    )
    assert status == 0, err
    assert json.loads((folder / "r.json").read_text())["p.json"]["sentences"] == len(entries)
    status, _, err = command(
        generate_text, "--mode", "sample", "--class_name", "dogs", "--num_samples", 5, "--output", "s.json"
    )
    assert status == 0, err
    entries = json.loads((folder / "s.json").read_text())
    assert [entry["class"] for entry in entries] == ["dogs"] * 5 and entries[0]["reference"] is None
    refused(command(eval_text, "--predictions", "s.json"), "has no reference")


def test_bad_input_is_one_line(command, folder, model, tmp_path):
    refused(
        command(train_text, "--use_text_decoder_head", "--text_decoder_head_dim", 128), "128", "only 64 is possible"
    )
    refused(command(train_text, "--stage", "head"), "a head without parts")
    refused(command(train_text, "--batch_size", 0), "--batch_size 0")
    refused(command(train_text, "--data_config", "none.json"), "none.json", "no such data config")
    refused(
        command(train_text, "--stage", "head", "--use_text_decoder_head", "--model_path", "nowhere"),
        "nowhere: no text model",
    )
    refused(command(generate_text, "--model_path", "nowhere"), "nowhere: no text model here", "train_text.py")
    refused(command(generate_text, "--checkpoint", "none.pt"), "none.pt: no such text head")
    refused(command(generate_text, "--checkpoint", "model/flow.pt"), "not a text head")
    refused(command(generate_text, "--t_start", 2), "--t_start 2.0")
    refused(command(generate_text, "--mode", "sample", "--class_name", "cows"), "'cows' does not exist", "0 = birds")
    refused(command(generate_text, "--without", "codes"), "--checkpoint")
    (folder / "other.json").write_text(json.dumps({"sources": [{"type": "grammar", "sentences": 100}]}))
    refused(command(generate_text, "--data_config", "other.json"), "classes are birds, cats, dogs", "farm")
    save_head(tmp_path / "foreign.pt", model, heads_of(model), {})
    tree = torch.load(tmp_path / "foreign.pt", weights_only=True)
    torch.save(tree | {"model": "0123"}, tmp_path / "foreign.pt")
    refused(command(generate_text, "--checkpoint", tmp_path / "foreign.pt"), "latents of another text model")


def test_flow_of_another_autoencoder_is_refused(folder, model, tmp_path, command):
    shutil.copytree(folder / "model", tmp_path / "model")
    other = load_text_model(folder / "model").autoencoder
    with torch.no_grad():
        other.bias[0] += 1
    save_flow(tmp_path / "model", SHAPE.flow, make_field(SHAPE.flow, model.spec), other)
    refused(command(generate_text, "--model_path", tmp_path / "model"), "flow.pt", "of another autoencoder")
    (tmp_path / "model/flow.pt").unlink()
    refused(command(generate_text, "--model_path", tmp_path / "model"), "its flow is missing", "--stage flow")


@pytest.mark.slow
def test_experiment_tabulates_all_heads_and_goes_on_where_it_stood(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "model", tmp_path / "out/model")
    small = {"text_decoder_head_hidden_dim": 32, "vq_codes": 64}
    heads = [HeadConfig(True, vq, refiner, **small) for vq in (False, True) for refiner in (False, True)]
    monkeypatch.setattr(experiment_module, "HEADS", heads)
    plan = Plan(SHAPE, HeadRun(batch_size=16, max_steps=2, eval_interval=0, save_interval=0), sentences=12, num_steps=2)
    results = experiment(plan, str(folder / "data.json"), tmp_path / "out", 2, 0.5, CPU, quiet=True)
    out = capsys.readouterr().out
    names = ["no head", "MLP head", "MLP head + refiner", "VQ head", "VQ head + refiner"]
    assert list(results["heads"]) == names and all(len(rows) == 2 for rows in results["heads"].values())
    for name in names:
        assert re.search(rf"^\| {re.escape(name)} +\| [\d.]+ ± [\d.]+", out, re.MULTILINE), out
    assert json.loads(out.splitlines()[-1])["heads"] == json.loads((tmp_path / "out/results.json").read_text())["heads"]
    assert results["checks"]["roundtrip"] == results["checks"]["reconstruct"]
    assert results["heads"]["VQ head"][0]["codes used"] > 1 and results["heads"]["MLP head"][0]["codes used"] is None
    assert len(results["samples"]["sample"]) == 10
    monkeypatch.setattr(experiment_module, "train_head", None)  # would fail if called
    again = experiment(plan, str(folder / "data.json"), tmp_path / "out", 2, 0.5, CPU, quiet=True)
    assert again["heads"] == results["heads"]


def test_figures_of_hands():
    found = figures_of(["a red cup lies on a stone oven", "x"], ["a red cup lies on a stone oven", "a red cup"])
    assert found["exact"] == 50 and found["grammatical"] == 50
