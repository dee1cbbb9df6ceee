"""The table of `make faults`: what was injected, what was survived, what was lost."""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass
class Fault:
    """How often a fault was injected and survived, and what was there before and after it."""

    injected: int = 0
    survived: int = 0
    before: int = 0
    after: int = 0
    unit: str = ""

    def lost(self) -> str:
        """Say how much was lost, if it was measured."""
        lost = f"{self.before - self.after} of {self.before} {self.unit}"
        return lost if self.unit else "not measured"


FAULTS: dict[str, Fault] = defaultdict(Fault)


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that records an injected fault, survived if the whole test passes."""
    recorded = request.node.faults = []

    def record(name: str, times: int = 1, before: int = 0, after: int = 0, unit: str = "") -> None:
        recorded.append((name, times, before, after, unit))

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Count the faults that a test recorded, or the test itself if it failed before."""
    report = yield
    ended = report.when == "call" or (report.when == "setup" and report.failed)
    if ended and not report.skipped and "faults" in getattr(item, "fixturenames", ()):
        nothing_recorded = [(f"({item.name})", 1, 0, 0, "")]
        for name, times, before, after, unit in getattr(item, "faults", []) or nothing_recorded:
            fault = FAULTS[name]
            fault.injected += times
            fault.survived += times * report.passed
            fault.before, fault.after = fault.before + before, fault.after + after
            fault.unit = unit or fault.unit
    return report


def fault_lines(found: dict[str, Fault]) -> list[str]:
    """Format the table of `make faults`: its header, and a line for each fault."""
    rows = [(name, fault.injected, fault.survived, fault.lost()) for name, fault in found.items()]
    rows = [("fault", "injected", "survived", "lost"), *rows]
    return [
        f"{name:60s} {injected:>8} {survived:>8}  {lost}" for name, injected, survived, lost in rows
    ]


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table after the tests of `make faults`."""
    if os.environ.get("FAULTS") == "long":
        terminalreporter.write_line("\n" + "\n".join(fault_lines(FAULTS)))
