"""What was learned of speed, kept in Postgres. How it is learned says scheduler/policy/cost.py, and nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

from scheduler.policy.cost import LoadKey, Rate, RateKey, Rates, Workload
from scheduler.policy.placing.records import Refusal
from scheduler.store.database import together


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What one accepted outcome, which loaded nothing, says of speed."""

    key: RateKey
    worker: str
    device_kind: str
    #: Of the loaded model, for a first guess.
    parameters: int
    work: Workload
    seconds: float
    text_bytes: int


_RATES = """
    SELECT trunk, device, numerics, coefficients, covariance, bytes_per_token, tokens_per_row, observations FROM rate"""
_REFUSALS = text("SELECT model_id, worker, boot, why FROM refusal")
_PACES = "SELECT worker, pace, observations FROM pace"
_LOADS = "SELECT model, device, seconds FROM load_time"
_ALL_RATES, _ALL_PACES, _ALL_LOADS = text(_RATES), text(_PACES), text(_LOADS)


def rates(connection: Connection) -> Rates:
    """All that was learned."""
    return Rates(
        {(row.trunk, row.device, row.numerics): _rate(row) for row in connection.execute(_ALL_RATES)},
        {worker: (pace, seen) for worker, pace, seen in connection.execute(_ALL_PACES).all()},
        {(row.model, row.device): row.seconds for row in connection.execute(_ALL_LOADS)},
    )


@dataclass(frozen=True, slots=True)
class Touched:
    """What finished sub-tasks may have changed."""

    rates: set[RateKey] = field(default_factory=set)
    loads: set[LoadKey] = field(default_factory=set)
    workers: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.workers)


_RATES_OF = text(f"""{_RATES}
     WHERE (trunk, device, numerics) IN (SELECT * FROM unnest(CAST(:trunks AS text[]), CAST(:devices AS text[]),
                                                              CAST(:numerics AS text[])))""")
_PACES_OF = text(f"{_PACES} WHERE worker = ANY(:workers)")
_LOADS_OF = text(f"""{_LOADS}
     WHERE (model, device) IN (SELECT * FROM unnest(CAST(:models AS text[]), CAST(:devices AS text[])))""")


def refresh(connection: Connection, known: Rates, touched: Touched) -> None:
    """Read anew of what is known that which may have changed: of ten thousand workers, few have ended a sub-task since."""
    trunks, devices, numerics = zip(*touched.rates, strict=True)
    for row in connection.execute(
        _RATES_OF, {"trunks": list(trunks), "devices": list(devices), "numerics": list(numerics)}
    ):
        known.learned[row.trunk, row.device, row.numerics] = _rate(row)
    models, devices = zip(*touched.loads, strict=True)
    for row in connection.execute(_LOADS_OF, {"models": list(models), "devices": list(devices)}):
        known.loads[row.model, row.device] = row.seconds
    paces = connection.execute(_PACES_OF, {"workers": list(touched.workers)}).all()
    known.paces.update((worker, (pace, seen)) for worker, pace, seen in paces)


def refusals(connection: Connection) -> list[Refusal]:
    """Everything that could not be loaded where."""
    return [Refusal(row.model_id, row.worker, row.boot, row.why) for row in connection.execute(_REFUSALS)]


def speeds(connection: Connection) -> dict[str, float]:
    """Device name -> tokens per second, as learned of the model that it runs fastest."""
    found: dict[str, float] = {}
    for (_, device, _), rate in rates(connection).learned.items():
        found[device] = max(found.get(device, 0.0), 1 / rate.seconds_per_token)
    return found


# Each of these makes the row if there is none, locks it and reads it, in one statement: of two aggregators that
# learn at once the second waits, and goes on from what the first has learned.
_HOLD_RATE = text("""
    INSERT INTO rate (trunk, device, numerics, coefficients, covariance, bytes_per_token, tokens_per_row, observations)
    VALUES (:trunk, :device, :numerics, :coefficients, :covariance, :bytes_per_token, :tokens_per_row, 0)
    ON CONFLICT (trunk, device, numerics) DO UPDATE SET updated = clock_timestamp()
    RETURNING coefficients, covariance, bytes_per_token, tokens_per_row, observations""")
