"""Prometheus metrics: vLLM's names with our prefix, so that dashboards need one replacement.

What the gateway sees itself (latencies, tokens, errors) is counted as it happens; what the broker knows (queues,
groups) is asked for at each scrape. Labels are models that exist and codes that we define, never a sender's text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace._version import __version__
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.client import Completion

__all__ = ["Meter", "Metrics"]

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.075, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        labels = ("model_name",)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"headrace_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        def counter(name: str, text: str, label_names: tuple[str, ...] = labels) -> Counter:
            return Counter(f"headrace_{name}", text, label_names, registry=registry)

        Gauge("headrace_build_info", "Version of the gateway.", ("version",), registry=registry).labels(
            __version__
        ).set(1)
        self.active = Gauge("headrace_gateway_requests_active", "Generations in work.", labels, registry=registry)
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.", _SLOW)
        self.between = histogram("inter_token_latency_seconds", "From one token to the next.", _FAST)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to its last token.", _SLOW)
        self.prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.output_sizes = histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self.prompt = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generated = counter("generation_tokens", "Tokens sent to readers.")
        self.success = counter("request_success", "Finished choices.", ("model_name", "finished_reason"))
        self.rejected = counter("gateway_rejected", "Failed generations by error code.", ("code",))
        self.cancelled = counter("gateway_cancelled", "Generations ended early, by whom.", ("by",))
        self.http = counter("http_requests", "Responses by route.", ("method", "handler", "status"))
        self._broker = _BrokerMetrics()
        registry.register(self._broker)

    def meter(self, model: str) -> Meter:
        """Measures one request from now on."""
        return Meter(self, model)

    def render(self, report: Mapping[str, Any] | None) -> bytes:
        """The text format; `report` is the broker's status, None if it did not answer."""
        self._broker.report = report
        return generate_latest(self.registry)


