"""examples/text: the grammar, the sources of sentences, and how they are got."""

import itertools
import json
import math
import sys
import types

import pytest

import download_data
from isonext.errors import UserError
from textflow import grammar
from textflow.data import load_corpora, read_data_config
from textflow.records import texts_of

#################################################################################
#                                  The grammar                                  #
#################################################################################


def test_grammar_has_the_size_it_promises():
    assert grammar.COUNT >= 1e5
    assert 140 <= len(grammar.vocabulary()) <= 160
    # One shape by hand: 3 determiners, 6 sizes, 3 things, 4 verbs, 5 prepositions, 2 articles, 6 materials, 3 places.
    assert len(list(grammar.all_sentences(grammar.SHAPES[0][1]))) == 3 * 6 * 3 * 4 * 5 * 2 * 6 * 3


def test_sentences_are_numbered_without_gap_or_double():
    first = list(itertools.islice(grammar.all_sentences(grammar.SHAPES[0][1]), 2000))
    assert [grammar.sentence(number) for number in range(len(first))] == first
    assert grammar.sentence(math.prod(map(len, grammar.SHAPES[0][1]))) == next(
        iter(grammar.all_sentences(grammar.SHAPES[1][1]))
    )
    assert grammar.sentence(grammar.COUNT - 1) == "some heavy orange children never wander across an empty window"
    with pytest.raises(IndexError):
        grammar.sentence(grammar.COUNT)
    for (_, a), (_, b) in itertools.combinations(grammar.SHAPES, 2):  # some slot tells any two shapes apart
        assert len(a) != len(b) or any(set(x).isdisjoint(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("a small red cup lies under the wooden table", "kitchen"),
        ("an orange ball lies under a stone desk", "school"),
        ("two tiny mice slowly walk past an empty oven", "kitchen"),
        ("a orange ball lies under a stone desk", None),  # an orange ball
        ("an red ball lies under a stone desk", None),
        ("two small balls lies under the wooden desk", None),  # number
        ("a small ball slowly walks past the wooden desk", None),  # a ball does not walk
        ("a small ball lies into the wooden desk", None),  # what lies goes nowhere
        ("a small ball lies under the wooden table", None),  # a ball of the school, a table of the kitchen
        ("a small red red cup lies under the wooden table", None),
        ("a small red cup lies under the wooden", None),
        ("A small red cup lies under the wooden table", None),
        ("a small red cup  lies under the wooden table", None),
        ("", None),
    ],
)
def test_grammaticality_is_exact(text, topic):
    assert grammar.topic_of(text) == topic
    assert grammar.is_grammatical(text) == (topic is not None)


def test_sample_is_of_the_grammar_without_double_and_of_its_seed():
    texts = grammar.sample(500, seed=1)
    assert len(set(texts)) == 500 and all(map(grammar.is_grammatical, texts))
    assert texts == grammar.sample(500, seed=1) != grammar.sample(500, seed=2)
    assert {grammar.topic_of(text) for text in texts} == set(grammar.TOPICS)


#################################################################################
#                              Records and sources                              #
#################################################################################


@pytest.mark.parametrize(
    ("dataset", "record", "texts"),
    [
        ("plain", {"text": "  a   b\n"}, ["a b"]),
        ("wikitext", {"text": " = Robert <unk> = \n"}, []),
        ("wikitext", {"text": ""}, []),
        (
            "wikitext",
            {"text": " It was well @-@ known , with 1 @,@ 000 people . He left . \n"},
            ["It was well-known, with 1,000 people.", "He left."],
        ),
        ("coco", {"caption": "A cat."}, ["A cat."]),
        ("coco", {"sentences_raw": ["A cat.", "A dog."]}, ["A cat.", "A dog."]),
        ("coco", {"sentences": {"raw": "A cat.", "tokens": ["a", "cat"]}}, ["A cat."]),
        ("coco", {"sentences": [{"raw": "A cat."}, {"raw": "A dog."}]}, ["A cat.", "A dog."]),
        ("audiocaps", {"audiocap_id": 1, "caption": "Rain falls"}, ["Rain falls"]),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "a dog"}]},
            ["a dog"],
        ),
        ("llava", {"conversations": {"from": ["human", "gpt"], "value": ["What?", "<image> a dog"]}}, ["a dog"]),
        ("llava", {"messages": [{"role": "assistant", "content": "a dog"}]}, ["a dog"]),
    ],
)
def test_where_each_data_set_keeps_its_text(dataset, record, texts):
    assert texts_of(record, dataset, None, "here") == texts


