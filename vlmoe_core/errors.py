"""What can go wrong, by room. The message says what is wrong, with the values, and what to do next."""


class VlmoeError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1
    """What the command line returns."""
    of_all = False
    """Every process of a run raises it at the same time, so that one of them can tell it for all."""


class UsageError(VlmoeError):
    """What was typed can't be done: an unknown name, a path that is not there, options that exclude each other."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, or an override of it, is not valid."""


class DataError(VlmoeError):
    """A source, a file or an example can't be read."""


class TokenizerError(VlmoeError):
    """A text or visual tokenizer can't be fitted, loaded or used."""


class TrainError(VlmoeError):
    """A run can't go on."""


class CheckpointError(VlmoeError):
    """A checkpoint is missing, incomplete, altered or does not fit."""


class HubError(VlmoeError):
    """The Hub can't be reached, or refuses what was asked of it."""
