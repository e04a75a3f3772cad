"""What an address in the model registry stands for at one moment: an alias moves, a version does not."""

from __future__ import annotations

import re

from fewstep.platform.mlflow_store import import_mlflow, open_client, reporting

_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w-]+)")


def pinned_address(model_uri: str, tracking_uri: str) -> str:
    """`models:/NAME/VERSION` for `models:/NAME@ALIAS`; any other address, and an alias that nobody has, as it is.

    Raises:
        ConfigError, ResourceError: a store that does not exist or does not answer.
    """
    parts = _ALIAS.fullmatch(model_uri)
    if parts is None:
        return model_uri
    exceptions = import_mlflow("mlflow.exceptions")
    client = open_client(tracking_uri, create=False)
    with reporting(tracking_uri):
        try:
            version = client.get_model_version_by_alias(parts["name"], parts["alias"]).version
        except exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return model_uri
    return f"models:/{parts['name']}/{version}"
