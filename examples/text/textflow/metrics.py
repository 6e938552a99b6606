"""BLEU-4, ROUGE and METEOR of predicted sentences, each with a bootstrap interval. All figures are per cent.

bleu     corpus BLEU-4 by sacrebleu (tokenizer 13a; Papineni et al. 2002, Post, arXiv:1804.08771)
rouge    ROUGE-1, -2 and -L F1 by rouge-score, without stemming: the mean over sentences (Lin 2004)
meteor   nltk's METEOR (Banerjee & Lavie 2005), the mean over sentences; where nltk has no WordNet data it matches
         words and their stems, but no synonyms, and is named "METEOR (exact+stem)"
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

METRICS = ("bleu", "rouge", "meteor")
RESAMPLES = 1000


@dataclass
class Score:
    """A figure in per cent, and the interval that holds it in 95 of 100 resamplings of the sentences."""

    value: float
    low: float
    high: float


def score(references: list[str], predictions: list[str], metrics: list[str], seed: int = 0) -> dict[str, Score]:
    """{"BLEU-4": Score, ...} of sentence pairs, in the order of METRICS."""
    scores: dict[str, Score] = {}
    if "bleu" in metrics:
        scores["BLEU-4"] = _bleu(references, predictions, seed)
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
        scorer = RougeScorer(list(kinds))
        found = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
        for kind, name in kinds.items():
            scores[name] = _mean([each[kind].fmeasure for each in found], seed)
    if "meteor" in metrics:
        name, meteor = meteor_function()
        scores[name] = _mean([meteor(*pair) for pair in zip(references, predictions, strict=True)], seed)
    return scores


def resamples(count: int, seed: int) -> np.ndarray:
    """(RESAMPLES, count) indices of sentences, drawn with replacement."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _mean(values: list[float], seed: int) -> Score:
    values = 100 * np.array(values)
    low, high = np.percentile(values[resamples(len(values), seed)].mean(1), [2.5, 97.5])
    return Score(float(values.mean()), float(low), float(high))


def _bleu(references: list[str], predictions: list[str], seed: int) -> Score:
    """Corpus BLEU; a resampling adds up other sentences' counts of matching n-grams, which are kept by sentence."""
    from sacrebleu.metrics import BLEU

    bleu, rows = BLEU(), []
    for reference, prediction in zip(references, predictions, strict=True):
        one = bleu.corpus_score([prediction], [[reference]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    rows = np.array(rows)

    def of(sums: np.ndarray) -> float:
        counts = [int(number) for number in sums]
        return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score

    low, high = np.percentile([of(rows[index].sum(0)) for index in resamples(len(rows), seed)], [2.5, 97.5])
    return Score(of(rows.sum(0)), float(low), float(high))


class NoWordNet:
    """Stands for WordNet where its data are missing: no word has a synonym."""

    def synsets(self, word: str) -> list:
        return []


def meteor_function() -> tuple[str, Callable[[str, str], float]]:
    """The name, and (reference, prediction) -> METEOR in [0, 1]."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
        name, words = "METEOR", wordnet
    except LookupError:
        name, words = "METEOR (exact+stem)", NoWordNet()
    return name, lambda reference, text: single_meteor_score(reference.split(), text.split(), wordnet=words)
