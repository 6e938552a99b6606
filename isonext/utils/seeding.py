"""Randomness that is a function of numbers alone, so that a resume has nothing to store."""

import numpy as np
import torch


def seeded(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator of its own for every (seed, stream, number): nothing to store, nothing to fast-forward."""
    words = np.random.SeedSequence([seed, *stream.encode(), number]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
