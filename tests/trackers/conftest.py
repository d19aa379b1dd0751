"""Trackers in an environment of their own; `make test-trackers` runs these tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """Skip where they are not."""
    for name in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(name, reason=f"{name} is not installed; `make test-trackers` installs it")
