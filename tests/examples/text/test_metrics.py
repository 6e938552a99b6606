"""examples/text: BLEU, ROUGE and METEOR against hands, their intervals, and eval_text.py."""

import json
import math
import subprocess
import sys
import types

import pytest

import eval_text
from helpers import ROOT, refused
from isonext.utils import cli
from textflow import experiment, metrics
from textflow.metrics import meteor_function, score

PAIR = ("the cat sat on the mat", "the cat sat on a mat")


def test_bleu_of_one_pair_by_hand():
    # n-grams of the prediction found in the reference: 5 of 6, 3 of 5, 2 of 4, 1 of 3; equal lengths, no penalty.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score([PAIR[0]], [PAIR[1]], ["bleu"])["BLEU-4"].value == pytest.approx(expected)


def test_bleu_of_a_corpus_adds_up_counts_and_punishes_brevity():
    # The second prediction: 5, 4, 3, 2 matches of as many; 5 words for 7. In all 11 words for 13.
    references, predictions = [PAIR[0], "one two three four five six seven"], [PAIR[1], "one two three four five"]
    precision = (10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25
    expected = 100 * math.exp(1 - 13 / 11) * precision
    assert score(references, predictions, ["bleu"])["BLEU-4"].value == pytest.approx(expected)


def test_rouge_by_hand():
    scores = score([PAIR[0]], [PAIR[1]], ["rouge"])
    assert list(scores) == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    # 5 of 6 words both ways, 3 of 5 pairs both ways, longest common subsequence "the cat sat on mat".
    assert [each.value for each in scores.values()] == pytest.approx([500 / 6, 60, 500 / 6])
    longer = score(["a b c d"], ["d a b"], ["rouge"])  # precision 3/3, recall 3/4; pairs: 1/2 and 1/3; "a b": 2/3, 2/4
    assert [each.value for each in longer.values()] == pytest.approx([600 / 7, 40, 400 / 7])


def test_words_count_as_often_as_both_have_them():
    """A family of figures on sets of words gives repetition full marks."""
    scores = score(["the cat"], ["the the the cat cat"], ["bleu", "rouge"])
    # Of 5 words 2 are found, of the 2 words both: F1 = 2 * 2 / (5 + 2). Pairs: 1 of 4 and 1 of 1. BLEU: 2/5 1/4, then
    # no triple (a half of 1/3) and no quadruple (a quarter of 1/2).
    assert scores["ROUGE-1"].value == scores["ROUGE-L"].value == pytest.approx(400 / 7)
    assert scores["ROUGE-2"].value == pytest.approx(100 * 2 * 1 / (4 + 1))
    assert scores["BLEU-4"].value == pytest.approx(100 * (2 / 5 * 1 / 4 * 1 / 6 * 1 / 8) ** 0.25)
    once, twice = (
        score(["so it goes on"], [text], ["rouge"]) for text in ("so it goes on", "so it goes on so it goes on")
    )
    for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert once[name].value == 100 and twice[name].value < 67, name


@pytest.mark.parametrize(
    ("texts", "bleu"),
    [
        (["今天天气很好我们去公园玩", "他在北京大学学习计算机科学"], "BLEU-4 (zh)"),
        (["今日は天気がいいです", "公園へ行きましょう"], "BLEU-4 (char)"),
        (["วันนี้อากาศดีมาก", "เราไปสวนสาธารณะ"], "BLEU-4 (char)"),
        (["Сегодня хорошая погода, идём гулять", "Он учится в университете"], "BLEU-4"),
        (["오늘은 날씨가 아주 좋습니다", "우리는 공원에 가서 놉니다"], "BLEU-4"),
        (["आज मौसम बहुत अच्छा है", "हम पार्क में खेलने जाते हैं"], "BLEU-4"),
        (["الطقس جميل جدا اليوم", "نحن ذاهبون الى الحديقة"], "BLEU-4"),
        (["dogs bark loudly", "cats sleep here"], "BLEU-4"),  # three words each
        (["two words", "and three here"], "BLEU-4"),
        (["yes", "no"], "BLEU-4"),
        (["!?", "...!"], "BLEU-4"),
    ],
)
def test_equal_sentences_score_full_in_every_script_and_at_every_length(texts, bleu):
    scores = score(texts, texts, ["bleu", "chrf", "rouge"])
    assert list(scores) == [bleu, "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert [each.value for each in scores.values()] == pytest.approx([100] * 5)
    other = score(texts, texts[::-1], ["bleu", "chrf", "rouge"])
    assert all(each.value < 60 for each in other.values())


def test_words_of_other_scripts_by_hand():
    words = metrics.Words().tokenize
    assert words("Привет, МИР! don't 3.5 café") == ["привет", "мир", "don", "t", "3", "5", "café"]
    assert words("我爱 Python3。") == ["我", "爱", "python3"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # whose vowels are marks
    assert words("e\u0301te\u0301") == words("\u00e9t\u00e9") == ["\u00e9t\u00e9"]
    assert words(" ?! ") == ["?", "!"] and words(" ") == []
    # Four letters of five, in order; three of four pairs are two of four: 今天|天很|很好 in 今天|天气|气很|很好.
    found = score(["今天气很好"], ["今天很好"], ["rouge"])
    assert [each.value for each in found.values()] == pytest.approx([800 / 9, 400 / 7, 800 / 9])


def test_bleu_of_chinese_by_hand():
    # Letters of the prediction found: 5 of 6; pairs 3 of 5, triples 2 of 4, quadruples 1 of 3; equal lengths.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score(["我们去公园玩"], ["我们去公车玩"], ["bleu"])["BLEU-4 (zh)"].value == pytest.approx(expected)


def test_a_chinese_name_in_an_english_sentence_changes_no_tokenizer():
    assert metrics.bleu_tokenizer(["The city of 北京 is large", "plain words"]) == "13a"
    assert metrics.bleu_tokenizer(["The city of 北京 is large", "他在北京"]) == "zh"
    assert metrics.bleu_tokenizer(["他在北京", "きれい"]) == "char"


def test_chrf_is_sacrebleus():
    from sacrebleu.metrics import CHRF

    references, predictions = [PAIR[0], "one two three four five six seven"], [PAIR[1], "one two three four five"]
    found = score(references, predictions, ["chrf"])["chrF"].value
    assert found == pytest.approx(CHRF().corpus_score(predictions, [references]).score) and 60 < found < 90


class WordNet:
    """A stand-in for nltk's: it has no data, or knows one synonym. nltk asks a synset for its lemmas' names."""

    def __init__(self, has_data):
        self.has_data = has_data

    def ensure_loaded(self):
        if not self.has_data:
            raise LookupError

    def synsets(self, word):
        lemma = types.SimpleNamespace(name=lambda: "cat")
        return [types.SimpleNamespace(lemmas=lambda: [lemma])] if word == "tom" else []


@pytest.fixture
def without_wordnet(monkeypatch):
    monkeypatch.setattr("nltk.corpus.wordnet", WordNet(False))


def test_meteor_without_wordnet_matches_words_and_stems_and_says_so(without_wordnet):
    name, meteor = meteor_function()
    assert name == "METEOR (exact+stem)"
    # 4 of 5 words match in 2 chunks: F = P R / (0.9 P + 0.1 R) = 4/5, penalty 0.5 (2/4)^3.
    assert meteor("one cat sat on mats", "one cat lay on mats") == pytest.approx(4 / 5 * (1 - 0.5 * (2 / 4) ** 3))
    # "cats" has the stem of "cat": 3 of 3 in one chunk; "tom" is a synonym that only WordNet knows.
    assert meteor("the cat sat", "the cats sat") == pytest.approx(1 - 0.5 / 27)
    assert meteor("the cat sat", "the tom sat") == pytest.approx(2 / 3 * (1 - 0.5 * (2 / 2) ** 3))
    assert meteor("我们去公园", "我们去公园") == pytest.approx(1 - 0.5 / 5**3)  # five words, and not one


def test_meteor_with_wordnet_knows_synonyms(monkeypatch):
    monkeypatch.setattr("nltk.corpus.wordnet", WordNet(True))
    name, meteor = meteor_function()
    assert name == "METEOR" and meteor("the cat sat", "the tom sat") == pytest.approx(1 - 0.5 / 27)


def test_equal_sentences_score_full_and_shuffled_references_low(without_wordnet):
    texts = [f"sentence {n} says {n * n} and {n + 7} here" for n in range(20)]
    same, shuffled = (score(texts, other, metrics.METRICS) for other in (texts, texts[1:] + texts[:1]))
    assert list(same) == ["BLEU-4", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L", "METEOR (exact+stem)"]
    for name in ("BLEU-4", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert (same[name].value, same[name].low, same[name].high) == pytest.approx((100, 100, 100))
    assert shuffled["BLEU-4"].value < 20 < shuffled["ROUGE-L"].value < 75


def test_interval_is_that_of_resampling():
    # Half the pairs score 100, half 0: of 400 the mean's deviation is 50 / sqrt(400) = 2.5.
    references = ["a b c d"] * 400
    found = score(references, ["a b c d"] * 200 + ["w x y z"] * 200, ["rouge"])["ROUGE-L"]
    assert found.value == 50
    assert (found.low, found.high) == pytest.approx((50 - 1.96 * 2.5, 50 + 1.96 * 2.5), abs=0.7)
    assert found == score(references, ["a b c d"] * 200 + ["w x y z"] * 200, ["rouge"])["ROUGE-L"]
    bleu = score(references, ["a b c d"] * 200 + ["w x y z"] * 200, ["bleu"])["BLEU-4"]
    assert bleu.value == pytest.approx(50) and (bleu.low, bleu.high) == pytest.approx((45, 55), abs=1)


def test_one_seed_tells_of_no_deviation():
    rows = [{"BLEU-4": 66.0}, {"BLEU-4": 67.0}, {"BLEU-4": 71.0}]
    assert experiment._spread(rows, "BLEU-4") == "68.0 ± 2.6"
    assert experiment._spread(rows[:1], "BLEU-4") == "66.0"


#################################################################################
#                                 eval_text.py                                  #
#################################################################################


def write(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run eval_text.py without a new process: returns (status, stdout, stderr)."""

    def outcome(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval_text.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(eval_text.main, eval_text.build_parser())
        return ended.value.code, *capsys.readouterr()

    return outcome


def entries_of(*pairs):
    return [{"id": n, "reference": a, "prediction": b} for n, (a, b) in enumerate(pairs)]


def test_several_files_make_one_table_and_one_json(tmp_path, evaluate, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.json", entries_of(("a b c d e", "a b c d e")))
    write(tmp_path / "bad.json", entries_of(("a b c d e", "a b c d f")))
    flags = ("--metrics", "bleu", "rouge", "--output_json", "results.json")
    status, out, err = evaluate("--predictions", "good.json", "bad.json", *flags)
    assert status == 0, err
    head, good, bad = out.splitlines()
    assert head.split() == ["BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert good.startswith("good.json") and "100.00 [no interval]" in good  # one sentence tells nothing of others
    assert bad.startswith("bad.json") and "80.00 [no interval]" in bad
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["bad.json"]["ROUGE-1"]["low"] is results["bad.json"]["BLEU-4"]["high"] is None
    assert results["bad.json"]["sentences"] == 1 and results["bad.json"]["ROUGE-1"]["value"] == pytest.approx(80)
    assert results["bad.json"]["BLEU-4"]["value"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_files_of_several_scripts_have_a_column_each(tmp_path, evaluate):
    english = write(tmp_path / "en.json", entries_of(*[("a b c d e", "a b c d e")] * 5))
    chinese = write(tmp_path / "zh.json", entries_of(*[("我们去公园玩", "我们去公园玩")] * 5))
    status, out, err = evaluate("--predictions", english, chinese, "--metrics", "bleu")
    head, one, other = out.splitlines()
    assert status == 0 and head.split() == ["BLEU-4", "BLEU-4", "(zh)"], err
    assert one.endswith("100.00 [100.0, 100.0]  -") and other.endswith("-                      100.00 [100.0, 100.0]")


def test_bad_predictions_are_one_line(tmp_path, evaluate):
    path = tmp_path / "p.json"
    for entries, words in (
        ([], ["p.json", "holds no predictions"]),
        ({"id": 0}, ["are a list"]),
        ([{"id": 0, "reference": "a"}], ["entry 0 has no prediction"]),
        ([{"id": 0, "reference": None, "prediction": "a"}], ["entry 0 has no reference", "--mode sample"]),
        (entries_of(("a", " ")), ["all its predictions are empty"]),
    ):
        write(path, entries)
        refused(evaluate("--predictions", path), *words)
    write(path, entries_of(("a", "a")))
    refused(evaluate("--predictions", path, "--metrics", "bleu", "bertscore"), "bertscore", "bleu, chrf, rouge, meteor")
    refused(evaluate("--predictions", tmp_path / "none.json"), "none.json", "no such file")
    path.write_bytes(b'[{"id": 0,\n"reference": "\xe4"}]')
    refused(evaluate("--predictions", path), "line 2 is not UTF-8")
    path.write_text("[")
    refused(evaluate("--predictions", path), "not valid JSON")


def test_help_is_instant():
    """No command of examples/text loads torch before it has read its flags."""
    for script in sorted((ROOT / "examples/text").glob("*.py")):
        if "def build_parser" in script.read_text(encoding="utf-8"):
            code = f"import sys, runpy; sys.path.insert(0, {str(script.parent)!r}); runpy.run_path({str(script)!r}); "
            code += "sys.exit('torch' in sys.modules)"
            assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0, script