class Meter:
    """Measures one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._started = time.monotonic()
        self._last: float | None = None
        self._open = True
        # Looked up once, for these two are needed for every token.
        self._between = metrics.between.labels(model)
        self._generated = metrics.generated.labels(model)
        metrics.active.labels(model).inc()

    def tokens(self, count: int) -> None:
        """That many tokens arrived."""
        if not count:
            return
        now = time.monotonic()
        if self._last is None:
            self._metrics.first_token.labels(self._model).observe(now - self._started)
        else:
            self._between.observe((now - self._last) / count)
        self._last = now
        self._generated.inc(count)

    def finished(self, completions: Iterable[Completion]) -> None:
        """All is generated."""
        metrics = self._metrics
        metrics.whole.labels(self._model).observe(time.monotonic() - self._started)
        for completion in completions:
            metrics.prompt.labels(self._model).inc(completion.usage.prompt_tokens)
            metrics.prompt_sizes.labels(self._model).observe(completion.usage.prompt_tokens)
            metrics.output_sizes.labels(self._model).observe(completion.usage.completion_tokens)
            for choice in completion.choices:
                metrics.success.labels(self._model, choice.finish_reason).inc()
        self._close()

    def read(self, prompt_tokens: int) -> None:
        """All texts were read, for vectors."""
        metrics = self._metrics
        metrics.whole.labels(self._model).observe(time.monotonic() - self._started)
        metrics.prompt.labels(self._model).inc(prompt_tokens)
        metrics.prompt_sizes.labels(self._model).observe(prompt_tokens)
        metrics.success.labels(self._model, "embedded").inc()
        self._close()

    def failed(self, error: HeadraceError) -> None:
        """It ended with an error."""
        if self._open:
            self._metrics.rejected.labels(error.code).inc()
        self._close()

    def left(self) -> None:
        """The reader left before the end; nothing happens if the end was told before."""
        if self._open:
            self._metrics.cancelled.labels("client").inc()
        self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._metrics.active.labels(self._model).dec()


# Gauges of a group's load (see Engine.load_gauges) -> metric, whether it only grows, and what it says.
_LOAD = {
    "kv_blocks_free": ("kv_blocks_free", False, "Free blocks of the KV cache."),
    "kv_blocks_total": ("kv_blocks", False, "Blocks of the KV cache."),
    "prefix_queries": ("prefix_cache_queries", True, "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", True, "Prompt tokens found in the prefix cache."),
    "preemptions": ("num_preemptions", True, "Streams put back to make room."),
    "graph_replays": ("graph_replays", True, "Steps computed, and batches of sources read, by a CUDA graph."),
    "compilations": ("compilations", True, "Kernels compiled since it was ready; more than 0 is a gap in warming up."),
}
# The gateway counts these per model under the plain names, for what passes through it.
_OWN_NAMES = {"requests_total", "tokens_total", "prompt_tokens_total"}


class _BrokerMetrics(Collector):
    """The broker's report (see headrace.broker.report) as metrics; what it lacks is left out."""

    def __init__(self) -> None:
        self.report: Mapping[str, Any] | None = None

    def describe(self) -> Iterable[Metric]:
        """Nothing known in advance."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families of one scrape."""
        yield GaugeMetricFamily("headrace_broker_up", "Whether the broker answered.", float(self.report is not None))
        if self.report is None:
            return
        yield from self._models(self.report.get("models", ()))
        yield from self._groups(self.report.get("groups", ()))
        yield from self._counters(self.report.get("counters", {}))

    @staticmethod
    def _models(models: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
        rows = list(models)
        for name, key, text in (
            ("num_requests_running", "running", "Streams that run."),
            ("num_requests_waiting", "queue_depth", "Streams in the broker's queue."),
            ("queue_tokens", "queue_tokens", "Prompt tokens in the broker's queue."),
            ("ready_groups", "ready_groups", "Worker groups that are ready."),
        ):
            family = GaugeMetricFamily(f"headrace_{name}", text, labels=["model_name"])
            for row in rows:
                family.add_metric([str(row.get("name", ""))], float(row.get(key, 0)))
            yield family

    @staticmethod
    def _groups(groups: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
        rows = [([str(row.get("model", "")), str(row.get("name", ""))], row) for row in groups]
        labels = ["model_name", "group"]
        state = GaugeMetricFamily("headrace_worker_state", "1 for the group's state.", labels=[*labels, "state"])
        usage = GaugeMetricFamily("headrace_kv_cache_usage_perc", "Used part of the KV cache, 1 is all.", labels=labels)
        for names, row in rows:
            state.add_metric([*names, str(row.get("state", ""))], 1.0)
            load = row.get("load", {})
            if load.get("kv_blocks_total"):
                usage.add_metric(names, 1.0 - load.get("kv_blocks_free", 0) / load["kv_blocks_total"])
        yield state
        yield usage
        for key, text in (
            ("heartbeat_age_seconds", "Since the group was last heard."),
            ("step_age_seconds", "Since the group's last step."),
        ):
            family = GaugeMetricFamily(f"headrace_{key}", text, labels=labels)
            for names, row in rows:
                family.add_metric(names, float(row.get(key, 0)))
            yield family
        for key, (name, grows, text) in _LOAD.items():
            kind: type[CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily if grows else GaugeMetricFamily
            loads = kind(f"headrace_{name}", text, labels=labels)
            for names, row in rows:
                if key in row.get("load", {}):
                    loads.add_metric(names, float(row["load"][key]))
            yield loads

    @staticmethod
    def _counters(counters: Mapping[str, Any]) -> Iterable[Metric]:
        for key, value in counters.items():
            name = f"headrace_broker_{key}" if key in _OWN_NAMES else f"headrace_{key}"
            name = name.removesuffix("_total")
            if isinstance(value, Mapping):
                family = CounterMetricFamily(name, "Counted by the broker.", labels=["kind"])
                for label, number in value.items():
                    family.add_metric([str(label)], float(number))
                yield family
            else:
                yield CounterMetricFamily(name, "Counted by the broker.", value=float(value))
