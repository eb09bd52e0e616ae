"""A tokenizer that was taught by a vision model: what is reported of it, and what a model on its codes can draw."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.analysis.codes.support import tokenizer_run
from tests.tokenizers.teachers.test_transformers_model import vit, written
from tests.train.support import metrics, tiny, train
from vlmoe_core.analysis.codes.files import report_on
from vlmoe_core.analysis.masked import fill_gaps
from vlmoe_core.errors import UsageError
from vlmoe_core.train.trained import load_trained


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    teacher = written(vit(), folder / "secret-place" / "small-vit")
    return tokenizer_run(folder, f"objective.teacher={{model: {teacher}, dim: 24}}")


def test_the_report_compares_features_and_holds_no_path(taught: Path) -> None:
    numbers, picture = report_on(taught)
    found = json.loads(numbers.read_text())
    last = [line for line in metrics(taught) if line["split"] == "eval"][-1]
    assert found["cosine"] == pytest.approx(1 - last["loss/teacher"], abs=1e-5)
    assert found["teacher"] == "small-vit" and "secret-place" not in numbers.read_text()
    assert found["pixels"] is None and found["kmeans"] is None
    with Image.open(picture) as opened:
        assert opened.size == (6 + 3 * 134, 24 + 8 * 134)


def test_a_model_on_its_codes_predicts_words_and_draws_nothing(taught: Path, tmp_path: Path) -> None:
    words = f"tokenizers.visual={{kind: vqkd, load: {taught}, codebook_size: 16}}"
    trained = load_trained(train(tiny(tmp_path, "train.steps=1", "optim.warmup_steps=1", words), tmp_path / "m").folder)
    picture = tmp_path / "red.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    filled = fill_gaps(trained, picture, "a [MASK] square", top=2, seed=0)
    assert len(filled.gaps[0].words) == 2 and filled.picture is None and filled.hidden == 6
    assert filled.undrawn is not None and "features of its teacher" in filled.undrawn
    with pytest.raises(UsageError, match=r"no picture: .* with --text"):
        fill_gaps(trained, picture, None, top=2, seed=0)
