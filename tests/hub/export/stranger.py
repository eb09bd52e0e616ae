"""What a user without the package does with exported repositories; run in a process of its own by the tests.

python -I stranger.py FOLDER: reads FOLDER/inputs.safetensors and the repositories beside it, writes
FOLDER/found.safetensors and prints facts as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

for name in ("vlmoe_core", "vlmoe_cli", "pydantic", "torchvision"):
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
FOUND: dict[str, torch.Tensor] = {}


def load(auto: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **options)


def keep(prefix: str, output: Any) -> None:
    FOUND.update({f"{prefix}.{name}": tensor for name, tensor in output.items() if tensor is not None})


def complaint(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no complaint"


def masked(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = load("AutoModelForPreTraining", folder / "masked").eval()
    image, text = {}, {}
    for name, tensor in inputs.items():
        (image if name in ("pixel_values", "bool_masked_pos") else text)[name] = tensor
    keep("pair", model(**inputs))
    keep("image", model(**image))
    keep("text", model(**text))
    flipped = {name: tensor.flip(1) for name, tensor in text.items()}
    order = flipped["attention_mask"].argsort(dim=1, stable=True)
    left = {name: inputs[name].new_zeros(inputs[name].shape) for name in text}
    for row, length in enumerate(text["attention_mask"].sum(1).tolist()):
        for name in text:
            left[name][row, order.shape[1] - length :] = text[name][row, :length]
    FOUND["left.logits"] = model(**left).logits[left["attention_mask"].bool()]
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    loss = model(**text, labels=labels).loss
    plain = torch.nn.functional.cross_entropy(FOUND["text.logits"].flatten(0, 1), labels.flatten())
    encoder = load("AutoModel", folder / "masked").eval()
    keep("encoder.pair", encoder(**inputs))
    keep("encoder.text", encoder(**text))
    model.save_pretrained(folder / "again", max_shard_size="20KB")
    again = load("AutoModelForMaskedLM", folder / "again").eval()
    keep("again", again(**inputs))
    longer = torch.ones(1, 25, dtype=torch.int64)
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    return {
        "loss": loss.item() - plain.item(),
        "encoder": type(encoder).__name__,
        "same state": all(torch.equal(a, b) for a, b in states),
        "complaints": [
            complaint(model),
            complaint(model, pixel_values=inputs["pixel_values"].float()),
            complaint(model, pixel_values=inputs["pixel_values"][..., :8]),
            complaint(model, input_ids=text["input_ids"], pixel_values=inputs["pixel_values"][:2]),
            complaint(model, input_ids=longer),
            complaint(model, input_ids=longer[:, :3], attention_mask=torch.zeros(1, 3)),
        ],
    }


def tampered(folder: Path) -> dict[str, Any]:
    """Repositories whose config names what their code does not know, or whose header lies."""
    names = ("field", "router", "header")
    return {"tampered": [complaint(load, "AutoModelForSequenceClassification", folder / name) for name in names]}


def tied(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = load("AutoModelForPreTraining", folder / "tied").eval()
    keep("tied", model(**inputs))
    model.save_pretrained(folder / "tied-again", max_shard_size="20KB")
    again = load("AutoModelForPreTraining", folder / "tied-again").eval()
    keep("tied again", again(**inputs))
    return {
        "tied": [m.heads.text.weight is m.encoder.embeddings.text.word.weight for m in (model, again)],
        "encoder of tied": type(load("AutoModel", folder / "tied")).__name__,
    }


def classes(folder: Path) -> dict[str, Any]:
    source = folder / "classification"
    model = load("AutoModelForImageClassification", source)
    fewer = load("AutoModelForImageClassification", source, num_labels=3, ignore_mismatched_sizes=True)
    config = load("AutoConfig", source)
    fresh = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    processor = load("AutoImageProcessor", source)
    pixels = processor(torch.zeros(9, 5, 3, dtype=torch.uint8).numpy())["pixel_values"]
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    told = pipe(str(folder / "picture.png"), top_k=2)
    return {
        "labels": model.config.id2label,
        "fewer": [list(fewer.head.weight.shape), fewer.head.weight.std().item(), fewer.head.bias.abs().max().item()],
        "kept": torch.equal(fewer.encoder.norm.weight, model.encoder.norm.weight),
        "fresh": [block.attention.out.weight.std().item() for block in fresh.encoder.blocks],
        "pixels": [list(pixels.shape), str(pixels.dtype)],
        "pipeline": [one["label"] for one in told],
    }


def texts(folder: Path) -> dict[str, Any]:
    processor = load("AutoProcessor", folder / "nli")
    tokenizer = load("AutoTokenizer", folder / "nli")
    first, second = "a red [MASK] is big", "the [CLS] circle"
    pair = tokenizer("a red circle", "is big")
    mine = processor(text="a red circle", text_pair="is big")
    return {
        "pair": [pair["input_ids"] == mine["input_ids"][0].tolist()],
        "types": [pair["token_type_ids"] == mine["token_type_ids"][0].tolist()],
        "plain": processor(text=first)["input_ids"][0].tolist(),
        "masked": processor(text=first, masked=True)["input_ids"][0].tolist(),
        "batch": processor(text=[first, "a"], text_pair=[second, "a red circle"])["attention_mask"].sum(1).tolist(),
    }


def losses(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    vqa = load("AutoModelForVisualQuestionAnswering", folder / "vqa").eval()
    one = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = vqa(**one)
    scores = torch.linspace(0, 1, found.logits.numel()).view_as(found.logits)
    with_labels = vqa(**one, labels=scores)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(found.logits, scores, reduction="none")
    nlvr2 = load("AutoModelForSequenceClassification", folder / "nlvr2")
    retrieval = load("AutoModel", folder / "retrieval").eval()
    both = retrieval(**one)
    keep("retrieval", both)
    return {
        "vqa loss": with_labels.loss.item() - plain.sum(1).mean().item(),
        "one picture": complaint(nlvr2, **one),
        "unmatched": complaint(retrieval.get_match_logits, **one),
    }


def main(folder: Path) -> None:
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        facts = masked(folder, inputs) | tied(folder, inputs) | classes(folder) | texts(folder) | losses(folder, inputs)
        facts |= tampered(folder)
    facts["imported"] = sorted(n for n in ("vlmoe_core", "pydantic", "torchvision") if sys.modules.get(n) is not None)
    save_file({name: tensor.contiguous().clone() for name, tensor in FOUND.items()}, folder / "found.safetensors")
    print(json.dumps(facts))


main(Path(sys.argv[1]))
