"""What tests take, and the rule that one of more than ten seconds says so by `slow` (but on a GPU,
where most of it is compilation).

A test's seconds are those of a clock on a quiet machine, and of the CPU on a busy one: of its own process, of those
that it waited for, and of warm ones. Set-up counts apart, since it may be that of many tests.
"""

import os
import resource
from collections import Counter

import pytest

from helpers import warm

MOST = 20.0 if os.environ.get("CI") else 10.0  # seconds of an unmarked test; machines of CI differ in speed
CPU = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Of this process, its children that have ended, and warm processes that have."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + warm.cpu_seconds()


def too_long(seconds: float, cpu: float, load: float, cores: int) -> bool:
    """Whether an unmarked test took too long, by the clock and by the CPU, at a load average of so many cores."""
    return (cpu if load > cores else seconds) > MOST


class Durations:
    """Fails an unmarked test that takes over ten seconds; with `--durations N`, tells CPU seconds as well."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        item.stash[CPU] = cpu_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        now = cpu_seconds()
        report.cpu, item.stash[CPU] = now - item.stash.get(CPU, now), now
        judged = call.when == "call" and report.passed and not item.keywords.keys() & {"slow", "gpu"}
        if judged and too_long(call.duration, report.cpu, os.getloadavg()[0], os.cpu_count() or 1):
            report.outcome = "failed"
            report.longrepr = f"took {call.duration:.1f} s ({report.cpu:.1f} s of CPU): mark it slow"

    def pytest_terminal_summary(self, terminalreporter, config):
        if not config.option.durations:
            return
        tests, files = Counter(), Counter()
        for report in (report for reports in terminalreporter.stats.values() for report in reports):
            if hasattr(report, "cpu"):
                tests[f"{report.when:8} {report.nodeid}"] += report.cpu
                files[report.nodeid.partition("::")[0]] += report.cpu
        for kind, found in (("files", files), ("tests", tests)):
            terminalreporter.section(f"CPU seconds of {kind}: {sum(found.values()):.0f}")
            for name, seconds in found.most_common(config.option.durations):
                terminalreporter.line(f"{seconds:7.2f} {name}")
