"""`vlmoe env`: what a bug report needs."""

from vlmoe_cli.options import JsonOption
from vlmoe_cli.output import Output

# tutel is on no package index; pip builds it from this commit.
TUTEL = "git+https://github.com/microsoft/tutel@82af7aad9fc3ec981395ba97e7242a480984a55e"
ABSENT = {"tutel": f"not installed; optional, for GPU clusters: pip install --no-build-isolation {TUTEL}"}


def env(json: JsonOption = False) -> None:
    """Print versions, devices and folders, for bug reports."""
    from vlmoe_core.data.index import cache_folder
    from vlmoe_core.environment import environment
    from vlmoe_core.recipe.catalogue import shipped

    found = environment()
    packages = found.pop("packages")
    found |= {"cache": str(cache_folder()), "recipes": str(shipped().root)}
    out = Output(json)
    out.record({name: _line(value) for name, value in found.items()})
    out.record({name: version or ABSENT.get(name, "not installed") for name, version in packages.items()}, "\npackages")
    out.data({**found, "packages": packages})


def _line(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return (", ".join(map(str, value)) or "cpu only") if isinstance(value, list) else value
