"""What sources are called in public."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from vlmoe_core.data.config import Source, SourceConfig, SplitConfig
from vlmoe_core.data.naming import is_hub_data, public_details, public_name, public_names

SECRET = "/home/somebody/secret project"


def source(**fields: Any) -> SourceConfig:
    found: SourceConfig = TypeAdapter(Source).validate_python(fields)
    return found


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"source": "scenes", "task": "vqa"}, "vlmoe scenes (drawn)"),
        ({"source": "jsonl", "path": f"{SECRET}/a.jsonl", "image_root": SECRET}, "jsonl: a.jsonl"),
        ({"source": "jsonl", "path": [f"{SECRET}/a.jsonl", "x/b.jsonl", "y/b.jsonl"]}, "jsonl: a.jsonl, b.jsonl"),
        ({"source": "image-folder", "path": f"{SECRET}/train", "classes": f"{SECRET}/c.txt"}, "image-folder: train"),
        ({"source": "image-folder", "path": "."}, "image-folder source"),
        ({"source": "tar", "path": "C:\\Users\\me\\shards\\*.tar"}, "tar: *.tar"),
        (
            {
                "source": "vqa",
                "questions": f"{SECRET}/q.json",
                "annotations": f"{SECRET}/a.json",
                "images": SECRET + "/{image_id:012d}.jpg",
            },
            "vqa: q.json, a.json",
        ),
        ({"source": "arrow", "hub": "org/some-data"}, "org/some-data"),
        ({"source": "arrow", "hub": f"{SECRET}/data"}, "arrow: data"),
        ({"source": "arrow", "hub": "/root/data"}, "arrow: data"),
        ({"source": "arrow", "hub": "../data"}, "arrow: data"),
        ({"source": "arrow", "path": f"{SECRET}/x.parquet"}, "arrow: x.parquet"),
        ({"source": "jsonl", "path": "a/\udcff.jsonl"}, "jsonl: ?.jsonl"),
    ],
)
def test_names_hold_no_folder(fields: dict[str, Any], name: str) -> None:
    found = source(**fields)
    assert public_name(found) == name
    assert SECRET not in public_name(found) + public_details(found)
    assert is_hub_data(name) == (name == "org/some-data") == (" " not in name)


def test_details_are_what_the_recipe_says() -> None:
    scenes = source(source="scenes", task="vqa", split="test", size=100)
    assert public_details(scenes) == "task vqa, split test, size 100, combinations seen"
    assert public_details(source(source="text", path="a.txt", part=(0.9, 1))) == "part 0.9 to 1.0"
    assert public_details(source(source="jsonl", path="a.jsonl")) == ""


def test_a_split_names_each_source_once() -> None:
    two = ({"source": "scenes"}, {"source": "jsonl", "path": "a.jsonl"})
    split = SplitConfig.model_validate({"image": two, "pair": ({"source": "scenes"},)})
    assert public_names(split) == "vlmoe scenes (drawn), jsonl: a.jsonl"
    assert public_names(split, ("pair",)) == "vlmoe scenes (drawn)"
