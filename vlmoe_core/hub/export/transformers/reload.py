"""Loads exported repositories as a stranger does, where the package and pydantic can't be imported, and asks them.

Run by itself, in a process of its own: python -P reload.py CASES.json OUT.safetensors. A case names a repository, an
Auto class, a stream, the files of the pictures of each example, its text and its second text.
"""

import json
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = ("vlmoe_core", "vlmoe_cli", "pydantic")


def answers(case: dict[str, Any]) -> dict[str, Any]:
    """What a repository says of its examples: tensors by name."""
    import torch
    import transformers

    load = {"pretrained_model_name_or_path": case["folder"], "trust_remote_code": True}
    processor = transformers.AutoProcessor.from_pretrained(**load)
    model = getattr(transformers, case["auto"]).from_pretrained(**load).eval()
    inputs = processor(case["images"], case["texts"], case["seconds"])
    found = {name: tensor for name, tensor in inputs.items() if name == "pixel_values"}
    with torch.no_grad():
        found |= {name: tensor for name, tensor in model(**inputs).items() if tensor is not None}
        if model.config.matches:
            found["match_logits"] = model.get_match_logits(**inputs)
        if model.config.contrasts and case["stream"] == "pair":
            found["image_embeds"] = model.get_image_features(**inputs)
            found["text_embeds"] = model.get_text_features(**inputs)
    if "input_ids" in inputs:
        mask = inputs["attention_mask"].bool()
        found["input_ids"] = inputs["input_ids"][mask]
        if model.config.task == "masked":
            found["logits"] = found["logits"][mask]
    return found


def main(cases: str, out: str) -> None:
    """Ask each case, and write all answers as CASE.NAME."""
    for name in FORBIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    found = {
        f"{number}.{name}": tensor.contiguous().clone()
        for number, case in enumerate(json.loads(Path(cases).read_text(encoding="utf-8")))
        for name, tensor in answers(case).items()
    }
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
