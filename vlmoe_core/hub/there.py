"""What a repository of the Hub holds already, as far as a push has to know it."""

from collections.abc import Sequence
from pathlib import Path

from vlmoe_core.checkpoint.layout import MANIFEST
from vlmoe_core.hf import hub_errors, quiet
from vlmoe_core.hub.card.build import CARD
from vlmoe_core.hub.card.folder import ENVIRONMENT, FIGURES, METRICS, REPORT
from vlmoe_core.train.results import FOLDER as RESULTS

KNOWN = (MANIFEST, CARD, f"{RESULTS}/*.json")
"""Tell whose weights are there, what was measured of them, and what somebody wrote."""
TOLD = (*KNOWN, METRICS, ENVIRONMENT, f"{REPORT}/routing.json", *FIGURES)
"""All that a card tells of, beside the model."""


def published(repo: str, revision: str | None = None, files: Sequence[str] = KNOWN) -> Path | None:
    """Fetch those files, as far as they are there, into the cache of huggingface_hub.

    Args:
        repo: `ORG/NAME`.
        revision: branch or `refs/pr/N`; None: the default branch.
        files: patterns.

    Returns:
        Their folder; None: there is no such repository or branch, or the token may not see it.

    Raises:
        HubError: the Hub can't be reached or fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with hub_errors(f"nothing could be pushed to {repo}"), quiet(bars=False):
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
