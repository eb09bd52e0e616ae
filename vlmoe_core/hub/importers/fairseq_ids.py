"""The ids that XLM-RoBERTa, and BEiT-3 after it, give to the pieces of a SentencePiece model.

The ids of fairseq begin with <s>, <pad>, </s>, <unk>; the ordinary pieces follow, so that each has the id of the
SentencePiece model and 1; <mask> is last (transformers, tokenization_xlm_roberta.py of version 4).
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.spm import read_spm

OWN = ("<unk>", "<s>", "</s>")
"""The first pieces of the SentencePiece model, in the order of their ids."""
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"


def read_fairseq_spm(path: Path) -> Tokenizer:
    """A tokenizer that cuts text as the SentencePiece model does, with fairseq's ids.

    Raises TokenizerError if it is no Unigram model, or its first pieces are not <unk>, <s>, </s>.
    """
    state = json.loads(read_spm(path).to_str())
    pieces = state["model"].get("vocab")
    if state["model"].get("type") != "Unigram" or tuple(piece for piece, _ in pieces[: len(OWN)]) != OWN:
        raise TokenizerError(
            f"{path} is not the SentencePiece model of an XLM-RoBERTa tokenizer: that is Unigram, and its first pieces "
            f"are {', '.join(OWN)}; BEiT-3's is beit3.spm"
        )
    state["model"]["vocab"] = [[piece, 0.0] for piece in FIRST] + pieces[len(OWN) :]
    state["model"]["unk_id"] = FIRST.index("<unk>")
    state["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*FIRST, MASK)])
    return tokenizer
