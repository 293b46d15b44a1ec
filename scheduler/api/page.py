"""The pages of the API for people: the list of jobs, one job, and a refusal. Facts as docs/http.md shows them in, HTML
out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from motet.markup import Html, join, tag
from motet.states import ENDED, STATES
from scheduler.api.charts import colour, curve, lanes, shares, swatch
from scheduler.api.markup import compact, count, document, duration, moment, number, percent

PageFacts = Mapping[str, Any]

#: Sub-tasks that the table under the timeline tells in words.
_TOLD = 40


# -- one job


def job_page(facts: PageFacts) -> str:
    """The page of one job, from its activity."""
    job = facts["job"]
    name = _name(job)
    live = job["state"] not in ENDED
    progress = percent(_share(job)) if live else str(job["state"])
    return document(
        f"{name} · {progress}",
        _nav(tag("a", "Jobs", href="/jobs"), " › ", _short(job)),
        tag("h1", name, _state(job)),
        _head(job),
        _reason(job),
        _figures(facts),
        _cells(job),
        _section("Passes", _passes(facts)),
        _section("Devices", _devices(facts)),
        _section("Timeline", _timeline(facts)),
        _section("Tokens per second", _throughput(facts)),
        _section("Cells without an answer", _errors(facts)),
        _section("Usage", _usage(facts)),
        live=live,
    )


def _section(title: str, content: Html) -> Html:
    anchor = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=f"{anchor}-title"), content, aria_labelledby=f"{anchor}-title")


def _nav(*content: object) -> Html:
    return tag("nav", "motet › ", *content, aria_label="Where you are")


def _name(job: PageFacts) -> str:
    return job["name"] or f"job {_short(job)}"


def _short(job: PageFacts) -> str:
    return str(job["id"])[:8]


def _state(job: PageFacts) -> Html:
    partial = " partial" if job["partial"] else ""
    words = "partial" if job["partial"] else job["state"]
    more = "succeeded, with cells that have no answer" if job["partial"] else None
    return tag("span", words, title=more, class_=f"state {job['state']}{partial}")


def _head(job: PageFacts) -> Html:
    what = f"{count(job['rows'], 'row')} × {count(len(job['tasks']), 'task')}"
    return tag(
        "p",
        f"{what} · {job['priority']} · submitted {moment(job['created'])} · ",
        job["id"],
        class_="head small soft",
    )


def _reason(job: PageFacts) -> Html | None:
    if not job["reason"]:
        return None
    return tag("p", job["reason"], class_=f"reason {job['state']}", role="note")


def _figures(facts: PageFacts) -> Html:
    """What one wants to know first."""
    job = facts["job"]
    figures: list[tuple[str, str, str]] = []
    if job["state"] in ENDED:
        figures.append(("Took", duration(facts["now_s"]), f"until {moment(job['finished'])[11:]}"))
    elif job["state"] == "loading":
        figures.append(("Rows so far", f"{job['rows']:,}", "parts are still coming"))
    else:
        left = "not known yet" if job["eta_s"] is None else f"about {duration(job['eta_s'])}"
        figures.append(("Time left", left, f"{duration(facts['now_s'])} so far"))
    figures.append(
        ("Done", percent(_share(job)), f"{count(_final(job), 'cell')} of {job['cells']['total']:,}")
    )
    rate, rows_s = _pace(facts)
    figures.append(("Speed", f"{compact(rate)} tokens/s", f"{number(round(rows_s, 1))} rows/s, mean"))
    devices = facts["devices"]
    busy = sum(d["open"] > 0 for d in devices)
    held = f"{busy} at work now" if job["state"] not in ENDED else "worked on it"
    figures.append(("Devices", str(len(devices)), held))
    tokens, unfused = _fusion(facts["passes"])
    if tokens and unfused > tokens:
        figures.append(("Fusion", f"{unfused / tokens:.1f} × fewer", "tokens read than with a pass per task"))
    return tag(
        "dl",
        [tag("div", tag("dt", k), tag("dd", v, tag("small", more, class_="soft"))) for k, v, more in figures],
        class_="figures",
    )


def _pace(facts: PageFacts) -> tuple[float, float]:
    """Mean tokens and rows per second since the first sub-task began."""
    points = facts["throughput"]
    first = next((i for i, p in enumerate(points) if p["tokens_s"] or p["rows_s"]), None)
    if first is None:
        return 0.0, 0.0
    under_way = points[first:]
    tokens_s, rows_s = (sum(p[key] for p in under_way) / len(under_way) for key in ("tokens_s", "rows_s"))
    return tokens_s, rows_s


def _share(job: PageFacts) -> float:
    total = job["cells"]["total"]
    return _final(job) / total if total else 0.0


def _final(job: PageFacts) -> int:
    return int(sum(job["cells"][k] for k in ("ok", "error", "skipped")))


def _cells(job: PageFacts) -> Html:
    """Every cell accounted for."""
    cells = job["cells"]
    reused = min(cells["reused"], cells["ok"])
    coming = cells["total"] - _final(job)
    kinds = [
        ("ok", cells["ok"] - reused, "ok"),
        ("reused", reused, "ok, reused"),
        ("error", cells["error"], "error"),
        ("skipped", cells["skipped"], "skipped"),
    ]
    shown = [kind for kind in kinds if kind[1] or kind[0] != "reused"]
    if job["state"] not in ENDED:
        shown.append(("track", coming, "to come"))
    sum_of = " + ".join(f"{n:,} {words}" for _, n, words in shown)
    whole = f"{cells['total']:,} cells"
    return tag(
        "div",
        tag(
            "div",
            shares(
                [(css, n, f"{n:,} {words}") for css, n, words in kinds],
                cells["total"],
                label=f"{sum_of} = {whole}",
                height=16,
            ),
            class_="bar",
        ),
        tag(
            "ul",
            [tag("li", swatch(css), f"{n:,} {words}") for css, n, words in shown],
            tag("li", f"= {whole}", class_="soft"),
            class_="key",
        ),
    )


def _passes(facts: PageFacts) -> Html:
    several = len(facts["passes"]) > 1
    return join([_pass(p, facts["job"], several=several) for p in facts["passes"]])


def _pass(p: PageFacts, job: PageFacts, *, several: bool) -> Html:
    rows, subtasks, blocks = p["rows"], p["subtasks"], p["blocks"]
    css = colour(p["number"])
    left = rows["total"] - rows["done"] - rows["open"]
    told = [f"{rows['done']:,} of {count(rows['total'], 'row')} done"]
    if rows["open"]:
        told.append(f"{rows['open']:,} under way")
    if left and job["state"] in ENDED:
        told.append(f"{left:,} never run")
    closed = [
        f"{subtasks[s]:,} {s}" for s in ("done", "open", "lost", "failed") if subtasks[s] or s == "done"
    ]
    known = job["passes"][p["number"]] if p["number"] < len(job["passes"]) else {}
    return tag(
        "div",
        tag(
            "div",
            tag("h3", swatch(css), f"Pass {p['number'] + 1}: " if several else None, p["kind"]),
            tag(
                "p",
                f"{known.get('model', '')} · {known.get('numerics', '')}"
                + (f" · at most {known['max_tokens']:,} tokens a row" if known.get("max_tokens") else ""),
                class_="small soft",
            ),
            tag("ul", [_task(name, job) for name in p["tasks"]], class_="chips", aria_label="Tasks"),
        ),
        tag(
            "div",
            shares(
                [
                    (css, rows["done"], f"{rows['done']:,} rows done"),
                    (f"{css} edge", rows["open"], f"{rows['open']:,} rows under way"),
                ],
                rows["total"],
                label=", ".join(told),
            ),
            tag("p", ", ".join(told), class_="small"),
            tag(
                "p",
                f"{blocks['sealed']:,} of {count(blocks['total'], 'block')} sealed · sub-tasks: {', '.join(closed)}",
                class_="small soft",
            ),
            _fused(p),
        ),
        class_="pass",
    )


def _task(name: str, job: PageFacts) -> Html:
    spec = job["tasks"].get(name, {})
    return tag("li", name, title=f"{spec.get('kind', '')} · {spec.get('model_ref', '')}")


def _fused(p: PageFacts) -> Html:
    """What sharing the pass has saved."""
    tokens, unfused, n = p["tokens"], p["unfused_tokens"], len(p["tasks"])
    if n == 1:
        return tag("p", f"{count(tokens, 'token')} read for its one task", class_="small soft")
    if not tokens:
        return tag("p", f"{n} tasks share each token that is read", class_="small soft")
    css = colour(p["number"])
    rows = [
        ("read here", tokens, css),
        ("with a pass per task", unfused, "track"),
    ]
    return tag(
        "div",
        [
            join(
                tag("span", words),
                shares(
                    [(c, n_tokens, f"{n_tokens:,} tokens")], unfused, label=f"{n_tokens:,} tokens", height=8
                )
                if c != "track"
                else shares([], unfused, label=f"{n_tokens:,} tokens", height=8),
                tag("span", f"{compact(n_tokens)} tokens", class_="num"),
            )
            for words, n_tokens, c in rows
        ],
        class_="pair",
    )


def _fusion(passes: Sequence[PageFacts]) -> tuple[int, int]:
    return sum(p["tokens"] for p in passes), sum(p["unfused_tokens"] for p in passes)


def _devices(facts: PageFacts) -> Html:
    if not facts["devices"]:
        return tag("p", "No device has had a part of it yet.", class_="soft")
    live = facts["job"]["state"] not in ENDED
    heads = [
        ("Device", ""),
        ("State now", ""),
        ("Sub-tasks", "num"),
        ("Rows", "num"),
        ("Tokens", "num"),
        ("Tokens/s", "num"),
        ("Busy with it", ""),
        *([("Utilisation", "num"), ("Backlog", "num")] if live else []),
    ]
    more = facts["left_out"]["devices"]
    return join(
        _table(
            "devices",
            "What each device did for this job",
            heads,
            [_device(d, live) for d in facts["devices"]],
        ),
        tag("p", f"{count(more, 'more device')} not told, which came earlier.", class_="small soft")
        if more
        else None,
    )


def _device(d: PageFacts, live: bool) -> Html:
    busy = min(1.0, d["share"])
    cells = [
        tag("th", d["worker"], tag("small", d["device_name"], class_="soft"), scope="row"),
        tag("td", d["state"]),
        tag(
            "td",
            f"{d['subtasks']:,}",
            tag("small", f"+ {d['open']} open", class_="soft") if d["open"] else None,
            class_="num",
        ),
        tag("td", f"{d['rows']:,}", class_="num"),
        tag("td", f"{d['tokens']:,}", class_="num"),
        tag("td", compact(d["tokens_s"]), class_="num"),
        tag(
            "td",
            shares([("busy", busy, percent(busy))], 1.0, label=f"busy {percent(busy)} of its time", height=6),
            tag("small", f"{percent(busy)} · {duration(d['busy_s'])}", class_="soft"),
            class_="meter",
        ),
    ]
    if live:
        cells.append(tag("td", "–" if d["utilisation"] is None else percent(d["utilisation"]), class_="num"))
        cells.append(tag("td", "–" if d["backlog_s"] is None else duration(d["backlog_s"]), class_="num"))
    return tag("tr", cells)


def _timeline(facts: PageFacts) -> Html:
    bars = facts["timeline"]
    total = sum(sum(p["subtasks"].values()) for p in facts["passes"])
    if not bars:
        words = (
            "Nothing was left to run."
            if facts["job"]["state"] in ENDED
            else "No sub-task has been carved yet."
        )
        return tag("p", words, class_="soft")
    states = {b["state"] for b in bars}
    seen = sorted({b["pass"] for b in bars})
    key = [
        tag("li", swatch(colour(n)), facts["passes"][n]["kind"] if len(seen) == 1 else f"pass {n + 1}")
        for n in seen
    ]
    if "open" in states:
        key.append(tag("li", swatch(colour(seen[0]), "edge"), "under way"))
    if "lost" in states:
        key.append(tag("li", swatch("lost"), "lost: its rows were run again"))
    if "failed" in states:
        key.append(tag("li", swatch("error"), "failed"))
    which = (
        f"the newest {len(bars):,} of {total:,} sub-tasks" if len(bars) < total else count(total, "sub-task")
    )
    return join(
        tag(
            "p",
            f"A lane per device, a bar per sub-task: {which}, in time since the job was submitted.",
            class_="small soft",
        ),
        tag("ul", key, class_="key"),
        lanes(facts),
        tag(
            "details",
            tag("summary", "In words", id="told-summary"),
            _told(bars[-_TOLD:], facts["passes"]),
            id="told",
        ),
    )


def _told(bars: Sequence[PageFacts], passes: Sequence[PageFacts]) -> Html:
    heads = [
        ("Sub-task", ""),
        ("Device", ""),
        ("Pass", ""),
        ("State", ""),
        ("From", "num"),
        ("To", "num"),
        ("Rows", "num"),
        ("Tokens", "num"),
    ]
    rows = [
        tag(
            "tr",
            tag("th", b["subtask"], scope="row"),
            tag("td", b["worker"] or "–"),
            tag("td", f"{b['pass'] + 1}: {passes[b['pass']]['kind']}"),
            tag("td", b["state"] + (", alone" if b["exclusive"] else "")),
            tag("td", duration(b["start_s"]), class_="num"),
            tag("td", "–" if b["end_s"] is None else duration(b["end_s"]), class_="num"),
            tag("td", f"{b['rows']:,}", class_="num"),
            tag("td", f"{b['tokens']:,}", class_="num"),
        )
        for b in reversed(bars)
    ]
    return _table("told-table", f"The newest {count(len(bars), 'sub-task')}, newest first", heads, rows)


def _throughput(facts: PageFacts) -> Html:
    points = facts["throughput"]
    if not any(p["tokens_s"] for p in points):
        return tag(
            "p",
            "Nothing was read yet." if facts["job"]["state"] not in ENDED else "Nothing was read.",
            class_="soft",
        )
    mean, _ = _pace(facts)
    most = max(p["tokens_s"] for p in points)
    words = f"{compact(mean)} tokens/s in the mean, {compact(most)} at most; all devices together."
    if facts["job"]["state"] not in ENDED:
        words += " A sub-task counts once it has reported, so the last moments look low."
    return join(tag("p", words, class_="small soft"), curve(points))


def _errors(facts: PageFacts) -> Html:
    job, errors = facts["job"], facts["errors"]
    cells = job["cells"]["error"] + job["cells"]["skipped"]
    if not cells and not errors:
        return tag("p", "None." if job["state"] in ENDED else "None so far.", class_="soft")
    heads = [("Task", ""), ("Why", ""), ("Cells", "num"), ("First row", "num"), ("It said", "")]
    rows = [
        tag(
            "tr",
            tag("th", e["task"], scope="row"),
            tag("td", e["error"], class_="nowrap"),
            tag("td", f"{e['count']:,}", class_="num"),
            tag("td", f"{e['first_row']:,}", class_="num"),
            tag("td", e["message"], class_="words"),
        )
        for e in errors
    ]
    rest = cells - sum(e["count"] for e in errors)
    why = (
        "their rows were not answered when the job ended" if job["state"] in ENDED else "of blocks under way"
    )
    if more := facts["left_out"]["errors"]:
        why += f", and those of {count(more, 'more kind')} of error"
    return join(
        _table("errors", "By task and class of error, most first", heads, rows) if rows else None,
        tag("p", f"{count(rest, 'more cell')}: {why}.", class_="small soft") if rest > 0 else None,
    )


def _usage(facts: PageFacts) -> Html:
    job = facts["job"]
    usage = job["usage"]
    real = (
        f"{percent(usage['tokens'] / usage['computed_tokens'])} of them real"
        if usage["computed_tokens"]
        else ""
    )
    said = [
        ("Tokens read", f"{usage['tokens']:,}", ""),
        ("Tokens computed, padding too", f"{usage['computed_tokens']:,}", real),
        ("Device time", duration(usage["busy_s"]), ""),
        ("Sub-tasks reported", f"{usage['subtasks']:,}", ""),
        ("Attempts lost", f"{usage['attempts_lost']:,}", ""),
        ("Cells reused", f"{job['cells']['reused']:,}", ""),
        ("Started", moment(job["started"]), ""),
        ("Ended", moment(job["finished"]), ""),
    ]
    return tag(
        "dl",
        [
            tag("div", tag("dt", k), tag("dd", v, tag("small", f" {more}", class_="soft")))
            for k, v, more in said
        ],
        class_="usage",
    )


def _table(name: str, caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[Html]) -> Html:
    """A table that scrolls by itself where it is wider than the screen."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", [tag("th", h, scope="col", class_=css or None) for h, css in heads])),
            tag("tbody", rows),
        ),
        class_="scroll",
        id=name,
        tabindex=0,
        role="region",
        aria_label=caption,
    )


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
    filters = [_filter("all", None, state), *(_filter(s, s, state) for s in STATES)]
    return document(
        "Jobs",
        _nav("Jobs"),
        tag("h1", "Jobs"),
        tag("nav", tag("div", filters, class_="filters"), aria_label="Which jobs"),
        _list(jobs) if jobs else _nothing(state, first),
        tag(
            "p",
            None if first else tag("a", "← newest", href=_address(state=state)),
            "" if first or following is None else " · ",
            tag("a", "older →", href=_address(state=state, limit=limit, after=following), rel="next")
            if following
            else None,
        ),
        live=first and any(j["state"] not in ENDED for j in jobs),
    )