def test_unknown_field_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"here: no field 'caption'; the record has: id, titel"):
        texts_of({"id": 1, "titel": "x"}, "audiocaps", None, "here")
    with pytest.raises(UserError, match=r"here: a text was expected, not 7"):
        texts_of({"text": 7}, "plain", None, "here")


def write_config(folder, *sources, **extra):
    path = folder / "data.json"
    path.write_text(json.dumps({"sources": list(sources)} | extra))
    return path


def corpora(folder, *sources, **extra):
    return load_corpora(read_data_config(write_config(folder, *sources, **extra)))


def test_text_and_json_lines_become_classes_and_splits(tmp_path):
    (tmp_path / "news.txt").write_text("\n\n".join(f"line {n}" for n in range(40)) + "\nline 1\n")
    rows = [{"caption": f"caption {n}", "kind": "cat" if n % 2 else "dog"} for n in range(10)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "v.jsonl").write_text(json.dumps(rows[3]) + "\n")
    train, val = corpora(
        tmp_path,
        {"type": "text", "path": "news.txt"},
        {"type": "jsonl", "path": "c.jsonl", "dataset": "coco", "label_field": "kind", "val_path": "v.jsonl"},
        val_fraction=0.2,
    )
    assert train.classes == val.classes == ["cat", "dog", "news"]
    assert set(train.texts).isdisjoint(val.texts)
    assert set(train.texts) | set(val.texts) == {f"line {n}" for n in range(40)} | {row["caption"] for row in rows}
    assert train.counts == [len(train) - 9, 9] and val.counts[1] == 1 and val.texts[-1] == "caption 3"
    assert train.styles[-9:].tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 0]  # dog 0, cat 1, dog 2, then 4 to 9
    assert 2 <= val.counts[0] <= 15


