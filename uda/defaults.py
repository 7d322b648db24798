"""Defaults that commands name before anything heavy is imported."""

from __future__ import annotations

#: Score that chooses the epoch, and between trials, where nothing else is asked for. Of all scores it loses least to
#: the oracle on the two suites of docs/selection.md.
SCORE = "transfer_score"
