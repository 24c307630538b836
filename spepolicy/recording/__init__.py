"""Recordings of real hosts' memory management: read from kernel traces, kept compactly, shipped with the package.

`open_recording("numa")` opens a shipped one, `read_log` a kernel trace; `save` and `load` handle the compact form.
"""

from __future__ import annotations

from spepolicy.recording.catalogue import DEFAULT, open_recording, shipped
from spepolicy.recording.compact import load, save
from spepolicy.recording.model import NO_NOTIFIER, Recording
from spepolicy.recording.reader import read_log

__all__ = ["DEFAULT", "NO_NOTIFIER", "Recording", "load", "open_recording", "read_log", "save", "shipped"]
