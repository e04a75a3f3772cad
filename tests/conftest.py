"""Set-up that every test shares."""

from __future__ import annotations

import signal

# A suite started in the background of a script inherits "ignore" for Ctrl-C, and so would every command it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
