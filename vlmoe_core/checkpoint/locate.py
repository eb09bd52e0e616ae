"""From what a user names to the folder of a checkpoint or model, on this machine or on the Hub."""

from pathlib import Path

from vlmoe_core.checkpoint.layout import LEFTOVER_NAME, MANIFEST, STEP_NAME, list_checkpoints, steps_in
from vlmoe_core.checkpoint.manifest import read_manifest
from vlmoe_core.errors import CheckpointError, HubError, UsageError
from vlmoe_core.hf import Address, fetch_folder, first_file, is_hub


def resolve(path: Path) -> Path:
    """The checkpoint or model folder that a path means: itself, or the newest in a checkpoints folder or a run folder.

    A path `hf-hub:ORG/NAME[@REVISION]` means a model on the Hub, which is fetched.

    Raises:
        UsageError: there is no such folder, or it holds no checkpoint.
        CheckpointError: the folder is the leftover of an interrupted save.
        HubError: the Hub does not give the model.
    """
    if is_hub(str(path)):
        return fetch_model(str(path))
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}: there is no such folder; give a run folder or a checkpoint folder")
    name = path.resolve().name
    if LEFTOVER_NAME.fullmatch(name):
        raise CheckpointError(f"{path} is what an interrupted save left; give a folder named like step-00000100")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(name):
        return path
    found = steps_in(path) or list_checkpoints(path)
    if not found:
        raise UsageError(f"{path} holds no checkpoint; give a run folder or a checkpoint folder (step-00000100)")
    return found[-1]


def fetch_model(spec: str) -> Path:
    """Fetch the model folder in a repository of the Hub: its manifest, and what that lists.

    Args:
        spec: `hf-hub:ORG/NAME[@REVISION]`.

    Returns:
        The folder in the cache. What is cached is not fetched again.

    Raises:
        HubError: the Hub does not give it, or the repository holds no model of this package.
    """
    address = Address.parse(spec)
    manifest = first_file(spec, [MANIFEST])
    if manifest is None:
        raise HubError(f"{address} holds no model of vlmoe (no {MANIFEST}); other weights come in by vlmoe import")
    # Both fetches at one commit, though somebody may push between them.
    at_commit = str(Address(address.repo, manifest.parent.name))
    return fetch_folder(at_commit, [MANIFEST, *read_manifest(manifest.parent).files])
