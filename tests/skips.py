"""Every skip is printed with its reason, and one whose reason is not in expected_skips.txt fails the session."""

from collections.abc import Collection
from pathlib import Path

import pytest

EXPECTED_FILE = Path(__file__).parent / "expected_skips.txt"


def read_reasons(text: str) -> frozenset[str]:
    """The lines that are neither empty nor comments."""
    lines = (line.strip() for line in text.splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


class SkipReport:
    """A pytest plug-in. Under pytest-xdist the controller's own copy sees the reports of all workers."""

    def __init__(self, expected: Collection[str]) -> None:
        self.expected = expected
        self.reasons: dict[str, str] = {}
        """Skipped test, or file that was skipped whole -> reason."""

    @property
    def unexpected(self) -> dict[str, str]:
        """The skips whose reasons are not expected."""
        return {test: reason for test, reason in self.reasons.items() if reason not in self.expected}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test was skipped before or while it ran."""
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A whole file was skipped."""
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.reasons[report.nodeid] = reason_of(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Nothing else failed, but a skip is not expected: the session fails."""
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """All skips, then the unexpected ones."""
        if self.reasons:
            terminalreporter.section("skipped tests")
        for reason, test in sorted((reason, test) for test, reason in self.reasons.items()):
            terminalreporter.line(f"{reason}: {test}")
        for test, reason in sorted(self.unexpected.items()):
            terminalreporter.line(
                f"FAILED {test}: skipped, and '{reason}' is not in tests/expected_skips.txt", red=True, bold=True
            )


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, without pytest's own first word."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
