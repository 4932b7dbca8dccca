"""Lets the benchmarks import `measure`, however pytest was started, and prints their tables at the end."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter) -> None:
    from measure import TABLES

    for line in (line for table in TABLES for line in table.lines()):
        terminalreporter.write_line(line)
