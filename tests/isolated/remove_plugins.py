"""Uninstall each plugin distribution from this environment, so that the core is left alone in it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

names = sorted({e.dist.name for e in metadata.entry_points(group="uda.plugins")} - {"uda-lightning"})
if names:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *names], check=True)
