"""The text autoencoder: a sentence to K latents of 64 dimensions, and latents to a sentence.

    tokens, K queries -> transformer -> the queries' outputs -> Linear -> LayerNorm -> latents (B, K, 64)
    latents as a prefix, then the tokens -> causal transformer -> the next token

The latents have mean 0 and variance 1 each, and are trained with Gaussian noise on top, so that their neighbours mean
the same: a flow's samples are never exact (latent diffusion for language: Lovelace et al., arXiv:2212.09462; the
shape of 32 latents of 64 is OmniFlow's, Li et al., arXiv:2412.01169). Latents are (B, K, 64) in this file alone;
everywhere else they are channels first, (B, 64, K), as the core's networks and spec want them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from isonext.errors import UserError, first_line

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<bos>", "<eos>"]


@dataclass
class AutoencoderConfig:
    latents: int = 32  # K
    latent_dim: int = 64
    width: int = 256  # of both transformers
    layers: int = 4  # of each of them
    heads: int = 4
    max_tokens: int = 64  # the longest sentence, in tokens, its end mark included
    vocabulary: int = 8000  # at most; the tokenizer is trained on the data
    noise: float = 0.3  # deviation of the noise on the latents in training; theirs is 1
    dropout: float = 0.0
    t5: str | None = None  # a folder or hub id of a T5, whose frozen encoder reads the sentence in place of ours


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and `decode` gives it back as it was (blanks at its ends aside)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return load_tokenizer(tokenizer.to_str())


def load_tokenizer(text: str) -> Tokenizer:
    """From the JSON that a checkpoint keeps."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # a "<pad>" in somebody's text is text
    return tokenizer


def _transformer(config: AutoencoderConfig) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, 4 * config.width, config.dropout, "gelu", batch_first=True, norm_first=True
    )
    norm = nn.LayerNorm(config.width)
    return nn.TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)


class TextAutoencoder(nn.Module):
    """encode: texts -> latents (B, K, 64); logits: latents and tokens -> next tokens; decode: latents -> texts."""

    def __init__(self, config: AutoencoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        count, width = tokenizer.get_vocab_size(), config.width
        self.tokens = nn.Embedding(count, width)
        self.read_positions = nn.Parameter(torch.randn(config.max_tokens, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.latents, width) * 0.02)
        self.reader = _transformer(config)
        self.to_latents = nn.Linear(width, config.latent_dim)
        self.from_latents = nn.Linear(config.latent_dim, width)
        self.write_positions = nn.Parameter(torch.randn(config.latents + config.max_tokens, width) * 0.02)
        self.writer = _transformer(config)
        self.bias = nn.Parameter(torch.zeros(count))  # the output weights are the embedding's
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.t5 = FrozenT5(config.t5, width) if config.t5 else None

    @property
    def device(self) -> torch.device:
        return self.bias.device

    #############################################################################
    #                                  Reading                                  #
    #############################################################################

    def tokenize(self, texts: list[str]) -> Tensor:
        """(B, T) int64: tokens, the end mark, padding; a sentence over the limit is an error that shows it."""
        rows = [[*encoding.ids, EOS] for encoding in self.tokenizer.encode_batch(texts)]
        longest = max(map(len, rows))
        if longest > self.config.max_tokens:
            text = texts[[len(row) for row in rows].index(longest)]
            raise UserError(
                f"a sentence of {longest} tokens, the limit is {self.config.max_tokens}: {text[:50]!r}...; shorten it, "
                'set "longer": "skip" for its source, or train an autoencoder with a larger --max_tokens'
            )
        rows = [row + [PAD] * (longest - len(row)) for row in rows]
        return torch.tensor(rows, device=self.device)

    def encode(self, texts: list[str]) -> Tensor:
        """(B, K, 64), each latent of mean 0 and variance 1."""
        states, padding = self._states(texts)
        queries = self.queries.expand(len(texts), -1, -1)
        padding = torch.cat([torch.zeros(queries.shape[:2], dtype=torch.bool, device=self.device), padding], 1)
        read = self.reader(torch.cat([queries, states], 1), src_key_padding_mask=padding)
        latents = self.to_latents(read[:, : self.config.latents])
        return F.layer_norm(latents, latents.shape[-1:])

    def _states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """What the reader sees of the texts, (B, T, width), and which of it is padding, (B, T)."""
        if self.t5:
            return self.t5(texts, self.device)
        tokens = self.tokenize(texts)
        return self.tokens(tokens) + self.read_positions[: tokens.shape[1]], tokens == PAD

    #############################################################################
    #                                  Writing                                  #
    #############################################################################

    def logits(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """latents (B, K, 64), tokens (B, T) -> (B, T + 1, vocabulary): at i the token after i tokens."""
        start = torch.full((len(tokens), 1), BOS, device=tokens.device)
        h = torch.cat([self.from_latents(latents), self.tokens(torch.cat([start, tokens], 1))], 1)
        length, k = h.shape[1], self.config.latents
        hidden = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        hidden[:k, :k] = False  # the latents see each other, and no token
        h = self.writer(h + self.write_positions[:length], mask=hidden)[:, k:]
        return h @ self.tokens.weight.T + self.bias

    def cross_entropy(self, latents: Tensor, texts: list[str]) -> Tensor:
        """Of each next token given the latents and the tokens before it; the mean over all but the padding."""
        tokens = self.tokenize(texts)
        logits = self.logits(latents, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[str]:
        """(B, K, 64) -> texts, the likeliest token at a time, from the latents alone."""
        tokens = torch.empty(len(latents), 0, dtype=torch.int64, device=latents.device)
        ended = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        while tokens.shape[1] < self.config.max_tokens - 1 and not ended.all():
            following = self.logits(latents, tokens)[:, -1]
            following[:, [PAD, BOS]] = -torch.inf  # never a part of a sentence
            following = following.argmax(1).where(~ended, PAD)
            ended |= following == EOS
            tokens = torch.cat([tokens, following[:, None]], 1)
        return [text.strip() for text in self.tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=True)]


class FrozenT5(nn.Module):
    """texts -> a frozen T5 encoder's float32 states, projected to (B, T, width), and their padding (B, T).

    Its weights stay in their folder: a checkpoint keeps the folder's name, and of this module the projection alone.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            # transformers 5 keeps a file's BF16; the argument that says float32 has another name before 4.56.
            encoder = T5EncoderModel.from_pretrained(name).float().eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(f"--t5 {name}: no T5 can be loaded from there ({first_line(error)})") from None
        self.frozen = (tokenizer, encoder)  # in a tuple, so that its weights are none of this module's
        self.project = nn.Linear(encoder.config.d_model, width)

    def forward(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = self.frozen
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        with torch.no_grad():
            states = encoder.to(device)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return self.project(states.float()), batch.attention_mask == 0
