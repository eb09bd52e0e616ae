"""The class of a word, which experts are compared with: one mapping for the drawn world and for any English text.

The closed classes of English are listed nearly whole. Of the open ones there are only the words that the sentences of
`scenes` consist of and their like (colours, shapes, sizes, verbs of captions); every other word is `open`.
"""

from collections.abc import Iterable, Mapping
from itertools import chain

from vlmoe_core.data.scenes.words import COLOUR_WORDS, NUMBERS, SHAPE_WORDS, SIZE_WORDS, TEXTURE_WORDS, plural

WORD_STARTS = "▁Ġ"
"""What SentencePiece and byte-level BPE put before the first piece of a word."""
SHAPES = tuple(chain.from_iterable(SHAPE_WORDS.values()))
DRAWN: Mapping[str, Iterable[str]] = {
    "colour": tuple(chain.from_iterable(COLOUR_WORDS.values())),
    "shape": (*SHAPES, *map(plural, SHAPES)),
    "size": tuple(chain.from_iterable(SIZE_WORDS.values())),
    "texture": tuple(chain.from_iterable(TEXTURE_WORDS.values())),
    "number": NUMBERS[1:],
}
"""What `scenes` draws from, by class."""
ENGLISH: Mapping[str, str] = {
    "colour": """
        grey gray silver gold beige tan cyan teal navy turquoise maroon magenta mauve lavender crimson""",
    "shape": """
        round circular triangular rectangular rectangle rectangles oval ovals pentagon pentagons sphere spheres cube
        cubes cone cones cylinder cylinders""",
    "size": """
        larger largest bigger biggest smaller smallest tall taller tallest short shorter shortest long longer longest
        wide wider narrow giant enormous""",
    "texture": "checked plaid stripes patterned rough fuzzy furry shiny",
    "tone": "dark darker darkest light lighter lightest bright brighter brightest pale dim",
    "picture": """
        picture pictures image images scene scenes photo photos photograph photographs background ground foreground
        shape shapes object objects thing things form forms pattern patterns colour colours color colors size sizes
        side sides corner corners part parts point points edge edges hole holes""",
    "relation": """
        left right above below over under higher highest lower lowest upper top bottom middle centre center beside
        besides behind beneath underneath between near nearby next front inside outside within beyond""",
    "number": """
        zero seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
        thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen first second third fourth
        fifth""",
    "quantifier": """
        all both each every some any many much more most few fewer fewest less least several only exactly enough half
        either""",
    "comparison": "than as like same equal different opposite other others another such",
    "determiner": "a an the this that these those",
    "pronoun": """
        i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself
        yourself himself herself itself ourselves themselves someone somebody something anyone anybody anything
        everyone everybody everything""",
    "question": "what which who whom whose when where why how",
    "preposition": """
        of in on at to for from by with without into onto off out up down about against along across among amongst
        around through throughout during before after until till since toward towards upon via per past despite
        except""",
    "conjunction": "and or but if so because while although though unless whereas whether yet",
    "auxiliary": """
        is are am was were be been being do does did done has have had having can could will would shall should may
        might must""",
    "negation": "no not none nothing neither nor never nobody nowhere cannot",
    "adverb": """
        there here now then also too very just together alone somewhere again away back still always often almost even
        ever already soon once perhaps""",
    "verb": """
        show shows showing shown contain contains see sees seeing seen lie lies lying stand stands standing count counts
        find finds look looks looking imagine differ differs make makes making come comes coming give gives giving take
        takes taking get gets getting go goes going sit sits sitting walk walks walking run runs running jump jumps
        jumping play plays playing hold holds holding wear wears wearing ride rides riding climb climbs climbing watch
        watches watching swim swims swimming""",
}
"""More words by class; none is in two."""


def _classes() -> dict[str, str]:
    drawn = {word: name for name, words in DRAWN.items() for word in words}
    return drawn | {word: name for name, words in ENGLISH.items() for word in words.split()}


CLASSES: Mapping[str, str] = _classes()
"""Word in small letters -> class."""


def word_class(piece: str) -> str:
    """The class of a piece of a text tokenizer.

    `continuation` for a WordPiece piece inside a word (`##ing`), `special` for a name in brackets (`[UNK]`), `number`
    for digits, `punctuation` where there is no letter or digit, else what CLASSES says, and `open` where it says
    nothing. Other tokenizers' pieces inside a word are taken for words.
    """
    word = piece.lstrip(WORD_STARTS).lower()
    if len(word) > 2 and word.startswith("##"):
        return "continuation"
    if len(word) > 2 and word.startswith("[") and word.endswith("]"):
        return "special"
    if word.isnumeric():
        return "number"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    return CLASSES.get(word, "open")
