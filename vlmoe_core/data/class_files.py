"""Files that name classes: a list of classes, one label for each picture of a flat folder, a list of answers.

As of ImageNet (ILSVRC 2012): the synset list, and the ground truth of the validation pictures. As of BEiT-3: the
answers of VQA.
"""

from collections.abc import Sequence
from pathlib import Path

from vlmoe_core.config import nearest
from vlmoe_core.data.files import decode_utf8, lines, parse_object
from vlmoe_core.errors import DataError


def class_list(path: Path, where: str) -> tuple[str, ...]:
    """The first word of each line that is not blank: `n01440764 tench, Tinca tinca`.

    Raises DataError, beginning with `where` (the file), if it can't be read, holds none, or has one twice.
    """
    known: dict[str, int] = {}
    for number, line in _numbered(path, where):
        name = line.split()[0]
        if name in known:
            raise DataError(f"{where}:{number}: the class '{name}' stands in line {known[name]} too")
        known[name] = number
    if not known:
        raise DataError(f"{where}: holds no class")
    return tuple(known)


def answer_list(path: Path, where: str) -> tuple[str, ...]:
    """The answers of BEiT-3's answer2label.txt, JSON lines {"answer": ..., "label": ...}, in label order.

    Raises DataError, beginning with `where` (the file), if it can't be read, holds none, or line i has not label i.
    """
    answers: list[str] = []
    for number, line in _numbered(path, where):
        place = f"{where}:{number}"
        entry = parse_object(line.encode(), place)
        answer, label = entry.get("answer"), entry.get("label")
        if not isinstance(answer, str) or type(label) is not int or label != len(answers):
            raise DataError(f"{place}: must have an answer and label {len(answers)}, not {answer!r} and {label!r}")
        answers.append(answer)
    if not answers:
        raise DataError(f"{where}: holds no answer")
    return tuple(answers)


def checked_class(name: str, classes: Sequence[str] | None, where: str) -> str:
    """The class; DataError, beginning with `where`, if there is a list and it is not in it."""
    if classes is not None and name not in classes:
        raise DataError(
            f"{where}: '{name}' is no class of the list (classes) of {len(classes)}; {_hint(name, classes)}"
        )
    return name


def _hint(name: str, classes: Sequence[str]) -> str:
    return nearest(name, list(classes)) if len(classes) <= 20 else f"it begins with {', '.join(classes[:3])}"


def picture_labels(path: Path, pictures: Sequence[str], classes: Sequence[str] | None, where: str) -> list[str]:
    """The class of each of the sorted pictures.

    The file has a line a picture, in one of two forms: `NAME CLASS`, in any order; or a number from 1, the place of the
    class in `classes`, the n-th line for the n-th picture.

    Raises DataError, beginning with `where` (the file) and line, for what is neither, a class outside of the list, and
    pictures and lines that don't belong together.
    """
    numbered = _numbered(path, where)
    if all(len(line.split()) == 1 for _, line in numbered):
        return _by_number(numbered, len(pictures), classes, where)
    return _by_name(numbered, pictures, classes, where)


def _by_name(
    numbered: Sequence[tuple[int, str]], pictures: Sequence[str], classes: Sequence[str] | None, where: str
) -> list[str]:
    found: dict[str, str] = {}
    known = set(pictures)
    for number, line in numbered:
        name, *rest = line.rsplit(maxsplit=1)
        if name not in known or not rest:
            raise DataError(f"{where}:{number}: '{name}' is no picture of the folder; a line is NAME CLASS")
        if name in found:
            raise DataError(f"{where}:{number}: the picture '{name}' has a label already")
        found[name] = checked_class(rest[0], classes, f"{where}:{number}")
    for picture in pictures:
        if picture not in found:
            raise DataError(f"{where}: has no line for the picture '{picture}'")
    return [found[picture] for picture in pictures]


def _by_number(numbered: Sequence[tuple[int, str]], count: int, classes: Sequence[str] | None, where: str) -> list[str]:
    if classes is None:
        raise DataError(f"{where}: holds numbers of classes; name the list that they count in (classes)")
    if len(numbered) != count:
        raise DataError(f"{where}: has {len(numbered)} lines for {count} pictures; they must be as many")
    labels = []
    for number, line in numbered:
        if not line.isdecimal() or not 1 <= int(line) <= len(classes):
            raise DataError(f"{where}:{number}: '{line}' is no number from 1 to {len(classes)}")
        labels.append(classes[int(line) - 1])
    return labels


def _numbered(path: Path, where: str) -> list[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    try:
        return [(number, decode_utf8(content, f"{where}:{number}").strip()) for number, _, content in lines(path)]
    except OSError as error:
        raise DataError(f"{where}: can't be read: {error.strerror}") from error
