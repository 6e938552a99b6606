"""The real OmniFlow (Li et al., arXiv:2412.01169; github.com/jacklishufan/OmniFlows) as a text model: its text stream.

NOT RUN AGAINST THE REAL WEIGHTS. Written from the project's published code and tested against a stand-in with the same
calls (tests/examples/text/test_omniflow.py). Needs its package (`pip install -e .` in a clone) and the folder
OmniFlow-v0.5.

Three calls are used, and one for the training of heads:

    encode     pipeline.text_vae.encode(texts, input_ids=None, tokenizer=pipeline.tokenizer_3) -> (B, 32, 64)
    velocity   pipeline.transformer(..., use_text_output=True)["model_pred_text"], its guess x1_hat of the clean latents
    decode     pipeline.text_vae.generate(latents=..., max_length=256, do_sample=False), then its tokenizer; on CUDA
               alone, which its code names
    (loss)     pipeline.text_vae(latents=..., input_ids=..., return_dict=False)[0], the next tokens' logits

OmniFlow counts noise: sigma = 1 - t, timestep = 1000 sigma, x_t = (1 - sigma) x1 + sigma x0. So x_t is ours, and from
x1_hat = x_t + (1 - t) v follows v = (x1_hat - x_t) / (1 - t).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isonext.data.store import LatentSpec
from isonext.errors import UserError
from textflow.data import Corpus

LATENTS, WIDTH = 32, 64
LAST = 1e-3  # v is asked for up to t = 1, where its formula is 0 / 0: sigma never falls below this


def open_omniflow(folder: Path) -> "OmniFlow":
    """The pipeline of a folder; without its package an error that says where to get it."""
    try:
        from omniflow import OmniFlowPipeline
    except ImportError as error:
        raise UserError(
            f"{folder}: is a folder of OmniFlow; to open it, install its package: "
            f"git clone https://github.com/jacklishufan/OmniFlows && pip install -e OmniFlows ({error})"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return OmniFlow(OmniFlowPipeline.load_pretrained(str(folder), device=device), str(folder.resolve()))


class OmniFlow:
    """What `text_model.TextModel` is, over OmniFlow's pipeline. One class, which is the null class, too."""

    def __init__(self, pipeline: Any, name: str) -> None:
        self.pipeline = pipeline
        # Its latents leave a LayerNorm: they have mean 0 and deviation 1 already.
        self.spec = LatentSpec("omniflow", WIDTH, 1, LATENTS, ["text"], [0.0] * WIDTH, [1.0] * WIDTH)
        self.field = TextStream(pipeline.transformer)
        self.digest = hashlib.sha256(f"omniflow {Path(name).name}".encode()).hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.transformer.parameters()).device

    def to(self, device: torch.device) -> "OmniFlow":
        return self  # stays where the pipeline has put it

    def accept(self, corpus: Corpus) -> Corpus:
        """Everything; it knows no classes."""
        return dataclasses.replace(corpus, styles=torch.zeros_like(corpus.styles), classes=["text"])

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """(B, 64, 32)."""
        vae, tokenizer = self.pipeline.text_vae, self.pipeline.tokenizer_3
        latents = vae.encode(texts, input_ids=None, tokenizer=tokenizer)  # with drop=True it would give zeros
        if latents.shape[1:] != (LATENTS, WIDTH):
            shape = " x ".join(map(str, latents.shape[1:]))
            raise UserError(f"OmniFlow's text VAE gave latents of {shape}, the adapter knows {LATENTS} x {WIDTH}")
        return latents.mT.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[str]:
        tokens = self.pipeline.text_vae.generate(latents=self._theirs(latents), max_length=256, do_sample=False)
        if isinstance(tokens[0], str):
            return list(tokens)
        return self.pipeline.text_vae_tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def cross_entropy(self, latents: Tensor, texts: list[str]) -> Tensor:
        """Shifted: the logits at a token are of the next one; padding is left out."""
        tokens = self.pipeline.text_vae_tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        logits = self.pipeline.text_vae(
            latents=self._theirs(latents), input_ids=tokens.input_ids, attention_mask=None, return_dict=False
        )[0]
        wanted = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=-100)

    def _theirs(self, latents: Tensor) -> Tensor:
        """(B, 64, 32) -> (B, 32, 64) in the VAE's precision."""
        return latents.mT.to(next(self.pipeline.text_vae.parameters()).dtype)


class TextStream:
    """field(x, t, style) -> v, of OmniFlow's transformer with its image and audio streams dropped."""

    null_style = 0

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        """x (B, 64, 32), t (B,) -> (B, 64, 32) float32; the style says nothing here."""
        net = self.transformer
        sigma = (1 - t).clamp_min(LAST)
        like = next(net.parameters())
        words = F.pad(x.mT, (0, net.config.joint_attention_dim - WIDTH)).to(like)  # latents take the first 64 channels
        guess = net(
            hidden_states=None,
            encoder_hidden_states=words,
            pooled_projections=torch.zeros(len(x), net.config.pooled_projection_dim).to(like),
            timestep_text=(1000 * sigma).to(like.dtype),
            use_text_output=True,
            drop_image=True,
            drop_audio=True,
            return_dict=False,
        )["model_pred_text"]
        return (guess[..., :WIDTH].mT.float() - x) / sigma[:, None, None]
