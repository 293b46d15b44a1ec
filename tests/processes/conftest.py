"""The whole cluster of the acceptance tests, for those that take longer."""

from tests.acceptance.conftest import client, cluster

__all__ = ["client", "cluster"]
