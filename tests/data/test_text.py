import json
import pickle

import pytest

from tests.data.files_support import SHARED, WordEncoder, needs_shared, open_source
from vlmoe_core.data.sources.text import Config, documents
from vlmoe_core.errors import DataError


def opened(root, max_text=8, encoder=None, **fields):
    encoder = encoder or WordEncoder()
    return open_source(root, "text", max_text, encoder, source="text", **({"path": "*.txt"} | fields))


def packs(source):
    return [source[i].text for i in range(len(source))]


def test_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\r\nthree\n\n \nfour\n")
    data = path.read_bytes()
    found = {
        kind: [
            (line, data[start : start + size])
            for line, start, size in documents(path, Config(source="text", path="a.txt", document=kind))
        ]
        for kind in ("line", "paragraph", "file")
    }
    assert found == {
        "line": [(1, b"one"), (2, b"two"), (3, b"three"), (6, b"four")],
        "paragraph": [(1, b"one\ntwo\r\nthree"), (6, b"four")],
        "file": [(1, b"one\ntwo\r\nthree\n\n \nfour")],
    }


def test_packs_of_whole_sentences_never_cross_documents(tmp_path):
    (tmp_path / "a.txt").write_text("Äh b c. D e. F g h.\nI.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("J.")
    source = opened(tmp_path)
    assert packs(source) == ["Äh b c. D e.", "F g h.", "I.", "J."]
    assert [source[i].name for i in (1, 2, 3)] == ["a.txt:1", "a.txt:2", "b.txt:1"]
    assert source.blocks == [3, 1] and source[0].image_id == -1
    assert packs(pickle.loads(pickle.dumps(source))) == packs(source)


def test_json_lines(tmp_path):
    records = [{"text": "Ä b c. D \\n e. F g h."}, {"other": 1}, {"text": "I."}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{\n", encoding="utf-8")
    source = opened(tmp_path, path="a.jsonl", document="file")
    assert [source[i].text for i in (0, 1, 3)] == ["Ä b c. D \\n e.", "F g h.", "I."]
    for index, reason in ((2, "a.jsonl:2: has no field 'text'"), (4, "a.jsonl:4.*empty"), (5, "a.jsonl:5.*no JSON")):
        with pytest.raises(DataError, match=reason):
            source[index]
    assert len(source) == 6
    assert list(source.texts()) == [records[0]["text"], "I."]


def test_a_broken_document_is_one_example(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\n\xff\xfe two.\nThree.\n")
    source = opened(tmp_path)
    assert [source[i].text for i in (0, 2)] == ["One.", "Three."] and len(source) == 3
    with pytest.raises(DataError, match=r"a.txt:2: is not valid UTF-8 .*0xff"):
        source[1]
    assert list(source.texts()) == ["One.", "Three."]


def test_the_index_depends_on_tokenizer_and_length(tmp_path):
    (tmp_path / "a.txt").write_text("A b c. D e f. G h i.")
    assert len(opened(tmp_path)) == 2
    assert len(opened(tmp_path, max_text=12)) == 1

    class Letters(WordEncoder):
        def encode(self, text):
            return [5] * len(text)

    assert len(opened(tmp_path, encoder=Letters("letters"))) == 3


def test_without_a_tokenizer_there_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.")
    source = open_source(tmp_path, "text", source="text", path="a.txt")
    assert list(source.texts()) == ["One.", "Two."]


def test_other_streams_are_refused(tmp_path):
    with pytest.raises(DataError, match="no examples for the pair stream"):
        open_source(tmp_path, "pair", source="text", path="a.txt")


@needs_shared
@pytest.mark.parametrize(("name", "kind"), [("wikitext-2-valid", "line"), ("moby-dick", "paragraph")])
def test_real_texts_are_kept_whole(name, kind):
    source = opened(SHARED / "text", 128, path=f"{name}.txt", document=kind)
    examples = [source[i] for i in range(len(source))]
    joined: dict[str, list[str]] = {}
    for example in examples:
        joined.setdefault(example.name, []).extend(example.text.split())
    assert list(joined.values()) == [text.split() for text in source.texts()]
    assert max(len(WordEncoder().encode(e.text)) for e in examples) <= 126


def test_parts_of_a_file_share_no_document_and_leave_none_out(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"Document {n} ends." for n in range(10)))
    read = [packs(opened(tmp_path, part=part)) for part in ((0, 0.3), (0.3, 0.9), (0.9, 1))]
    assert [len(texts) for texts in read] == [3, 6, 1]
    assert [text for texts in read for text in texts] == [f"Document {n} ends." for n in range(10)]


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.9, 0.1)])
def test_a_part_that_is_no_range_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="part must be two numbers"):
        opened(tmp_path, part=part)
