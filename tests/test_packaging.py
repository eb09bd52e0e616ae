"""What is published works: built, installed into another empty environment, run from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT_RUN = (
    "train.steps=2",
    "train.eval_examples=4",
    "data.workers=0",
    "tokenizers.text.fit_texts=200",
    "tokenizers.visual.fit_images=8",
    "tokenizers.visual.codebook_size=16",
    "optim.warmup_steps=1",
    "batch.size.image=4",
    "batch.size.text=4",
    "batch.size.pair=4",
    "batch.micro.image=4",
    "batch.micro.text=4",
    "batch.micro.pair=4",
)


@dataclass(frozen=True)
class Built:
    """What the build made."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution, and the wheel built from it, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    return Built(next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel, and sees the dependencies of this one without its vlmoe."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = str(programs(folder) / "python")
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(built.wheel)],
        folder,
    )
    where = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip()
    # A folder that a .pth file names is searched, but its own .pth files, the editable vlmoe's too, are not read.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(where) / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return programs(folder)


def programs(environment: Path) -> Path:
    return environment / ("Scripts" if os.name == "nt" else "bin")


def run(
    command: list[str], folder: Path, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "VLMOE"))}
    done = subprocess.run(
        command, cwd=folder, env=kept | (variables or {}), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def vlmoe(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program; whoever asks the network meets a closed door."""
    closed = "http://127.0.0.1:9"
    offline = {"http_proxy": closed, "https_proxy": closed, "all_proxy": closed, "no_proxy": ""}
    return run([str(installed / "vlmoe"), *arguments], folder, offline | {"VLMOE_CACHE": str(folder.parent / "cache")})


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_wheel_holds_packages_and_recipes_once(built: Built) -> None:
    names = zipfile.ZipFile(built.wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlmoe_core", "vlmoe_cli"}
    shipped = "vlmoe_core/recipe/shipped/"
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {name.removeprefix(shipped) for name in names if name.startswith(shipped)} >= recipes
    assert sum(name.endswith("quickstart/pretrain.yaml") for name in names) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "vlmoe_core/py.typed" in names


def test_the_source_distribution_holds_what_the_tests_need(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "tests/expected_skips.txt", ".ci/run"}
    assert needed | {"recipes/quickstart/pretrain.yaml", "pyproject.toml"} <= names


def test_a_checkout_holds_no_second_copy_of_the_recipes() -> None:
    assert not (ROOT / "vlmoe_core" / "recipe" / "shipped").exists()


def test_the_installed_package_is_not_the_checkout(installed: Path, empty: Path) -> None:
    code = "import vlmoe_core, vlmoe_cli; print(vlmoe_core.__file__); print(vlmoe_cli.__file__)"
    for line in run([str(installed / "python"), "-c", code], empty).stdout.split():
        assert Path(line).is_relative_to(installed.parent)


def test_recipes_are_listed_from_an_empty_folder(installed: Path, empty: Path) -> None:
    assert "quickstart/pretrain" in vlmoe(installed, empty, "recipes", "ls").stdout
    assert list(empty.iterdir()) == []


def test_the_quick_start_runs_from_an_empty_folder(installed: Path, empty: Path) -> None:
    settings = [word for setting in SHORT_RUN for word in ("--set", setting)]
    vlmoe(installed, empty, "pretrain", "quickstart/pretrain", *settings)
    run_folder = empty / "runs" / "quickstart-pretrain"
    assert (run_folder / "metrics.jsonl").stat().st_size > 0
    assert (run_folder / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert [path.name for path in empty.iterdir()] == ["runs"]
