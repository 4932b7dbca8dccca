"""Lets the benchmarks import `measure`, however pytest was started, and prints their tables at the end."""

import sys
from pathlib import Path

from fasttune.memory import keep_pages

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure() -> None:
    """For every contender: without it PyTorch's own forms, which allocate more, look worse. Peak memory is
    measured in processes that do not come by here."""
    keep_pages()


def pytest_terminal_summary(terminalreporter) -> None:
    from measure import TABLES

    for line in (line for table in TABLES for line in table.lines()):
        terminalreporter.write_line(line)
