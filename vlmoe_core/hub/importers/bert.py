"""BERT (arXiv 1810.04805): its tokenizer and word embeddings, and nothing else.

Its blocks are post-LN and belong to texts alone; neither they nor the positions that they were trained with are taken.
"""

from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.ledger import Ledger, model_config
from vlmoe_core.model.config import PRESETS, ModelConfig

WORDS = "embeddings.word_embeddings.weight"
UNUSED = {
    r"(bert\.)?(embeddings|encoder|pooler)\..*|cls\..*|classifier\..*": "from BERT come the word embeddings alone"
}


def map_bert(ledger: Ledger) -> ModelConfig:
    """Fill the word embeddings of an encoder of the preset that is as wide as the BERT.

    Raises:
        CheckpointError: there are no word embeddings, or no preset has their width.
    """
    key = next((f"{base}{WORDS}" for base in ("bert.", "") if f"{base}{WORDS}" in ledger), WORDS)
    ledger.fill("embeddings.text.word.weight", key)
    ledger.fresh[".*"] = "from BERT come the word embeddings alone"
    ledger.leave(UNUSED)
    width = ledger.shape(key, 2)[1]
    preset = next((name for name, sizes in PRESETS.items() if sizes["dim"] == width), None)
    if preset is None:
        sizes = ", ".join(f"{name} {values['dim']}" for name, values in PRESETS.items())
        raise CheckpointError(f"the word embeddings are {width} wide, and no preset of the encoder is: {sizes}")
    return model_config(preset=preset)
