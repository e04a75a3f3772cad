"""What earlier runs could not tell their store: delivered by whoever opens that store next."""

from __future__ import annotations

import logging
from pathlib import Path

from fewstep.platform.courier import deliver
from fewstep.platform.errors import ResourceError
from fewstep.platform.mlflow_delivery import Delivery
from fewstep.platform.mlflow_store import absolute_uri, spool_root
from fewstep.platform.spool import abandoned_spools

_logger = logging.getLogger(__name__)


def deliver_leftovers(uri: str, root: Path | None = None) -> int:
    """Delivers the spools of runs whose process is gone; returns how many records the store took.

    A store that fails is told of in the log, and the rest waits for the next time.

    Args:
        uri: the store.
        root: where the spools are; None = where `MlflowTracker` puts them.
    """
    delivered = 0
    uri = absolute_uri(uri)
    for spool in abandoned_spools(root or spool_root(uri)):
        waiting, refused = spool.num_pending, len(spool.refused())
        try:
            deliver(spool, Delivery(uri, spool))
        except ResourceError as error:
            _logger.warning("records of an earlier run go on waiting in %s: %s", spool.folder, error)
        refused = len(spool.refused()) - refused
        count = waiting - spool.num_pending - refused
        spool.close()
        delivered += count
        if not count and not refused:
            continue
        _logger.warning(
            "records of an earlier run that had waited in %s: %d delivered, %d refused",
            spool.folder,
            count,
            refused,
        )
    return delivered
