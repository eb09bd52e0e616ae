from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.locate import tokenizer_file


@pytest.mark.parametrize("spec", ["./gone/tokenizer.json", "vocab.txt", "a/b/c/d", "/no/such/folder", "org/gone.spm"])
def test_a_missing_file_is_named(spec: str) -> None:
    with pytest.raises(TokenizerError, match=f"text tokenizer {spec} is not there; give"):
        tokenizer_file(spec)


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no text tokenizer; looked for tokenizer\.json, vocab\.txt"):
        tokenizer_file(str(tmp_path))


def test_a_folder_with_one_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "mine.spm").touch()
    assert tokenizer_file(str(tmp_path)) == tmp_path / "mine.spm"
    (tmp_path / "yours.model").touch()
    with pytest.raises(TokenizerError, match=r"several SentencePiece models \(mine\.spm, yours\.model\); name one"):
        tokenizer_file(str(tmp_path))


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    path.touch()
    with pytest.raises(TokenizerError, match="unknown ending"):
        tokenizer_file(str(path))


class Hub:
    """Stands in for huggingface_hub.hf_hub_download: holds some files, or fails."""

    def __init__(self, *files: str, error: Exception | None = None) -> None:
        self.files, self.error = files, error
        self.asked: list[tuple[str, str, str | None]] = []

    def __call__(self, name: str, file: str, revision: str | None) -> str:
        self.asked.append((name, file, revision))
        if self.error:
            raise self.error
        if file not in self.files:
            raise EntryNotFoundError(f"{file} is not there")
        return f"/cache/{file}"


def use(monkeypatch: Any, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def test_a_hub_name_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub("vocab.txt"))
    assert tokenizer_file("hf-hub:org/name@v2") == Path("/cache/vocab.txt")
    assert hub.asked == [("org/name", "tokenizer.json", "v2"), ("org/name", "vocab.txt", "v2")]
    assert tokenizer_file("bert-base-uncased") == Path("/cache/vocab.txt")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline\nmode"), ConnectionError("offline"), ValueError()])
def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    hub = use(monkeypatch, Hub(error=error))
    with pytest.raises(TokenizerError) as caught:
        tokenizer_file("org/name")
    message = str(caught.value)
    assert message.startswith(
        "text tokenizer org/name is no file or folder here, and hf-hub:org/name can't be fetched: "
    )
    assert ("ValueError" if type(error) is ValueError else "offline") in message
    assert message.endswith("or give the path of a downloaded tokenizer")
    assert len(hub.asked) == 1


def test_a_name_that_no_hub_has_is_no_guess() -> None:
    with pytest.raises(TokenizerError, match=r"and 'a b' is no name of a repository on the Hub"):
        tokenizer_file("a b")


def test_a_hub_model_without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Hub())
    with pytest.raises(TokenizerError, match="Hub model org/name holds no text tokenizer"):
        tokenizer_file("org/name")
