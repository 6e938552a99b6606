"""BLEU-4, chrF, ROUGE and METEOR of predicted sentences, each with a bootstrap interval. All figures are per cent.

bleu     corpus BLEU-4 by sacrebleu (tokenizer 13a; Papineni et al. 2002, Post, arXiv:1804.08771). Of references in a
         script without blanks, tokenizer zh or char; it is then named "BLEU-4 (zh)". Where no sentence has four words,
         of the n-grams that there are
chrf     corpus chrF2 by sacrebleu: of letters, so of any script (Popovic 2015)
rouge    ROUGE-1, -2 and -L F1 by rouge-score, without stemming, on words of any script: the mean over sentences (Lin
         2004). Of a reference of one word ROUGE-2 is ROUGE-1
meteor   nltk's METEOR (Banerjee & Lavie 2005), the mean over sentences; where nltk has no WordNet data it matches
         words and their stems, but no synonyms, and is named "METEOR (exact+stem)". Equal sentences have
         100 - 50 / (their words)^3, by its definition
"""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

METRICS = ("bleu", "chrf", "rouge", "meteor")
RESAMPLES = 1000
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Scripts that are written without blanks: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
UNSPACED = re.compile(f"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff{HAN}]")


@dataclass
class Score:
    """A figure in per cent, and the interval that holds it in 95 of 100 resamplings of the sentences; NaN: none."""

    value: float
    low: float
    high: float


#################################################################################
#                                     Words                                     #
#################################################################################


def bleu_tokenizer(references: list[str]) -> str:
    """sacrebleu's: 13a, or where any sentence is mostly of a script without blanks, zh (for Han alone) or char."""
    unspaced = [found for text in references if 2 * len(found := UNSPACED.findall(text)) > sum(map(str.isalpha, text))]
    if not unspaced:
        return "13a"
    return "zh" if re.fullmatch(f"[{HAN}]*", "".join(map("".join, unspaced))) else "char"


class Words:
    """The tokenizer of ROUGE: lower-case words of any script, and each letter of one without blanks.

    rouge-score's own knows a to z alone. Where there is no word at all (symbols), every sign is one.
    """

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).lower()
        # Letters, marks and numbers: marks are vowels in Hindi and in Thai.
        words = "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text)
        return apart(words).split() or list("".join(text.split()))


def apart(text: str) -> str:
    """Blanks around each letter of a script that has none."""
    return UNSPACED.sub(r" \g<0> ", text)


#################################################################################
#                                    Figures                                    #
#################################################################################


def score(references: list[str], predictions: list[str], metrics: list[str], seed: int = 0) -> dict[str, Score]:
    """{"BLEU-4": Score, ...} of sentence pairs, in the order of METRICS."""
    scores: dict[str, Score] = {}
    if "bleu" in metrics:
        tokenizer = bleu_tokenizer(references)
        name = "BLEU-4" if tokenizer == "13a" else f"BLEU-4 ({tokenizer})"
        scores[name] = _bleu(references, predictions, tokenizer, seed)
    if "chrf" in metrics:
        scores["chrF"] = _chrf(references, predictions, seed)
    pairs = list(zip(references, predictions, strict=True))
    if "rouge" in metrics:
        rows = np.array([rouge(*pair) for pair in pairs])
        for name, column in zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), rows.T, strict=True):
            scores[name] = _mean(column, seed)
    if "meteor" in metrics:
        name, meteor = meteor_function()
        scores[name] = _mean([meteor(*pair) for pair in pairs], seed)
    return scores


def rouge(reference: str, text: str) -> tuple[float, float, float]:
    """ROUGE-1, -2 and -L F1 in [0, 1] of one sentence; a word counts as often as both have it."""
    from rouge_score.rouge_scorer import RougeScorer

    words = Words()
    found = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=words).score(reference, text)
    one, two, longest = (each.fmeasure for each in found.values())
    return one, two if len(words.tokenize(reference)) > 1 else one, longest


def resamples(count: int, seed: int) -> np.ndarray:
    """(RESAMPLES, count) indices of sentences, drawn with replacement."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _resampled(rows: np.ndarray, of: Callable[[np.ndarray], float], seed: int) -> Score:
    """What `of` makes of the sentences' rows (N, k) added up, and of resampled ones; few sentences have no interval."""
    from isonext.evaluation.intervals import FEWEST, percentiles

    if len(rows) < FEWEST:
        return Score(of(rows.sum(0)), math.nan, math.nan)
    drawn = [of(rows[index].sum(0)) for index in resamples(len(rows), seed)]
    low, high = np.percentile(drawn, 100 * np.array(percentiles(len(rows))))
    return Score(of(rows.sum(0)), float(low), float(high))


def _mean(values: list[float] | np.ndarray, seed: int) -> Score:
    rows = 100 * np.array(values)[:, None]
    return _resampled(rows, lambda total: float(total[0]) / len(rows), seed)


def _bleu(references: list[str], predictions: list[str], tokenizer: str, seed: int) -> Score:
    """Corpus BLEU; a resampling adds up other sentences' counts of matching n-grams, which are kept by sentence."""
    from sacrebleu.metrics import BLEU

    bleu, rows = BLEU(tokenize=tokenizer), []
    for reference, prediction in zip(references, predictions, strict=True):
        one = bleu.corpus_score([prediction], [[reference]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])

    def of(sums: np.ndarray) -> float:
        counts = [int(number) for number in sums]
        lengths = {"sys_len": counts[8], "ref_len": counts[9]}
        return BLEU.compute_bleu(counts[:4], counts[4:8], **lengths, smooth_method="exp", effective_order=True).score

    return _resampled(np.array(rows), of, seed)


def _chrf(references: list[str], predictions: list[str], seed: int) -> Score:
    """Corpus chrF, from the sentences' counts of matching n-grams of letters."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    rows = np.array(chrf._extract_corpus_statistics(predictions, [references]))
    return _resampled(rows, chrf._compute_f_score, seed)


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
    return name, lambda reference, text: single_meteor_score(
        apart(reference).split(), apart(text).split(), wordnet=words
    )
