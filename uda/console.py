"""What a run prints: short parser errors, and no messages that name no fault of the user."""

from __future__ import annotations

import logging
import re
import warnings

_NOISE = (
    "does not have many workers",
    "LeafSpec",
    "exists and is not empty",
    "callbacks used to create the checkpoint",
    "\N{ELECTRIC LIGHT BULB} Tip",
    "TPU available",
    "GPU available: False",
    "sync_dist=True",
    "to estimate number of stepping batches",
)


def quiet() -> None:
    """Leave out messages that name no fault of the user."""
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(text)}")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if not any(f is _keep for f in logger.filters):
            logger.addFilter(_keep)


def _keep(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)


def short_parser_error(text: str) -> str:
    """What matters of a parser error: the key and the innermost reason."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    if found := re.search(r"arguments are required: (.*)", text):
        names = ", ".join("--" + n.strip().split(".", 1)[-1] for n in found[1].split(","))
        return f"missing: {names}. Give them in a config (--config FILE) or on the command line."
    keys = re.findall(r'[Pp]arser key "([^"]+)"', text)
    reasons = re.findall(r"(Expected .*|[^\n]*expects? [^\n]*|[^\n]*is required[^\n]*)", text)
    if keys and reasons:
        classes = re.findall(r"Problem with given class_path '([^']+)'", text)
        within = f"{keys[0]} ({classes[-1]}): " if classes else ""
        path = within + ".".join(dict.fromkeys(keys[1:] if classes and len(keys) > 1 else keys))
        reason = re.sub("<class '([^']+)'>", r"\1", reasons[0].strip())
        return f"{path}: {reason}"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n  ".join(lines if len(lines) <= 6 else [*lines[:5], "..."])
