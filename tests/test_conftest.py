"""The rules that hold for every test."""

import pytest
import torch

from tests.skips import EXPECTED_FILE, SkipReport, read_reasons

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="needs a GPU")
def test_gpu():
    pass

def test_inside():
    pytest.skip("{reason}")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""
EXPECTED = {"needs a GPU", "../shared is absent"}


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(100).isnan().all()
    assert torch.zeros(3).resize_(5)[3:].isnan().all()


def test_expected_skips_are_printed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_some=TESTS.format(reason="../shared is absent"))
    report = SkipReport(EXPECTED)
    result = pytester.runpytest_inprocess("-p", "no:hypothesispytest", plugins=[report])
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        ["*skipped tests*", "../shared is absent: test_some.py::test_inside", "needs a GPU: test_some.py::test_gpu"]
    )
    result.stdout.no_fnmatch_line("*FAILED*")
    assert report.unexpected == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_skip_fails(pytester: pytest.Pytester, workers: int) -> None:
    pytester.makepyfile(
        test_some=TESTS.format(reason="tired"), test_whole="import pytest\npytest.importorskip('no_such_package')"
    )
    report = SkipReport(EXPECTED)
    result = pytester.runpytest_inprocess("-p", "no:hypothesispytest", "-n", str(workers), plugins=[report])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["FAILED test_some.py::test_inside: skipped, and 'tired' is not in *"])
    assert set(report.unexpected) == {"test_some.py::test_inside", "test_whole.py"}


def test_expected_reasons_are_read_without_comments() -> None:
    assert read_reasons("# a\n\nb c \n") == {"b c"}
    assert "../shared is absent" in read_reasons(EXPECTED_FILE.read_text("utf-8"))
