import pickle

import pytest

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

REASON = "the datasets package (extra data) is absent"
pyarrow = pytest.importorskip("pyarrow", reason=REASON)
pandas = pytest.importorskip("pandas", reason=REASON)

RED, GREEN, BLUE = (jpeg(color) for color in ("red", "green", "blue"))
VQA = {
    "image": [RED, GREEN],
    "questions": [["what?", "how many?"], ["is it?"]],
    "answers": [[["net", "pitch"], ["2"]], [["yes"]]],
    "answer_labels": [[[0, 1], [2]], [[3]]],
    "answer_scores": [[[1.0, 0.3], [0.6]], [[0.9]]],
    "image_id": [458752, 9],
    "question_id": [[458752000, 458752001], [9000]],
    "split": ["train", "train"],
}
NLVR2 = {
    "image_0": [RED, GREEN],
    "image_1": [BLUE, RED],
    "questions": [["one is red", "none is"], ["both are"]],
    "answers": [["True", "False"], ["True"]],
    "identifier": ["dev-850-0", "dev-850-1"],
}
CAPTIONS = {
    "image": [RED, GREEN],
    "caption": [["a red card", "réd"], ["a green card"]],
    "image_id": ["1.jpg", "2.jpg"],
    "split": ["train", "train"],
}
WIKIBK = {
    "image": ["None", "None"],
    "caption": [["One sentence."], ["And another."]],
    "source": ["wikibk"] * 2,
    "split": ["train"] * 2,
}


def write(folder, columns, name="a.arrow", stream=False):
    """As VLMo's scripts write: a data frame of Python lists, made a table, in one record batch file."""
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.Table.from_pandas(pandas.DataFrame(columns))
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(folder / name), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return table


def opened(folder, stream="pair", path="a.arrow"):
    return open_source(folder, stream, source="vlmo", path=path)


def all_of(source):
    return list(map(source.__getitem__, range(len(source))))


def test_vqa(tmp_path):
    write(tmp_path, VQA)
    source = opened(tmp_path)
    assert isinstance(source, LabelledSource)
    assert [(e.name, e.text, e.image_id, e.image, e.more_images) for e in all_of(source)] == [
        ("a.arrow:0", "what?", 0, RED, ()),
        ("a.arrow:0", "how many?", 0, RED, ()),
        ("a.arrow:1", "is it?", 1, GREEN, ()),
    ]
    facts = [
        {"id": 458752000, "scores": {"net": 1.0, "pitch": 0.3}},
        {"id": 458752001, "scores": {"2": 0.6}},
        {"id": 9000, "scores": {"yes": 0.9}},
    ]
    assert [dict(e.facts) for e in all_of(source)] == [dict(e.facts) for e in source.records()] == facts
    assert all(e.image is None and e.text for e in source.records())
    assert list(source.texts()) == ["what?", "how many?", "is it?"]
    assert [(e.image, e.image_id) for e in all_of(opened(tmp_path, "image"))] == [(RED, 0), (GREEN, 1)]
    with pytest.raises(IndexError):
        source[3]


def test_a_part_that_went_through_pandas_again(tmp_path):
    """trainable_val and rest_val are slices of a table that was read back."""
    table = write(tmp_path, VQA)
    write(tmp_path, pyarrow.Table.from_pandas(table.to_pandas()[-1:]), "rest_val.arrow")
    example = opened(tmp_path, path="rest_val.arrow")[0]
    assert (example.text, dict(example.facts)) == ("is it?", {"id": 9000, "scores": {"yes": 0.9}})


@pytest.mark.parametrize("removed", [False, True])
def test_test_tables_have_no_answers(tmp_path, removed):
    hidden = ("answers", "answer_labels", "answer_scores")
    columns = {k: [[], []] if k in hidden else v for k, v in VQA.items() if not (removed and k in hidden)}
    write(tmp_path, columns)
    assert [dict(e.facts) for e in opened(tmp_path).records()] == [{"id": 458752000}, {"id": 458752001}, {"id": 9000}]


def test_nlvr2(tmp_path):
    write(tmp_path, NLVR2)
    source = opened(tmp_path)
    assert [(e.text, e.image, e.more_images, dict(e.facts)) for e in all_of(source)] == [
        ("one is red", RED, (BLUE,), {"id": "dev-850-0", "label": "True"}),
        ("none is", RED, (BLUE,), {"id": "dev-850-0", "label": "False"}),
        ("both are", GREEN, (RED,), {"id": "dev-850-1", "label": "True"}),
    ]
    with pytest.raises(DataError, match=r"^a.arrow: has statements on two pictures .*name it under 'pair'"):
        opened(tmp_path, "image")


