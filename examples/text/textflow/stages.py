"""The two stages that make `models/text`: the autoencoder, then the flow over its latents."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from isonext.config import TrainingConfig
from isonext.data.store import LatentSpec
from isonext.flow.loss import drop_labels, flow_loss, sample_time
from textflow.autoencoder import AutoencoderConfig, TextAutoencoder, train_tokenizer
from textflow.data import Corpus, check_classes, within_limit
from textflow.loop import Schedule, fit
from textflow.model import FlowConfig, load_autoencoder, make_field, save_autoencoder, save_flow


@dataclass
class Shape:
    """Sizes and lengths of both stages. The defaults have OmniFlow's 32 latents of 64, for a GPU."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    autoencoder_steps: int = 100_000
    flow_steps: int = 200_000
    # Both stages; the rate of the small networks is larger, see training/optim.py for the rest.
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            batch_size=128, learning_rate=3e-4, ema_decay=0.999, warmup_steps=500, time_sampling="uniform"
        )
    )


def quick_shape() -> Shape:
    """8 latents and small networks: minutes on two CPU cores, for the built-in grammar."""
    return Shape(
        AutoencoderConfig(latents=8, width=128, layers=2, max_tokens=24, vocabulary=1000),
        FlowConfig(hidden_dim=192, num_layers=4, num_heads=4),
        autoencoder_steps=600,
        flow_steps=2500,
        training=TrainingConfig(
            batch_size=64, learning_rate=1e-3, ema_decay=0.995, warmup_steps=100, time_sampling="uniform"
        ),
    )


def train_autoencoder(
    folder: Path, shape: Shape, train: Corpus, val: Corpus, device: torch.device, quiet: bool | None = None
) -> None:
    """Tokenizer and autoencoder of the training sentences, to models/text/autoencoder.pt.

    Loss: cross-entropy of the next token, the decoder given latents with Gaussian noise of deviation `noise`.
    """
    config, training = shape.autoencoder, shape.training
    tokenizer = train_tokenizer(train.texts, config.vocabulary)
    torch.manual_seed(training.seed)
    model = TextAutoencoder(config, tokenizer).to(device)
    train, val = (within_limit(corpus, tokenizer, config.max_tokens) for corpus in (train, val))

    def loss_of(step: int) -> tuple[Tensor, dict]:
        texts, _, generator = train.draw(training.batch_size, training.seed, step)
        latents = model.encode(texts)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        return model.cross_entropy(latents + config.noise * noise, texts), {}

    def evaluate(averaged: TextAutoencoder, _: int) -> dict[str, float]:
        return {"val_exact": reconstructed(averaged.eval(), val.part(256).texts)} if len(val) else {}

    schedule = Schedule(shape.autoencoder_steps, eval_every=max(1, shape.autoencoder_steps // 5))
    averaged = fit(model, loss_of, training, schedule, folder / "autoencoder_state.pt", evaluate, quiet).eval()
    save_autoencoder(folder, averaged, latent_spec(averaged, train))


@torch.inference_mode()
def reconstructed(autoencoder: TextAutoencoder, texts: list[str]) -> float:
    """The share of sentences that come back from their latents letter by letter."""
    came_back = autoencoder.decode(autoencoder.encode(texts))
    return sum(a == b for a, b in zip(came_back, texts, strict=True)) / len(texts)


@torch.inference_mode()
def latent_spec(autoencoder: TextAutoencoder, train: Corpus) -> LatentSpec:
    """Statistics per channel over at most 4096 training sentences; a "cell" is one latent of the sequence."""
    texts = train.part(4096).texts
    latents = torch.cat(
        [autoencoder.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    ).double()  # (n, K, 64)
    mean, std = latents.mean((0, 1)), latents.std((0, 1), correction=0).clamp_min(1e-3)
    config = autoencoder.config
    return LatentSpec("text", config.latent_dim, 1, config.latents, train.classes, mean.tolist(), std.tolist())


def train_flow(
    folder: Path, shape: Shape, train: Corpus, val: Corpus, device: torch.device, quiet: bool | None = None
) -> None:
    """The velocity network over the frozen autoencoder's latents, by the core's loss, to models/text/flow.pt."""
    autoencoder, spec = load_autoencoder(folder)
    autoencoder.to(device)
    check_classes(spec, train)
    train, val = (within_limit(corpus, autoencoder.tokenizer, autoencoder.config.max_tokens) for corpus in (train, val))
    training = replace(shape.training, label_drop_prob=0.15 if len(spec.styles) > 1 else 0.0)
    torch.manual_seed(training.seed)
    model = make_field(shape.flow, spec).to(device)

    def mean_loss(corpus: Corpus, network: torch.nn.Module, step: int, drop: float, stream: int) -> Tensor:
        texts, style, generator = corpus.draw(training.batch_size, training.seed + stream, step)
        with torch.no_grad():
            x1 = spec.standardise(autoencoder.encode(texts).mT)
        x0 = torch.randn(x1.shape, generator=generator)
        t = sample_time(len(x1), training.time_sampling, generator)
        style = drop_labels(style, drop, model.null_style, generator)
        return flow_loss(network, *(tensor.to(x1.device) for tensor in (x0, x1, t, style))).mean()

    def loss_of(step: int) -> tuple[Tensor, dict]:
        return mean_loss(train, model, step, training.label_drop_prob, 0), {}

    @torch.no_grad()
    def evaluate(averaged: torch.nn.Module, _: int) -> dict[str, float]:
        if not len(val):
            return {}
        return {"val_loss": sum(mean_loss(val, averaged, n, 0.0, 1).item() for n in range(4)) / 4}

    schedule = Schedule(shape.flow_steps, eval_every=max(1, shape.flow_steps // 5))
    averaged = fit(model, loss_of, training, schedule, folder / "flow_state.pt", evaluate, quiet)
    save_flow(folder, shape.flow, averaged, autoencoder)
