"""Set-up that every test shares."""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

# A suite started in the background of a script inherits "ignore" for Ctrl-C, and so would every command it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU fused kernels run in Triton's interpreter. `triton.jit` asks once, when a module with kernels (Triton's
# own library included) is imported, so this comes before any of them. What needs the compiler runs in a child process
# without the variable (tests/kernels/test_ahead_of_time.py).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published benchmark files: FEWSTEP_BENCHMARKS, or shared/data/benchmarks beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "benchmarks"
    folder = Path(os.environ.get("FEWSTEP_BENCHMARKS") or beside)
    if not folder.is_dir():
        pytest.skip("no published benchmark files: set FEWSTEP_BENCHMARKS to their folder")
    return folder


# Jobs of tests that name no store of their own must not track into the checkout's.
os.environ["MLFLOW_TRACKING_URI"] = (
    f"sqlite:///{Path(tempfile.mkdtemp(prefix='fewstep-tests-')) / 'mlflow.db'}"
)


@pytest.fixture(scope="session")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server over PostgreSQL; over sqlite where that cannot be started, which is said."""
    from tests.tracking_server import NoPostgres, postgres, tracking_server

    folder = tmp_path_factory.mktemp("database-server")
    with ExitStack() as stack:
        try:
            backend = stack.enter_context(postgres(folder))
        except NoPostgres as reason:
            warnings.warn(
                f"the MLflow server of this run is over sqlite, not PostgreSQL: {reason}", stacklevel=1
            )
            backend = ""
        yield stack.enter_context(tracking_server(folder, backend)).url
