"""Where a served model comes from. Free of torch: Ray's driver builds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """A model folder, and the alias of the registry it was found by, if it was.

    Attributes:
        name: what clients pass as `model`.
        folder: a model folder every node can read.
        address: `models:/NAME/VERSION` that `folder` belongs to; empty for a folder that is nobody's version.
        alias: of `address`'s model, which the server follows when it moves; empty = nothing to follow.
        tracking_uri: the registry of `alias`.
        adapter: folder of a LoRA adapter that is merged into the weights as they are loaded; empty = none.
        parent: what the model without the adapter is called; empty where there is no adapter.
    """

    name: str
    folder: str
    address: str = ""
    alias: str = ""
    tracking_uri: str = ""
    adapter: str = ""
    parent: str = ""

    @property
    def weights(self) -> str:
        """The folder that makes these weights what they are: the adapter's, if there is one."""
        return self.adapter or self.folder

    @property
    def registered_name(self) -> str:
        """NAME of `models:/NAME/VERSION`."""
        return self.address.removeprefix("models:/").rpartition("/")[0]
