"""Counts and times of a server, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
OUTCOMES = ("answered", "refused", "failed")
"""Of a request: with actions, with what is wrong with it, or with an error of the policy."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Metrics of one server.

    Attributes:
      requests: by outcome.
      request_seconds, policy_seconds: from a message's arrival to its answer being sent, and of these in the policy.
      connections: that are open.
      opened: connections so far.
      unauthorized: attempts without the right token.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("como_serve_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.request_seconds = Histogram(
            "como_serve_request_seconds", "From message to answer.", buckets=_SECONDS, registry=registry
        )
        self.policy_seconds = Histogram(
            "como_serve_policy_seconds", "Of a request, in the policy.", buckets=_SECONDS, registry=registry
        )
        self.connections = Gauge("como_serve_connections", "Open connections.", registry=registry)
        self.opened = Counter("como_serve_opened_connections", "Connections so far.", registry=registry)
        self.unauthorized = Counter("como_serve_unauthorized", "Attempts without the token.", registry=registry)
        # Zeros from the start, so that a first failure is seen as an increase.
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

    def render(self) -> str:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry).decode()
