"""What a check says: an error that names plugin, check and remedy, or a line of a report."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field


class CheckFailed(AssertionError):
    """A check of a plugin did not hold.

    Attributes:
        check: name of the check, as in :data:`uda.testing.CHECKS`.
    """

    def __init__(self, plugin: str, check: str, wrong: str, remedy: str) -> None:
        super().__init__(f"{plugin}: check '{check}' failed: {wrong}\n  What to do: {remedy}")
        self.plugin, self.check = plugin, check


class PluginWarning(UserWarning):
    """Something that a careful author would repair, though the plugin works."""


@dataclass
class Report:
    """Result of :func:`uda.testing.check_plugin`.

    Attributes:
        plugin: class name.
        passed: names of the checks that held.
        skipped: reason by name of the checks that did not apply.
        warnings: what a careful author would repair.
        objectives: names of the objectives that were seen in training.
        seconds: duration by check.
    """

    plugin: str
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Keep a warning and issue it."""
        self.warnings.append(text)
        warnings.warn(f"{self.plugin}: {text}", PluginWarning, stacklevel=4)

    def __str__(self) -> str:
        lines = [f"{self.plugin}: {len(self.passed)} checks passed"]
        lines += [f"  passed   {name:<14} {self.seconds.get(name, 0.0):6.1f} s" for name in self.passed]
        lines += [f"  skipped  {name:<14} {reason}" for name, reason in self.skipped.items()]
        lines += [f"  warning  {text}" for text in self.warnings]
        return "\n".join(lines)