def _filter(words: str, state: str | None, now: str | None) -> Html:
    return tag("a", words, href=_address(state=state), aria_current="page" if state == now else None)


def _address(**query: object) -> str:
    given = {k: v for k, v in query.items() if v is not None}
    return "/jobs" + (f"?{urlencode(given)}" if given else "")


def _nothing(state: str | None, first: bool) -> Html:
    words = (
        f"No job is {state}." if state else "No job yet. Submit one: motet run, or Client.submit in Python."
    )
    return tag("p", words if first else "No older job.", class_="soft")


def _list(jobs: Sequence[PageFacts]) -> Html:
    heads = [
        ("Job", ""),
        ("State", ""),
        ("Cells", ""),
        ("Rows × tasks", "num wide"),
        ("Submitted", "wide"),
        ("Time", "num wide"),
    ]
    return tag(
        "table",
        tag("caption", "Newest first"),
        tag("thead", tag("tr", [tag("th", h, scope="col", class_=css or None) for h, css in heads])),
        tag("tbody", [_line(job) for job in jobs]),
    )


def _line(job: PageFacts) -> Html:
    cells = job["cells"]
    parts = [(kind, cells[kind], f"{cells[kind]:,} {kind}") for kind in ("ok", "error", "skipped")]
    told = percent(_share(job))
    if cells["error"]:
        told += f" · {count(cells['error'], 'error')}"
    return tag(
        "tr",
        tag(
            "th",
            tag("a", _cut(_name(job), 80), href=f"/jobs/{quote(str(job['id']))}"),
            tag("small", _cut(", ".join(job["tasks"]), 160), class_="soft"),
            scope="row",
        ),
        tag("td", _state(job)),
        tag(
            "td",
            shares(parts, cells["total"], label=f"{told} of {cells['total']:,} cells", height=6),
            tag("small", told, class_="soft nowrap"),
            class_="meter",
        ),
        tag("td", f"{job['rows']:,} × {len(job['tasks'])}", class_="num wide"),
        tag("td", moment(job["created"]), class_="wide nowrap"),
        tag("td", _time(job), class_="num wide"),
    )


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _time(job: PageFacts) -> str:
    if job["state"] not in ENDED:
        return "–" if job["eta_s"] is None else f"{duration(job['eta_s'])} left"
    end = datetime.fromisoformat(job["finished"])
    return duration((end - datetime.fromisoformat(job["created"])).total_seconds())


# -- a refusal


def refused_page(status: int, message: str) -> str:
    """Why there is no page: what was refused, and what to do."""
    title = {401: "Sign in", 403: "Not allowed", 404: "Not found", 503: "Not now"}.get(status, "Not possible")
    remedy = {
        401: "User name: the token's id, before the dot. Password: its secret, behind the dot. "
        "`motet token create` makes one.",
        404: "The list of jobs shows what there is.",
    }.get(status)
    return document(
        title,
        _nav(tag("a", "Jobs", href="/jobs")),
        tag("h1", title),
        tag("p", message),
        tag("p", remedy, class_="soft") if remedy else None,
    )
