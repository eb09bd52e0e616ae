import json
import pickle
from collections import Counter

import pytest

from tests.data.files_support import SHARED, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

GLUE_TRAIN = ("index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label")


def pair(label, first="a dog runs", second="an animal moves", number="1"):
    return {"gold_label": label, "sentence1": first, "sentence2": second, "pairID": number}


def write_lines(folder, *records, name="a.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")


def write_table(folder, header, *rows, name="a.tsv"):
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))


def opened(folder, path="a.*", stream="text"):
    return open_source(folder, stream, source="nli", path=path)


def test_json_lines(tmp_path):
    write_lines(tmp_path, pair("entailment"), pair("neutral", "one", "two", "9n"), pair("contradiction"))
    source = opened(tmp_path)
    assert isinstance(source, LabelledSource)
    example = source[1]
    assert (example.name, example.text, example.second_text) == ("a.jsonl:2", "one", "two")
    assert dict(example.facts) == {"label": "neutral", "id": "9n"}
    assert (example.image, example.image_id) == (None, -1)
    assert [e.facts["label"] for e in source.records()] == ["entailment", "neutral", "contradiction"]
    assert list(source.texts())[2:4] == ["one", "two"]
    assert pickle.loads(pickle.dumps(source))[1] == example
    with pytest.raises(IndexError):
        source[3]


def test_pairs_without_a_majority_are_no_part_of_it(tmp_path):
    write_lines(tmp_path, pair("-"), pair("entailment"), pair("-"))
    write_table(tmp_path, ("sentence1", "sentence2", "label"), ("a", "b", "-"), ("c", "d", "neutral"))
    source = opened(tmp_path)
    assert [source[i].name for i in range(len(source))] == ["a.jsonl:2", "a.tsv:3"]
    assert source.blocks == [1, 1]
    write_lines(tmp_path, pair("-"), name="b.jsonl")
    with pytest.raises(DataError, match=r"no examples: .*b.jsonl"):
        opened(tmp_path, "b.jsonl")


def test_glue_tables(tmp_path):
    row = ("7", "31193", "31193n", "government", 'He said "no', "It is 'so\" ", "neutral", "entailment")
    write_table(tmp_path, GLUE_TRAIN, row)
    example = opened(tmp_path)[0]
    assert (example.name, example.text, example.second_text) == ("a.tsv:2", 'He said "no', "It is 'so\" ")
    assert dict(example.facts) == {"label": "entailment", "id": "7"}


def test_test_sets_have_no_label(tmp_path):
    write_table(tmp_path, ("index", "sentence1", "sentence2"), ("0", "a", "b"))
    write_lines(tmp_path, pair("hidden"), {"sentence1": "a", "sentence2": "b"})
    source = opened(tmp_path)
    assert [dict(source[i].facts) for i in range(3)] == [{"id": "1"}, {}, {"id": "0"}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (pair("maybe"), "the label must be one of entailment, neutral, contradiction, not 'maybe'"),
        (pair("NEUTRAL"), "not 'NEUTRAL'"),
        (pair(0), "not 0"),
        (pair("neutral", first=""), "'sentence1' is empty"),
        (pair("neutral", second=3), "'sentence2' must hold strings, not a number"),
        ({"gold_label": "neutral", "premise": "x"}, "has no field 'sentence1'; its fields: gold_label, premise"),
        ("{", "is no JSON"),
    ],
)
def test_a_broken_line_is_one_example_that_raises(tmp_path, record, reason):
    write_lines(tmp_path, pair("neutral"), record, pair("entailment"))
    source = opened(tmp_path)
    assert len(source) == 3
    with pytest.raises(DataError, match=f"^a.jsonl:2: .*{reason}"):
        source[1]
    assert [e.name for e in source.records()] == ["a.jsonl:1", "a.jsonl:3"]
    assert len(list(source.texts())) == 4


def test_a_row_of_another_length(tmp_path):
    header = ("sentence1", "sentence2", "label")
    write_table(tmp_path, header, ("a", "b", "neutral"), ("a", "b"), ("a", "b", "wrong"))
    source = opened(tmp_path)
    with pytest.raises(DataError, match=r"^a.tsv:3: has 2 fields between tabs, but the header has 3"):
        source[1]
    with pytest.raises(DataError, match=r"^a.tsv:4: .*not 'wrong'"):
        source[2]


def test_files_that_are_none_of_these(tmp_path):
    write_table(tmp_path, ("sentence1", "gold_label"), ("a", "neutral"))
    with pytest.raises(DataError, match=r"^a.tsv:1: has no column 'sentence2'; its columns: sentence1, gold_label"):
        opened(tmp_path)
    (tmp_path / "a.tsv").write_text("")
    with pytest.raises(DataError, match=r"^a.tsv: is empty"):
        opened(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"^a.csv: an nli source reads files that end in .jsonl or .tsv"):
        opened(tmp_path, "a.csv")
    with pytest.raises(DataError, match="nli source has no examples for the pair stream; name it under 'text'"):
        opened(tmp_path, "a.csv", "pair")


@needs_shared
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sick_train", {"neutral": 2536, "entailment": 1299, "contradiction": 665}),
        ("sick_dev", {"neutral": 282, "entailment": 144, "contradiction": 74}),
        ("snli_1.0_dev", {"neutral": 421, "entailment": 433, "contradiction": 419}),
    ],
)
def test_real_files(name, counts):
    source = opened(SHARED / "nli", f"{name}.jsonl")
    assert Counter(example.facts["label"] for example in source.records()) == counts
    assert len(source) == sum(counts.values())
    lines = [json.loads(line) for line in (SHARED / "nli" / f"{name}.jsonl").open()]
    last = [line for line in lines if line["gold_label"] != "-"][-1]
    example = source[len(source) - 1]
    assert (example.text, example.second_text) == (last["sentence1"], last["sentence2"])
    assert dict(example.facts) == {"label": last["gold_label"], "id": last["pairID"]}


def test_a_subset_is_a_fact_of_every_pair(tmp_path):
    write_lines(tmp_path, pair("neutral"))
    (example,) = open_source(tmp_path, "text", source="nli", path="a.jsonl", subset="matched").records()
    assert dict(example.facts) == {"label": "neutral", "id": "1", "subset": "matched"}