_HOLD_PACES = text("""
    INSERT INTO pace (worker, pace, observations)
    SELECT worker, :pace, 0 FROM unnest(CAST(:workers AS text[])) WITH ORDINALITY k (worker, i) ORDER BY i
    ON CONFLICT (worker) DO UPDATE SET updated = clock_timestamp()
    RETURNING worker, pace, observations""")
_HOLD_LOAD = text("""
    INSERT INTO load_time (model, device, seconds) VALUES (:model, :device, :seconds)
    ON CONFLICT (model, device) DO UPDATE SET updated = clock_timestamp() RETURNING seconds""")
_KEEP_RATE = text("""
    UPDATE rate SET coefficients = :coefficients, covariance = :covariance, bytes_per_token = :bytes_per_token,
           tokens_per_row = :tokens_per_row, observations = :observations
     WHERE trunk = :trunk AND device = :device AND numerics = :numerics""")
_KEEP_PACES = text("""
    UPDATE pace SET pace = k.pace, observations = k.observations
      FROM unnest(CAST(:workers AS text[]), CAST(:paces AS float8[]), CAST(:observations AS bigint[]))
           k (worker, pace, observations)
     WHERE pace.worker = k.worker""")
_KEEP_LOAD = text("UPDATE load_time SET seconds = :seconds WHERE model = :model AND device = :device")


def learn(connection: Connection, timed: Sequence[Timed], loads: Sequence[tuple[LoadKey, float]]) -> None:
    """Learn from outcomes, in their order. Last in a transaction: these few rows are shared by all aggregators.

    Everybody locks them in one order, so nobody waits in a circle: rates, paces, load times, each by key.
    """
    if not timed and not loads:
        return
    priors = {
        t.key: Rates().of(t.key, device_kind=t.device_kind, parameters=t.parameters) for t in reversed(timed)
    }
    first = sorted(dict(reversed(loads)).items())
    held = together(
        connection,
        *((_HOLD_RATE, _rate_values(key, prior)) for key, prior in sorted(priors.items())),
        (_HOLD_PACES, {"workers": sorted({t.worker for t in timed}), "pace": Rates().pace("")}),
        *((_HOLD_LOAD, {"model": m, "device": d, "seconds": seconds}) for (m, d), seconds in first),
    )
    n = len(priors)
    known = Rates(
        {key: _rate(row) for key, [row] in zip(sorted(priors), held[:n], strict=True)},
        {row.worker: (row.pace, row.observations) for row in held[n]},
        {load: row.seconds for (load, _), [row] in zip(first, held[n + 1 :], strict=True)},
    )
    for t in timed:
        known.observe(t.key, t.worker, known.learned[t.key], t.work, t.seconds, t.text_bytes)
    for load, seconds in loads:
        known.loaded(load, seconds)
    _keep(connection, known)


def _keep(connection: Connection, rates: Rates) -> None:
    paces = rates.paces
    together(
        connection,
        *((_KEEP_RATE, _rate_values(key, rate)) for key, rate in rates.learned.items()),
        (
            _KEEP_PACES,
            {
                "workers": list(paces),
                "paces": [pace for pace, _ in paces.values()],
                "observations": [seen for _, seen in paces.values()],
            },
        ),
        *(
            (_KEEP_LOAD, {"model": model, "device": device, "seconds": seconds})
            for (model, device), seconds in rates.loads.items()
        ),
    )


def _rate(row: Any) -> Rate:
    return Rate(
        tuple(row.coefficients),
        tuple(row.covariance),
        row.bytes_per_token,
        row.tokens_per_row,
        row.observations,
    )


def _rate_values(key: RateKey, rate: Rate) -> dict[str, Any]:
    trunk, device, numerics = key
    return {
        "trunk": trunk,
        "device": device,
        "numerics": numerics,
        "coefficients": list(rate.coefficients),
        "covariance": list(rate.covariance),
        "bytes_per_token": rate.bytes_per_token,
        "tokens_per_row": rate.tokens_per_row,
        "observations": rate.observations,
    }
