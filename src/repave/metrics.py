"""/metrics, for Prometheus. What happened is counted from the store: the same on every worker, and no restart forgets it. What the store does not know
(requests to BMCs, the database's time, bytes of chunks) is counted by the process from 0, as Prometheus expects it.

No label has a value that clients or servers make up, but for models, of which the first MODELS_MAX have names.
"""

from __future__ import annotations

import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import prometheus_client
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from repave import __version__
from repave.api.health import Part
from repave.domain.model import InstanceState, Step
from repave.domain.states import Ending
from repave.errors import CATALOGUE, Who
from repave.store import Store
from repave.store.database import OF_THE_STORE, is_unavailable

MODELS_MAX = 40
_STEP_S = (1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600)
_DATABASE_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15)
_TIMED = (Ending.PROVED.value, Ending.LATE_PROOF.value)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All that is shown. One a process."""

    def __init__(self, store: Store, *, health: Callable[[], Mapping[str, Part]], chunk_bytes: Callable[[], int], imports: Collection[object]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(health, chunk_bytes, imports))
        self._registry.register(_FromStore(store))
        self._bmc = Counter("repave_bmc_requests", "Requests to BMCs by this process.", ["method", "outcome"], registry=self._registry)
        self._database = Histogram(
            "repave_database_seconds", "One statement, without the wait for its turn.", ["kind"], buckets=_DATABASE_S, registry=self._registry
        )
        _time_statements(store.engine, self._database)

    def count_bmc(self, method: str, outcome: str) -> None:
        """`outcome`: 2xx, 4xx, ..., or the class of the error where there was no answer."""
        self._bmc.labels(method, outcome).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Now(Collector):
    """What this process knows now."""

    def __init__(self, health: Callable[[], Mapping[str, Part]], chunk_bytes: Callable[[], int], imports: Collection[object]) -> None:
        self._health, self._chunk_bytes, self._imports = health, chunk_bytes, imports

    def collect(self) -> Iterator[Metric]:
        yield _gauge("repave_build_info", "Always 1.", ["version", "python"], [((__version__, platform.python_version()), 1)])
        yield _gauge("repave_healthy", "1 where the part is well (docs/operations.md).", ["part"], [((n,), int(p.ok)) for n, p in self._health().items()])
        yield _gauge("repave_imports_under_way", "Images being imported by this process.", [], [((), len(self._imports))])
        sent = CounterMetricFamily("repave_chunk_bytes", "Bytes sent by this process's chunk server.")
        sent.add_metric([], self._chunk_bytes())
        yield sent


class _FromStore(Collector):
    """What the store knows. The audit is read on from where the last scrape ended."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._seq, self._imported = 0, 0
        # From 0 on: what Prometheus first sees as 1 is no increase to it.
        self._endings = {ending.value: 0 for ending in Ending if ending is not Ending.ACCEPTED}
        self._errors = {slug: 0 for slug, problem in CATALOGUE.items() if problem.who is not Who.REQUEST}
        self._late = {step.value: 0 for step in Step}
        self._steps: dict[tuple[str, str], list[float]] = {}  # by step and model: how many in each bucket and beyond, then the sum
        self._models: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        try:
            families = self._read()
        except OF_THE_STORE as error:
            if not is_unavailable(error):
                raise
            families = list[Metric]()
        yield _gauge("repave_store_readable", "0: all that comes of the store is missing.", [], [((), int(bool(families)))])
        yield from families

    def _read(self) -> list[Metric]:
        figures = self._store.figures
        with self._lock:
            while events := figures.list_counted(self._seq):
                for event in events:
                    self._count(event)
            families: list[Metric] = [
                _counter("repave_runs", "Runs that ended, by how.", ["outcome"], self._endings),
                _counter("repave_run_errors", "Runs that ended with an error, by its class (docs/errors.md).", ["cause"], self._errors),
                _counter("repave_late_steps", "Steps that took much longer than usual.", ["step"], self._late),
                _counter("repave_images_imported", "Images imported.", [], {"": self._imported}),
                self._step_seconds(),
            ]
        live = figures.count_live()
        by_step = {step.value: sum(r["n"] for r in live if r["begun"] and r["step"] == step) for step in Step}
        states, now = figures.count_states(), time.time()
        beats = {f"{host}/{slot.rpartition('/')[2]}": beat_at_ms / 1000 for host, slot, beat_at_ms in figures.list_beats()}
        hooks = self._store.webhooks.count_troubled()
        return [
            *families,
            _gauge("repave_runs_live", "Runs under way.", ["step"], [((step,), n) for step, n in by_step.items()]),
            _gauge("repave_runs_waiting", "Runs that have not begun.", [], [((), sum(r["n"] for r in live if not r["begun"]))]),
            _gauge("repave_runs_late", "Runs under way that are late in their step.", [], [((), sum(r["n"] for r in live if r["late"]))]),
            _gauge("repave_instances", "Instances.", ["state"], [((s.value,), states.get(s.value, 0)) for s in InstanceState]),
            _gauge("repave_worker_beat_age_seconds", "Since each worker's last beat (PostgreSQL).", ["worker"], [((w,), now - at) for w, at in beats.items()]),
            _gauge("repave_webhooks_troubled", "Webhooks whose newest delivery failed.", [], [((), hooks)]),
        ]

    def _count(self, event: Any) -> None:
        self._seq, data = event["seq"], event["data"] or {}
        if event["type"] == "image.added":
            self._imported += 1
        elif event["type"] == "run.late":
            self._late[data["step"]] = self._late.get(data["step"], 0) + 1
        else:
            self._endings[data["outcome"]] = self._endings.get(data["outcome"], 0) + 1
            if cause := (data.get("error") or {}).get("class"):
                self._errors[cause] = self._errors.get(cause, 0) + 1
            if data["outcome"] in _TIMED:
                for step, seconds in (event["durations_s"] or {}).items():
                    self._add_seconds(step, self._name_model(event["model"] or ""), seconds)

    def _name_model(self, model: str) -> str:
        if model not in self._models and len(self._models) >= MODELS_MAX:
            return "other"
        self._models.add(model)
        return model

    def _add_seconds(self, step: str, model: str, seconds: float) -> None:
        counts = self._steps.setdefault((step, model), [0.0] * (len(_STEP_S) + 2))
        counts[bisect_left(_STEP_S, seconds)] += 1
        counts[-1] += seconds

    def _step_seconds(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily("repave_step_seconds", "Seconds in each step of runs whose new OS proved itself.", labels=["step", "model"])
        for (step, model), counts in self._steps.items():
            below, buckets = 0.0, []
            for limit, count in zip((*map(float, _STEP_S), "+Inf"), counts, strict=False):
                below += count
                buckets.append((str(limit), below))
            family.add_metric([step, model], buckets, counts[-1])
        return family


def _gauge(name: str, says: str, labels: list[str], values: list[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, says, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _counter(name: str, says: str, labels: list[str], values: Mapping[str, float]) -> CounterMetricFamily:
    """With one label, or none."""
    family = CounterMetricFamily(name, says, labels=labels)
    for of, value in values.items():
        family.add_metric([of] if labels else [], value)
    return family


def _time_statements(engine: sa.Engine, seconds: Histogram) -> None:
    """Of this engine. `kind`: a transaction that changes something, or a look."""
    reads, writes = seconds.labels("read"), seconds.labels("write")

    @sa.event.listens_for(engine, "before_cursor_execute")
    def before(conn: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if context is not None:
            context.repave_began = time.perf_counter()

    @sa.event.listens_for(engine, "after_cursor_execute")
    def after(conn: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if context is not None:
            kind = writes if "repave_write" in conn.get_execution_options() else reads
            kind.observe(time.perf_counter() - context.repave_began)
