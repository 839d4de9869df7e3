"""The metrics that Prometheus scrapes.

Knows: names, units and labels of metrics.
Must not know: how any figure comes about.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpgpt.engine.engine import Stream
from mpgpt_api.service import Service
from mpgpt_api.watch import Watch

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mpgpt_requests", "Requests by path and status; streams by the status that they began with",
            ("path", "status"), registry=registry,
        )  # fmt: skip
        self._answers = Counter("mpgpt_answers", "Answers that are over, by why", ("finish_reason",), registry=registry)
        self._tokens = Counter("mpgpt_tokens", "Tokens of answers that are over", ("kind",), registry=registry)
        self._queued = Histogram(
            "mpgpt_queue_seconds", "From coming in to having a slot", buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "mpgpt_time_to_first_token_seconds", "From coming in to the first token", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "mpgpt_answer_seconds", "From coming in to the last token", buckets=SECONDS, registry=registry
        )

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def ended(self, stream: Stream) -> None:
        self._answers.labels(stream.finish_reason).inc()
        self._tokens.labels("prompt").inc(len(stream.request.ids))
        self._tokens.labels("generated").inc(len(stream.ids))
        if stream.started:
            self._queued.observe(stream.started - stream.submitted)
        if stream.first_token:
            self._first.observe(stream.first_token - stream.submitted)
            self._whole.observe(stream.finished - stream.submitted)

    def watch(self, service: Service, watch: Watch) -> None:
        self._registry.register(_Ring(service, watch))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Ring(Collector):
    """Metrics of values that other modules count."""

    def __init__(self, service: Service, watch: Watch) -> None:
        self._service, self._watch = service, watch

    def collect(self) -> Iterator[Metric]:
        engine, watch = self._service.engine, self._watch
        yield GaugeMetricFamily("mpgpt_running", "Sequences in the ring", value=engine.running)
        yield GaugeMetricFamily("mpgpt_waiting", "Sequences in the queue", value=engine.waiting)
        yield GaugeMetricFamily("mpgpt_slots", "Sequences that can run at once", value=self._service.slots)
        yield GaugeMetricFamily("mpgpt_stalled", "1 while nothing comes out of the ring", value=int(watch.stalled))
        seconds = CounterMetricFamily("mpgpt_stage_seconds", "Where a rank's time went", labels=("rank", "what"))
        steps = CounterMetricFamily("mpgpt_stage_steps", "Steps that a rank computed", labels=("rank",))
        tokens = CounterMetricFamily("mpgpt_stage_tokens", "Tokens that a rank computed", labels=("rank",))
        memory = GaugeMetricFamily("mpgpt_peak_rss_bytes", "The most memory that a rank had", labels=("rank",))
        for rank in watch.ranks():
            name, total = (str(rank.rank),), watch.totals[rank.rank]
            steps.add_metric(name, total.steps)
            tokens.add_metric(name, total.tokens)
            memory.add_metric(name, rank.peak_rss)
            for what in ("compute", "wait", "send", "other"):
                seconds.add_metric((*name, what), getattr(total, f"{what}_s"))
        yield from (seconds, steps, tokens, memory)
        yield from self._devices()

    def _devices(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("mpgpt_ipad_requests", "Requests to a rank's iPad", labels=("rank",))
        falls = CounterMetricFamily(
            "mpgpt_ipad_fallbacks", "How often a rank had to compute in its iPad's stead", labels=("rank",)
        )
        away = CounterMetricFamily("mpgpt_ipad_away_seconds", "For how long an iPad was away", labels=("rank",))
        for place in self._watch.reports:
            if place.node.kind == "ipad":
                name, total = (str(place.node.rank),), self._watch.totals[place.node.rank]
                requests.add_metric(name, total.device_requests)
                falls.add_metric(name, total.device_falls)
                away.add_metric(name, total.device_away_s)
        yield from (requests, falls, away)
