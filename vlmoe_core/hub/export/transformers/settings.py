"""The JSON files of an exported repository: config, tokenizer and processor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors
from torch import Tensor

from vlmoe_core.checkpoint.shards import separate_tied
from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tokenizers.text import TextTokenizer
from vlmoe_core.train.trained import Trained

MODELING, PROCESSING = "modeling_vlmoe", "processing_vlmoe"


@dataclass(frozen=True)
class Architecture:
    """The class of a model, and by which Auto classes it is found beside AutoModel."""

    name: str
    autos: tuple[str, ...]


ARCHITECTURES: Mapping[str, Architecture] = {
    "vqa": Architecture("VLMoEForVisualQuestionAnswering", ("AutoModelForVisualQuestionAnswering",)),
    "classification": Architecture("VLMoEForImageClassification", ("AutoModelForImageClassification",)),
    "nli": Architecture("VLMoEForSequenceClassification", ("AutoModelForSequenceClassification",)),
    "nlvr2": Architecture("VLMoEForImagesAndTextClassification", ("AutoModelForSequenceClassification",)),
    "retrieval": Architecture("VLMoEForRetrieval", ("AutoModel",)),
    "masked": Architecture("VLMoEForPreTraining", ("AutoModelForPreTraining", "AutoModelForMaskedLM")),
}
"""By task, and by objective of pretraining."""


def task_of(recipe: Recipe) -> str:
    """The task, or the objective of pretraining. Raises UsageError for one that has no class in transformers."""
    aim = recipe.task or recipe.objective
    assert aim is not None
    if aim.name not in ARCHITECTURES:
        raise UsageError(
            f"format transformers has no class for '{aim.name}'; it knows {', '.join(ARCHITECTURES)}: export it with "
            "--format safetensors"
        )
    return aim.name


def model_config(trained: Trained, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of config.json for the tensors of `state`."""
    recipe, task = trained.recipe, task_of(trained.recipe)
    names, architecture = trained.tokenizers.labels.names, ARCHITECTURES[task]
    tied = separate_tied(dict(state))[1]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    return {
        "model_type": "vlmoe",
        "architectures": [architecture.name],
        "auto_map": _auto_map(architecture),
        "encoder": _encoder(recipe),
        "vocab_size": recipe.tokenizers.text.vocab_size,
        "codebook_size": recipe.tokenizers.visual.codebook_size if task == "masked" else 0,
        "task": task,
        "pool": getattr(recipe.task, "pool", None),
        "num_images": getattr(recipe.task, "num_images", 1),
        "matches": getattr(recipe.task, "itm_weight", 0) > 0,
        "contrasts": any(name.startswith("contrast.") for name in state),
        "tied": tied,
        "tie_word_embeddings": bool(tied),
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **(labels if names else {}),
    }


def _auto_map(architecture: Architecture) -> dict[str, str]:
    own = dict.fromkeys(architecture.autos, f"{MODELING}.{architecture.name}")
    return {"AutoConfig": "configuration_vlmoe.VLMoEConfig", "AutoModel": f"{MODELING}.VLMoEModel"} | own


def _encoder(recipe: Recipe) -> dict[str, Any]:
    """The fields of the model, its experts computed by the plain loop."""
    encoder = recipe.model.model_dump(mode="json")
    for moe in encoder["moe"].values():
        if moe is not None:
            moe["experts"] = "loop"
    return encoder


def tokenizer_json(text: TextTokenizer) -> str:
    """The content of tokenizer.json: the run's tokenizer, with [CLS] and [SEP] around as the package puts them."""
    tokenizer = Tokenizer.from_str(text.to_json())
    cls, sep = text.id_to_token(text.cls_id), text.id_to_token(text.sep_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(cls, text.cls_id), (sep, text.sep_id)],
    )
    found: str = tokenizer.to_str(pretty=True)
    return found


def tokenizer_config(trained: Trained) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    text = trained.tokenizers.text
    roles = {"pad": text.pad_id, "unk": text.unk_id, "cls": text.cls_id, "sep": text.sep_id, "mask": text.mask_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": trained.recipe.model.max_text_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": text.id_to_token(number) for role, number in roles.items()},
    }


def image_processor_config(recipe: Recipe) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "image_processor_type": "VLMoEImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{PROCESSING}.VLMoEImageProcessor"},
        "size": recipe.model.image_size,
        "max_pixels": recipe.data.max_pixels,
    }


def processor_config(recipe: Recipe) -> dict[str, Any]:
    """The content of processor_config.json. The texts of retrieval are captions, encoded alone or not."""
    most, lengths = recipe.model.max_text_length, recipe.data.max_text
    alone = lengths.pair if task_of(recipe) == "retrieval" else lengths.text
    return {
        "processor_class": "VLMoEProcessor",
        "auto_map": {"AutoProcessor": f"{PROCESSING}.VLMoEProcessor"},
        "max_text": {"text": min(alone, most), "pair": min(lengths.pair, most)},
        "pad_text_to": recipe.data.pad_text_to,
    }


def dump(content: Mapping[str, Any]) -> str:
    """JSON as transformers writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
