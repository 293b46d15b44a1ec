"""The pages of the API for people: the list of jobs, one job, its queue, and a refusal. Facts as docs/http.md shows them in, HTML
out. Pure: this file counts and chooses, the templates say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from motet.progress import instant
from motet.states import ENDED, GROWING, REACHED, State
from motet.words import count
from scheduler.api.charts import curve, lanes, minutes
from scheduler.api.markup import render
from scheduler.api.words import compact, duration, moment, number, percent

PageFacts = Mapping[str, Any]
#: (what it is called, what it is, a remark).
_Figure = tuple[str, str, str]

#: Sub-tasks that the table under the timeline tells in words.
_TOLD = 40


# -- one job


def job_page(facts: PageFacts) -> str:
    """The page of one job, from its activity."""
    job, points = facts["job"], facts["throughput"]
    live = job["state"] not in ENDED
    return render(
        "job.html",
        **facts,
        name=_name(job),
        live=live,
        progress=percent(_share(job)) if live and not _grows(job) else job["state"],
        figures=_figures(facts),
        cells=_cells(job),
        subtasks=sum(sum(p["subtasks"].values()) for p in facts["passes"]),
        told=facts["timeline"][-_TOLD:],
        lanes=lanes(facts) if facts["timeline"] else None,
        pace=_pace(facts),
        minutes=minutes(facts["asks"]) if facts["asks"] else [],
        curve=curve(points) if any(p["tokens_s"] for p in points) else None,
        unanswered=job["cells"]["error"] + job["cells"]["skipped"],
        untold=job["cells"]["error"] + job["cells"]["skipped"] - sum(e["count"] for e in facts["errors"]),
        usage=_usage(job),
    )


def _name(job: PageFacts) -> str:
    return job["name"] or f"job {str(job['id'])[:8]}"


def _figures(facts: PageFacts) -> list[_Figure]:
    """What one wants to know first."""
    job, devices = facts["job"], facts["devices"]
    live = job["state"] not in ENDED
    figures: list[_Figure] = []
    if not live:
        figures.append(("Took", duration(facts["now_s"]), f"until {moment(job['finished'])[11:]}"))
    elif job["state"] == State.OPEN:
        figures += _open_figures(job, facts["asks"])
    elif _grows(job):
        waiting = job["cells"]["total"] - _final(job)
        figures.append(("Rows so far", f"{job['rows']:,}", "more are on their way"))
        figures.append(("Waiting", f"{waiting:,}", "cells without an answer yet"))
    else:
        left = "not known yet" if job["eta_s"] is None else f"about {duration(job['eta_s'])}"
        figures.append(("Time left", left, f"{duration(facts['now_s'])} so far"))
    if not _grows(job):
        done = f"{count(_final(job), 'cell')} of {job['cells']['total']:,}"
        figures.append(("Done", percent(_share(job)), done))
    rate, rows_s = _pace(facts)
    figures.append(("Speed", f"{compact(rate)} tokens/s", f"{number(round(rows_s, 1))} rows/s, mean"))
    busy = sum(d["open"] > 0 for d in devices)
    figures.append(("Devices", str(len(devices)), f"{busy} at work now" if live else "worked on it"))
    tokens, unfused = (sum(p[key] for p in facts["passes"]) for key in ("tokens", "unfused_tokens"))
    if tokens and unfused > tokens:
        figures.append(("Fusion", f"{unfused / tokens:.1f} × fewer", "tokens read than with a pass per task"))
    return figures


def _open_figures(job: PageFacts, asks: PageFacts | None) -> list[_Figure]:
    """Of an open job: the last minute, and what there is of its rows."""
    first, waiting = job["first_row"], job["cells"]["total"] - _final(job)
    kept = f"kept from row {first:,} on" if first else "all of them kept"
    figures = [("Rows so far", f"{job['rows']:,}", kept)]
    if asks:
        minute = asks["minute"]
        answered = f"{number(round(minute['asks_s'], 1))} a second"
        figures.append(("Asks", answered, f"{number(round(minute['rows_s'], 1))} rows/s, last minute"))
        slow = (
            f"99 % in {instant(minute['p99_s'])}"
            if minute["p99_s"] is not None
            else "none in the last minute"
        )
        figures.append(("Half answered in", instant(minute["p50_s"]), slow))
    figures.append(("Under way", f"{waiting:,}", "cells without an answer yet"))
    return figures


def _pace(facts: PageFacts) -> tuple[float, float]:
    """Mean tokens and rows per second since the first sub-task began."""
    points = facts["throughput"]
    first = next((i for i, p in enumerate(points) if p["tokens_s"] or p["rows_s"]), None)
    if first is None:
        return 0.0, 0.0
    under_way = points[first:]
    tokens_s, rows_s = (sum(p[key] for p in under_way) / len(under_way) for key in ("tokens_s", "rows_s"))
    return tokens_s, rows_s


def _grows(job: PageFacts) -> bool:
    """Whether rows keep coming: there is no whole of which a share could be told."""
    return job["state"] in GROWING


def _share(job: PageFacts) -> float:
    total = job["cells"]["total"]
    return _final(job) / total if total else 0.0


def _final(job: PageFacts) -> int:
    return int(sum(job["cells"][k] for k in ("ok", "error", "skipped")))


def _cells(job: PageFacts) -> list[tuple[str, int, str]]:
    """Every cell accounted for: (class, how many, words)."""
    cells = job["cells"]
    reused = min(cells["reused"], cells["ok"])
    kinds = [("ok", cells["ok"] - reused, "ok")]
    if reused:
        kinds.append(("reused", reused, "ok, reused"))
    kinds += [("error", cells["error"], "error"), ("skipped", cells["skipped"], "skipped")]
    if job["state"] not in ENDED:
        kinds.append(("track", cells["total"] - _final(job), "to come"))
    return [(css, n, f"{n:,} {words}") for css, n, words in kinds]


def _usage(job: PageFacts) -> list[_Figure]:
    usage = job["usage"]
    computed = usage["computed_tokens"]
    real = f"{percent(usage['tokens'] / computed)} of them real" if computed else ""
    return [
        ("Tokens read", f"{usage['tokens']:,}", ""),
        ("Tokens computed, padding too", f"{computed:,}", real),
        ("Device time", duration(usage["busy_s"]), ""),
        ("Sub-tasks reported", f"{usage['subtasks']:,}", ""),
        ("Attempts lost", f"{usage['attempts_lost']:,}", ""),
        ("Cells reused", f"{job['cells']['reused']:,}", ""),
        ("Started", moment(job["started"]), ""),
        ("All rows there", moment(job["closed"]), ""),
        ("Ended", moment(job["finished"]), ""),
        *([("Rows kept for", duration(job["keep_s"]), "after they were answered")] if job["keep_s"] else []),
    ]


# -- the list


def jobs_page(
    jobs: Sequence[PageFacts],
    *,
    following: str | None = None,
    state: str | None = None,
    limit: int = 50,
    first: bool = True,
) -> str:
    """The list of jobs, newest first. ``following``: the ``after`` of the next page; ``first``: this is the newest."""
    return render(
        "jobs.html",
        jobs=[{**job, "name": _name(job), "share": _done(job), "time": _time(job)} for job in jobs],
        filters=[("all", _address(), state is None), *((s, _address(state=s), s == state) for s in REACHED)],
        state=state,
        newest=None if first else _address(state=state),
        older=_address(state=state, limit=limit, after=following) if following else None,
        live=first and any(j["state"] not in ENDED for j in jobs),
    )


def _done(job: PageFacts) -> str:
    return count(_final(job), "cell") if _grows(job) else percent(_share(job))


def _address(**query: object) -> str:
    given = {k: v for k, v in query.items() if v is not None}
    return "/jobs" + (f"?{urlencode(given)}" if given else "")


def _time(job: PageFacts) -> str:
    if job["state"] not in ENDED:
        return "–" if job["eta_s"] is None else f"{duration(job['eta_s'])} left"
    end = datetime.fromisoformat(job["finished"])
    return duration((end - datetime.fromisoformat(job["created"])).total_seconds())


# -- its rows as a queue


def queue_page(facts: PageFacts) -> str:
    """The page of a job's rows, sorted by an answer."""
    job = facts["job"]
    heads = [(task, "") for task in facts["tasks"]]
    return render("queue.html", **facts, heads=heads, name=_name(job), live=job["state"] not in ENDED)


# -- a refusal


def refused_page(status: int, message: str) -> str:
    """Why there is no page: what was refused, and what to do."""
    title = {401: "Sign in", 403: "Not allowed", 404: "Not found", 503: "Not now"}.get(status, "Not possible")
    return render("refused.html", title=title, status=status, message=message, live=False)
