"""Names of the transports; free of torch, so that configurations can import it."""

from __future__ import annotations

from typing import Literal

TransportName = Literal["auto", "shared_memory", "object_store", "broadcast"]