def test_weights_say_how_often_a_source_is_drawn_and_draws_repeat(tmp_path):
    for name, count in (("few", 5), ("many", 500), ("none", 5)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {n}" for n in range(count)))
    sources = [
        {"type": "text", "path": f"{name}.txt", "weight": w} for name, w in (("few", 3), ("many", 1), ("none", 0))
    ]
    train, _ = corpora(tmp_path, *sources, val_fraction=0)
    texts, styles, _ = train.draw(4000, seed=0, step=0)
    drawn = [sum(text.startswith(name) for text in texts) / 4000 for name in ("few", "many", "none")]
    assert drawn == pytest.approx([0.75, 0.25, 0], abs=0.03) and drawn[2] == 0
    assert [train.classes[style] for style in styles] == [text.split()[0] for text in texts]
    assert {text for text in texts if text.startswith("few")} == {f"few {n}" for n in range(5)}
    assert train.draw(10, 0, 7)[0] == train.draw(10, 0, 7)[0] != train.draw(10, 0, 8)[0]
    part = train.part(100)
    assert part.texts == train.part(100).texts and len(part) == 100 == sum(part.counts)
    assert all(text in train.texts for text in part.texts)


def test_grammar_source_is_labelled_by_topic_and_split(tmp_path):
    train, val = corpora(tmp_path, {"type": "grammar", "sentences": 400}, val_fraction=0.1)
    assert len(train) + len(val) == 400 and 20 <= len(val) <= 60
    assert not set(train.texts) & set(val.texts)
    assert all(train.classes[s] == grammar.topic_of(t) for t, s in zip(train.texts, train.styles, strict=True))


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = {
        "train": datasets.Dataset.from_list(
            [{"conversations": [{"from": "gpt", "value": f"a {n}"}]} for n in range(3)]
        ),
        "validation": datasets.Dataset.from_list([{"conversations": [{"from": "gpt", "value": "held"}]}]),
    }
    datasets.DatasetDict(split).save_to_disk(tmp_path / "llava")
    train, val = corpora(tmp_path, {"type": "datasets", "path": "llava", "dataset": "llava"})
    assert train.texts == ["a 0", "a 1", "a 2"] and val.texts == ["held"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="save_to_disk"):
        corpora(tmp_path, {"type": "datasets", "path": "empty"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "csv"}, "needs a 'type', one of grammar, text"),
        ({"type": "text"}, "needs a 'path'"),
        ({"type": "text", "path": "missing.txt"}, r"missing.txt: no such file"),
        ({"type": "text", "path": "bad.txt"}, r"bad.txt: line 2 is not UTF-8 text"),
        ({"type": "text", "path": "empty.txt"}, "no sentence is left"),
        ({"type": "jsonl", "path": "bad.jsonl"}, r"bad.jsonl: line 2: not valid JSON"),
        ({"type": "jsonl", "path": "list.jsonl"}, r"list.jsonl: line 1: an object"),
        ({"type": "jsonl", "path": "good.jsonl", "field": "txt"}, r"line 1: no field 'txt'; the record has: text"),
        ({"type": "jsonl", "path": "good.jsonl", "label_field": "topic"}, "no field 'topic'"),
        ({"type": "jsonl", "path": "good.jsonl", "dataset": "imagenet"}, "dataset 'imagenet' is not one of plain"),
        ({"type": "jsonl", "path": "good.jsonl", "wieght": 2}, "unknown key wieght; did you mean weight"),
        ({"type": "jsonl", "path": "good.jsonl", "weight": -1}, "weight = -1: must be a number, 0 or more"),
        ({"type": "jsonl", "path": "good.jsonl", "weight": 0}, "all weights of the sources are 0"),
        ({"type": "grammar", "longer": "cut"}, "must be error or skip"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, source, message):
    (tmp_path / "bad.txt").write_bytes(b"good\nb\xe4d\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=message) as error:
        corpora(tmp_path, source)
    assert "\n" not in str(error.value)


def test_bad_data_configs_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such data config"):
        read_data_config(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_data_config(tmp_path / "broken.json")
    with pytest.raises(UserError, match="at least one"):
        read_data_config(write_config(tmp_path))
    with pytest.raises(UserError, match="val_fraction"):
        read_data_config(write_config(tmp_path, {"type": "grammar"}, val_fraction=2))


#################################################################################
#                               download_data.py                                #
#################################################################################


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` package: a dict of repositories; one that is not in it is out of reach."""
    repos, calls = {}, []

    def load_dataset(repo, config=None, split=None, streaming=False, data_files=None):
        calls.append((repo, config, split, streaming, data_files))
        if repo not in repos:
            raise ConnectionError(f"Couldn't reach '{repo}' on the Hub\nwith a second line")
        return iter(repos[repo][split])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return repos, calls


def download(*flags):
    download_data.main(download_data.build_parser().parse_args(list(map(str, flags))))


def test_download_writes_text_and_a_data_config_that_reads_back(hub, tmp_path):
    repos, calls = hub
    repos["jxie/coco_captions"] = {
        "train": [{"image": b"", "caption": f"cat {n}"} for n in range(50)],
        "validation": [{"image": b"", "caption": "a held dog"}],
    }
    repos["liuhaotian/LLaVA-CC3M-Pretrain-595K"] = {
        "train": [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "an élan"}]}]
    }
    download("--coco", "--llava-cc3m", "--streaming", "--max-samples", 10, "--data-root", tmp_path)
    assert calls[0] == ("jxie/coco_captions", None, "train", True, None) and calls[-1][-1] == "chat.json"
    train, val = load_corpora(read_data_config(tmp_path / "data_config.json"))
    assert train.texts == [f"cat {n}" for n in range(10)] + ["an élan"] and val.texts[0] == "a held dog"
    assert train.classes == ["coco", "llava-cc3m"] and train.longer == ["skip", "skip"]
    download("--coco", "--subset-fraction", 0.3, "--data-root", tmp_path / "part")
    lines = (tmp_path / "part/coco/train.jsonl").read_text().splitlines()
    assert 5 <= len(lines) <= 25


def test_hub_out_of_reach_is_one_line_and_leaves_no_file(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(UserError, match=r"wikitext: could not be had from https://mirror.example") as error:
        download("--wikitext", "--data-root", tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.jsonl*"))


def test_download_flags_are_checked_before_any_work(tmp_path, monkeypatch):
    for flags, message in (
        ([], "nothing to get"),
        (["--coco", "--subset-fraction", 0], "above 0"),
        (["--coco", "--max-samples", 0], "1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            download(*flags)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/text\.txt"):
        download("--coco", "--data-root", tmp_path)
