"""The cluster of pretend hosts that the tests in this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hosts.cluster import Cluster, obstacle


@pytest.fixture(scope="session")
def booted_cluster() -> Iterator[Cluster]:
    """The cluster, booted once. Tests take ``cluster``, which leaves it as it was."""
    reason = obstacle()
    if reason:
        (pytest.fail if os.environ.get("MPGPT_TEST_HOSTS") == "required" else pytest.skip)(
            f"no pretend hosts: {reason}"
        )
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(booted_cluster: Cluster) -> Iterator[Cluster]:
    """All hosts on, idle gigabit Ethernet between them, nothing running. Whatever a test leaves running fails it."""
    yield booted_cluster
    left = booted_cluster.reset()
    assert not left, "left running:\n" + "\n".join(left)
