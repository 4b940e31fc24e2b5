"""What the server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """One server's counters."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names: Any = {"namespace": "mlx_pararnn", "registry": self._registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **names)
        self.read = Counter("prompt_tokens", "Tokens of prompts that were read", **names)
        self.cached = Counter("cached_tokens", "Tokens of prompts that a stored state had read", **names)
        self.generated = Counter("generated_tokens", "Tokens generated", **names)
        self.running = Gauge("requests_running", "Answers that are being read or generated", **names)
        self.waiting = Gauge("requests_waiting", "Answers that wait for a place", **names)
        self.first_token = Histogram("time_to_first_token_seconds", "From request to first text", **names)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
