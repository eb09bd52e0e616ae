"""Results as the Hub shows them, read back by its own library."""

from datetime import datetime
from pathlib import Path

import huggingface_hub
import yaml

from tests.train.test_results import REPORT
from vlmoe_core.hub.results import current_results, eval_results_files, main_metrics, model_index
from vlmoe_core.train.results import StoredResult, read_results, save_result

DATA = "vlmoe scenes (drawn)"
METRICS = {"accuracy": 10.256, "accuracy/yes/no": 50.0, "question/a colour": 1.0}
FILE = ".eval_results/vlmoe-scenes-drawn-vqa-test.yaml"


def stored(folder: Path, data: str = DATA, step: int = 4, limit: int | None = None, n: int = 28) -> list[StoredResult]:
    """The results of a run to which one more was added."""
    report = REPORT | {"metrics": METRICS, "n": n, "broken": 0}
    save_result(folder, report, data, step, limit)
    return read_results(folder)


def test_the_entries_are_what_the_library_writes_and_reads(tmp_path: Path) -> None:
    data = yaml.safe_load(eval_results_files(stored(tmp_path), 4)[FILE])
    dates = [one.pop("date") for one in data]
    notes = "28 examples of test; majority baseline 17.50; vlmoe eval vqa, step 4"
    assert data == [
        {
            "dataset": {"id": DATA, "task_id": "vqa-accuracy"},
            "value": 10.26,
            "notes": f"accuracy in percent, 95 % interval 0.00 to 21.50; {notes}",
        },
        {
            "dataset": {"id": DATA, "task_id": "vqa-accuracy-yes-no"},
            "value": 50.0,
            "notes": "accuracy/yes/no in percent; 28 examples of test; vlmoe eval vqa, step 4",
        },
    ]
    assert all(datetime.fromisoformat(date).tzinfo is not None for date in dates)
    if hasattr(huggingface_hub, "parse_eval_result_entries"):  # 2.x; some of 1.x has none
        entries = huggingface_hub.parse_eval_result_entries(data)
        assert huggingface_hub.eval_result_entries_to_yaml(entries) == data
        assert [one.value for one in entries] == [10.26, 50.0]


def test_the_model_index_is_read_by_the_library(tmp_path: Path) -> None:
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    entries = model_index(stored(tmp_path))
    written = ModelCardData(model_name="m", eval_results=entries).to_yaml()
    name, found = model_index_to_eval_results(yaml.safe_load(written)["model-index"])
    assert (name, found) == ("m", entries)
    assert [(one.metric_type, one.metric_value) for one in found] == [("accuracy", 10.26), ("accuracy/yes/no", 50.0)]
    assert found[0].metric_name == "accuracy (percent, 95 % interval 0.00 to 21.50)"
    assert (found[0].task_type, found[0].dataset_name, found[0].dataset_type) == (
        "visual-question-answering",
        DATA,
        "vlmoe-scenes-drawn",
    )


def test_a_data_set_of_the_hub_keeps_its_name(tmp_path: Path) -> None:
    results = stored(tmp_path, "org/data.v2")
    (text,) = eval_results_files(results, 4).values()
    assert {one["dataset"]["id"] for one in yaml.safe_load(text)} == {"org/data.v2"}
    assert {one.dataset_type for one in model_index(results)} == {"org/data.v2"}


def test_metrics_by_kind_of_question_are_no_entries(tmp_path: Path) -> None:
    assert main_metrics(stored(tmp_path)[0]) == ["accuracy", "accuracy/yes/no"]


def test_only_results_of_these_weights_and_of_the_most_examples_are_told(tmp_path: Path) -> None:
    stored(tmp_path, step=2)
    assert eval_results_files(read_results(tmp_path), 4) == {}
    stored(tmp_path, limit=9, n=9)
    (part,) = current_results(read_results(tmp_path), 4)
    assert part.limit == 9
    assert "the first 9 examples of test" in eval_results_files([part], 4)[FILE]
    (whole,) = current_results(stored(tmp_path), 4)
    assert (whole.limit, whole.n) == (None, 28)


def test_long_and_strange_names_make_short_plain_file_names(tmp_path: Path) -> None:
    many = "jsonl: " + ", ".join(f"../a|b\n{n}'\".jsonl" for n in range(90))
    seen = many.replace("\n", " ")
    for name in "12":
        (tmp_path / name).mkdir()
    two = [*stored(tmp_path / "1", many), *stored(tmp_path / "2", many + "x")]
    files = eval_results_files(two, 4)
    assert len(files) == 2
    for path, text in files.items():
        name = path.removeprefix(".eval_results/").removesuffix(".yaml")
        assert len(name) <= 80 and name.replace("-", "").isalnum() and name.isascii()
        assert yaml.safe_load(text)[0]["dataset"]["id"] in (seen, seen + "x")