@pytest.mark.parametrize("stream_format", [False, True])
def test_captions_in_several_tables(tmp_path, stream_format):
    write(tmp_path, CAPTIONS, stream=stream_format)
    boxes = {name: [[1]] for name in ("width", "height", "x", "y")}
    write(tmp_path, {"image": [BLUE], "caption": [["blue"]], **boxes, "image_id": ["3"]}, "vg.arrow")
    source = opened(tmp_path, path=["a.arrow", "vg.arrow"])
    assert [(e.name, e.text, e.image_id, e.image) for e in all_of(source)] == [
        ("a.arrow:0", "a red card", 0, RED),
        ("a.arrow:0", "réd", 0, RED),
        ("a.arrow:1", "a green card", 1, GREEN),
        ("vg.arrow:0", "blue", 2, BLUE),
    ]
    assert source.blocks == [3, 1] and opened(tmp_path, "image", ["a.arrow", "vg.arrow"]).blocks == [2, 1]
    text = opened(tmp_path, "text")
    assert [(e.text, e.image_id, e.image, dict(e.facts)) for e in all_of(text)][1:] == [
        ("réd", -1, None, {}),
        ("a green card", -1, None, {}),
    ]


def test_texts_without_pictures(tmp_path):
    write(tmp_path, WIKIBK)
    source = opened(tmp_path, "text")
    assert [source[i].text for i in range(2)] == list(source.texts()) == ["One sentence.", "And another."]
    for stream in ("image", "pair"):
        with pytest.raises(DataError, match=rf"^a.arrow: its column 'image' holds words.* {stream} stream; .*'text'"):
            opened(tmp_path, stream)


def test_processes_map_the_file_anew(tmp_path):
    write(tmp_path, {**CAPTIONS, "image": [RED * 2000, GREEN]})
    source = opened(tmp_path)
    stored = pickle.dumps(source)
    assert len(stored) < 5000
    assert pickle.loads(stored)[2] == source[2]


@pytest.mark.parametrize(
    ("changes", "index", "reason"),
    [
        ({"image": [RED, None]}, 2, "column 'image' holds no picture but 'None'"),
        ({"image": [RED, b""]}, 2, "column 'image' holds no picture"),
        ({"questions": [["a", "b"], [""]]}, 2, "'questions' is empty"),
        ({"questions": [["a", "b"], []]}, 2, "'questions' must hold strings, not a null"),
        ({"questions": [["a", "b"], None]}, 2, "'questions' must hold strings, not a null"),
        ({"answer_scores": [[[1.0, 0.3], [0.6]], [[]]]}, 2, "lists of equal length"),
        ({"answer_scores": [[[1.0, 0.3], [0.6]], []]}, 2, "lists of equal length"),
    ],
)
def test_a_broken_row_is_one_example_that_raises(tmp_path, changes, index, reason):
    write(tmp_path, {**VQA, **changes})
    source = opened(tmp_path)
    assert len(source) == 3 and source[1].image == RED
    with pytest.raises(DataError, match=f"^a.arrow:1: .*{reason}"):
        source[index]


def test_an_answer_that_is_none(tmp_path):
    write(tmp_path, {**NLVR2, "answers": [["True", "true"], ["True"]]})
    with pytest.raises(DataError, match=r"^a.arrow:0: an answer must be 'True' or 'False', not 'true'"):
        opened(tmp_path)[1]


def test_files_that_are_none_of_these(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"junk" * 10)
    with pytest.raises(DataError, match=r"^a.arrow: can't be opened as an Arrow table"):
        opened(tmp_path)
    write(tmp_path, CAPTIONS)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"^a.arrow: can't be opened as an Arrow table"):
        opened(tmp_path)
    write(tmp_path, {"picture": [RED], "caption": [["x"]]})
    with pytest.raises(DataError, match=r"^a.arrow: has no column 'image'; its columns: picture, caption"):
        opened(tmp_path)
    write(tmp_path, {"image": [RED]})
    with pytest.raises(DataError, match=r"^a.arrow: has no column 'caption'; its columns: image"):
        opened(tmp_path, "text")


@needs_shared
def test_a_table_of_real_photographs(tmp_path):
    folder = SHARED / "coco" / "val2017"
    photos = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    captions = [[f"caption {nth} of {number}" for nth in range(5)] for number in range(len(photos))]
    write(tmp_path, {"image": photos, "caption": captions})
    source = opened(tmp_path)
    assert len(source) == 100
    assert all(source[i].image == photos[i // 5] and source[i].text == captions[i // 5][i % 5] for i in range(100))
