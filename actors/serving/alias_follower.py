"""Keeps an engine on the version that an alias of the model registry names; requests go on across the swap."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from fewstep.actors.serving.engine_source import NewWeights
from fewstep.actors.serving.model_source import ModelSource
from fewstep.actors.serving.service import CompletionService, Origin, created_of
from fewstep.kernels.model.config import ComputeDtype
from fewstep.platform.errors import CheckpointError, FewstepError
from fewstep.platform.mlflow_registry import alias_address, find_model

logger = logging.getLogger(__name__)


class AliasFollower:
    """Looks at an alias from time to time and swaps weights in when it has moved.

    A version that cannot be loaded, whose files are not those that were registered, that is of another model, or that
    does not generate is refused before the engine sees it: the old weights stay, `CompletionService.origin` says why, and
    that version is not tried again until the alias moves once more. A registry that does not answer is asked again.

    Args:
        service: of the model at `source.address`.
        source: with an alias.
        dtype: that the engine computes in.
        poll_s: seconds between two looks.
    """

    def __init__(
        self, service: CompletionService, source: ModelSource, dtype: ComputeDtype, poll_s: float
    ) -> None:
        self._service, self._source, self._dtype, self._poll_s = service, source, dtype, poll_s
        self._seen = source.address
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fewstep-alias", daemon=True)

    def start(self) -> None:
        """Look from now on, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop; a swap under way is finished."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> bool:
        """One look; whether other weights were swapped in.

        Raises:
            FewstepError: the registry does not answer or has lost the model; the weights stay.
        """
        source = self._source
        address = alias_address(source.registered_name, source.alias, source.tracking_uri)
        if address is None or address == self._seen:
            return False
        service = self._service
        try:
            folder = find_model(address, source.tracking_uri).folder
            service.host.load_weights(NewWeights(source, address, folder, self._dtype))
        except CheckpointError as error:
            self._seen = address
            service.origin = replace(service.origin, refused=f"{address}: {error}")
            logger.error("%s stays at %s: %s", source.name, service.origin.address, error)
            return False
        self._seen = address
        service.model = replace(service.model, created=created_of(folder))
        service.origin = Origin(address)
        logger.info("%s now serves %s (%s)", source.name, address, service.host.stats()["weight_version"])
        return True

    def _run(self) -> None:
        while not self._closing.wait(self._poll_s):
            try:
                self.check()
            except FewstepError as error:
                logger.warning("the alias of %s cannot be read: %s", self._source.name, error)
            except Exception:
                # Whatever the registry's client raises must not end the following of the alias.
                logger.exception("the alias of %s cannot be followed", self._source.name)
