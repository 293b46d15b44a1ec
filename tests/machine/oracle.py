"""The nine invariants of reliability.md 4 and 9 and those of open jobs (13 to 17, 19 to 22), uploads (18) and conditions (23), as far as they can be seen at any moment, over all of Postgres at once.

Invariant 6 (no write under an old epoch) is checked inside each transaction of a dispatcher: see ``stage.Tap``.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from motet.errors import Problem
from motet.protocol.columns import ERROR, OK, RETURNED, STATE_MASK, Column
from motet.protocol.envelope import unwrap
from motet.states import CARVED, ENDED, GROWING
from scheduler.blocks import decode_block, row_order
from scheduler.merge import array_of
from scheduler.policy.lifecycle import MAX_DEATHS_ALONE, MAX_DEATHS_UNSEEN, MAX_TRIES
from tests.machine.callers import amount_of, who_of
from tests.machine.stage import HEAD, Broken
from tests.machine.world import HELD, HELD_BY, NEEDS, Job, World, label_for, row_of

_ALL = text("""
    SELECT json_build_object(
      'job', (SELECT json_agg(k) FROM (SELECT id, state, n_rows, n_tasks, n_blocks, blocks_done, cells_ok, cells_error,
               cells_skipped, version, finished, first_block, first_row, past_ok, past_error, past_skipped FROM job) k),
      'task', (SELECT json_agg(k) FROM (SELECT job_id, number, name, pass_number FROM task) k),
      'pass', (SELECT json_agg(k) FROM (SELECT job_id, number, rows_waiting, needs FROM pass) k),
      'block', (SELECT json_agg(k) FROM (SELECT job_id, number, first_row, n_rows, done_number,
               encode(row_order, 'base64') AS row_order, encode(payload, 'base64') AS payload FROM block) k),
      'fold', (SELECT json_agg(k) FROM (SELECT job_id, encode(state, 'base64') AS state FROM fold) k),
      'ask', (SELECT json_agg(k) FROM (SELECT job_id, encode(key, 'hex') AS key, encode(digest, 'hex') AS digest,
               block_number, lo, n_rows FROM ask ORDER BY job_id, block_number, lo) k),
      'block_pass', (SELECT json_agg(k) FROM (SELECT job_id, pass_number, block_number, state, todo, n, cursor, done,
               encode(row_order, 'base64') AS row_order FROM block_pass) k),
      'piece', (SELECT json_agg(k) FROM (SELECT job_id, pass_number, block_number, lo, hi, tries, deaths, exclusive
               FROM piece) k),
      'subtask', (SELECT json_agg(k) FROM (SELECT id, job_id, pass_number, state, blocks, los, his, deaths, exclusive
               FROM subtask ORDER BY id) k),
      'lease', (SELECT json_agg(k) FROM (SELECT subtask_id, attempt, worker, nonce FROM lease) k),
      'cells', (SELECT json_agg(k) FROM (SELECT job_id, pass_number, block_number, lo, hi,
               encode(columns, 'base64') AS columns FROM cells) k),
      'shown', (SELECT json_agg(k) FROM (SELECT b.job_id, b.block_number, b.task_number, c.n_rows, c.codes, c.errors,
               encode(c.status, 'base64') AS status FROM block_column b JOIN sealed_column c ON c.id = b.column_id) k),
      'column', (SELECT json_agg(k) FROM (SELECT c.id, c.refs, (SELECT count(*) FROM block_column b
               WHERE b.column_id = c.id) AS shown FROM sealed_column c) k),
      'told', (SELECT json_agg(k) FROM (SELECT job_id AS about, body ->> 'state' AS state FROM outbox) k))""")

#: (job, pass, block).
Place = tuple[str, int, int]
#: Why cells have no answer that nobody waited for.
DROPPED = ("late", "abandoned")
#: Why cells are skipped of rows that were taken out of their pass.
TAKEN_OUT = ("upstream", "condition")


@dataclass
class Seen:
    """All of Postgres at one moment."""

    tables: dict[str, list[dict[str, Any]]]

    def __post_init__(self) -> None:
        self.jobs = {j["id"]: j for j in self.tables["job"]}
        blocks = {(b["job_id"], b["number"]): b for b in self.tables["block"]}
        #: Of each (job, pass, block): the rows to do, in order, as far as it is settled which these are.
        self.order: dict[Place, list[int]] = {}
        #: Rows of it that were taken out.
        self.taken_out: dict[Place, int] = {}
        for bp in self.tables["block_pass"]:
            b = blocks[bp["job_id"], bp["block_number"]]
            every = row_order(base64.b64decode(b["row_order"]))
            own = every if bp["row_order"] is None else row_order(base64.b64decode(bp["row_order"]))
            place = (bp["job_id"], bp["pass_number"], bp["block_number"])
            self.order[place] = [b["first_row"] + i for i in own]
            self.taken_out[place] = len(every) - len(own)
        self.first_row = {(b["job_id"], b["number"]): b["first_row"] for b in self.tables["block"]}
        self.open = {s["id"]: s for s in self.tables["subtask"] if s["state"] == "open"}
        self.leases = {(x["subtask_id"], x["attempt"]): x["nonce"] for x in self.tables["lease"]}

    def rows(self, s: dict[str, Any]) -> list[int]:
        """Rows of a sub-task, in its order, but for those that were deleted since."""
        return [
            row
            for b, lo, hi in zip(s["blocks"], s["los"], s["his"], strict=True)
            for row in self.order.get((s["job_id"], s["pass_number"], b), [])[lo:hi]
        ]


def look(world: World) -> Seen:
    with world.database.transaction() as connection:
        return Seen({name: rows or [] for name, rows in connection.execute(_ALL).scalar_one().items()})


def check(world: World) -> None:
    """Raise Broken where an invariant does not hold now, or does not hold of what changed since the last look."""
    seen = look(world)
    cells = _cells(seen)
    _nothing_of_the_deleted(world, seen)
    for j in seen.jobs.values():
        job = world.jobs[UUID(j["id"])]
        mine = cells.get(j["id"], {})
        if job.asked:
            _gone_by_right(world, seen, job, j)
            _landed_once(world, seen, job, j)
            _dropped_by_right(world, seen, job, mine)
            if world.callers.jobs[job.id].loading.folds:
                _folded_once(seen, job, j)
            _ends_when_closed(world, job, j)
        if job.uploaded:
            _uploaded_once(world, job, j)
        if j["state"] in GROWING and j["blocks_done"] == j["n_blocks"]:
            total = j["cells_ok"] + j["cells_error"] + j["cells_skipped"]
            _must(total == j["n_rows"] * j["n_tasks"], f"2: {total} cells are counted of all that has landed")
        _must(
            j["state"] != "running" or j["blocks_done"] < j["n_blocks"],
            f"17: all is answered in job {j['id'][-2:]}, and it runs on",
        )
        _counters(job, j, mine, _skipped(seen, j["id"]) + _dropped(seen, j["id"], mine))
        _write_once(job, j, mine)
        _right(world, job, mine)
        _frozen(job, j, mine)
        _told(world, job, mine)
    _ends_are_told(world, seen)
    _each_row_in_one_place(seen)
    _nothing_waits_in_vain_or_runs_early(seen)
    _leases(seen)
    _suspects(world, seen)
    _waste(world, seen)
    _closed_by_right(world, seen)
    _no_report_lost(world, seen)
    world.known |= {s["id"] for s in seen.tables["subtask"]}
    world.before = seen


def check_end(world: World) -> None:
    """After ``heal``: all jobs have ended, complete, and nothing is left lying about."""
    seen = look(world)
    for j in seen.jobs.values():
        _must(
            j["state"] in ("succeeded", "cancelled"),
            f"7: job {j['id'][-2:]} is {j['state']} after all faults ended",
        )
        total = j["cells_ok"] + j["cells_error"] + j["cells_skipped"]
        _must(total == j["n_rows"] * j["n_tasks"], f"7: job {j['id'][-2:]} accounts for {total} cells")
        job = world.jobs[UUID(j["id"])]
        if j["state"] == "succeeded":
            kept = total - job.past.total()
            _must(len(job.cells) == kept, f"7: {len(job.cells)} of {kept} cells can be read")
    for asked in world.callers.asks:
        if seen.jobs[str(asked.job)]["state"] == "succeeded" and not asked.refused:
            _must(asked.answer is not None, f"7: {asked.key!r} was never answered")
    for name in ("piece", "lease", "cells"):
        _must(not seen.tables[name], f"7: left in {name}: {seen.tables[name]}")
    _must(not seen.open, f"7: sub-tasks still open: {list(seen.open)}")
    for c in seen.tables["column"]:
        _must(
            c["refs"] == c["shown"],
            f"7: column {c['id']} has {c['refs']} references, and {c['shown']} show it",
        )


def _gone_by_right(world: World, seen: Seen, job: Job, j: dict[str, Any]) -> None:
    """Only answered blocks of an open job are deleted; their cells stay counted, and what is kept is told."""
    there = {b["number"] for b in seen.tables["block"] if b["job_id"] == j["id"]}
    gone = {
        number: span for number, span in job.spans.items() if number not in there and span[0] not in job.gone
    }
    if gone:
        assert world.before is not None
        was = world.before.jobs[j["id"]]["state"]
        _must(was == "open", f"19: job {j['id'][-2:]} is {was}, and lost blocks {sorted(gone)}")
        done = {
            b["number"] for b in world.before.tables["block"] if b["job_id"] == j["id"] and b["done_number"]
        }
        _must(gone.keys() <= done, f"19: blocks {sorted(gone.keys() - done)} went that were not answered")
    for first, n in gone.values():
        rows = range(first, first + n)
        job.gone.update(rows)
        for row in rows:
            for task in job.tasks:
                answer = job.cells.pop((row, task))
                skipped = answer in (*TAKEN_OUT, *DROPPED)
                job.past["ok" if isinstance(answer, int) else "skipped" if skipped else "error"] += 1
    world.callers.forget_blocks(job.id, gone)
    past = tuple(j[f"past_{kind}"] for kind in ("ok", "error", "skipped"))
    found = tuple(job.past[kind] for kind in ("ok", "error", "skipped"))
    _must(past == found, f"19: {past} cells are counted of rows that are gone, and there were {found}")
    first = j["first_row"]
    _must(
        not job.gone or max(job.gone) < first,
        f"19: rows are kept from {first} on, and {max(job.gone, default=0)} is gone",
    )


def _landed_once(world: World, seen: Seen, job: Job, j: dict[str, Any]) -> None:
    """Each row of an open job is that of one key; rows are dense, and stay where they came to stand."""
    there, rows = world.callers.jobs[job.id], list[str | Problem]()
    asks = [a for a in seen.tables["ask"] if a["job_id"] == j["id"]]
    blocks = {b["number"]: b for b in seen.tables["block"] if b["job_id"] == j["id"]}
    for at in range(j["n_blocks"]):
        where = f"block {at} of job {j['id'][-2:]}"
        if at not in blocks:
            _must(at in job.spans, f"14: {where} is not there")
            rows += job.rows[job.spans[at][0] : sum(job.spans[at])]
            continue
        block = blocks[at]
        job.spans[at] = (block["first_row"], block["n_rows"])
        _must(block["first_row"] == len(rows), f"14: {where} begins at {block['first_row']}, not {len(rows)}")
        for a in asks:
            if a["block_number"] == at:
                whose = there.rows.get((bytes.fromhex(a["key"]), bytes.fromhex(a["digest"])))
                _must(whose is not None and len(whose) == a["n_rows"], f"13: nobody asked {a}")
                _must(a["lo"] == len(rows) - block["first_row"], f"13: {where} has rows of no key before {a}")
                rows += whose or ()
        # What was given up has no key any more.
        gone = {a.place[1]: a for a in world.callers.asks if a.job == job.id and a.gone and a.place[0] == at}  # type: ignore[index]
        for lo, asked in sorted(gone.items()):
            _must(lo == len(rows) - block["first_row"], f"13: {where} has rows of no key before {asked}")
            rows += asked.rows
        _must(len(rows) == block["first_row"] + block["n_rows"], f"13: {where} has rows of no key")
    _must(len(rows) == j["n_rows"], f"14: job {j['id'][-2:]} counts {j['n_rows']} rows of {len(rows)}")
    _must(rows[: len(job.rows)] == job.rows, f"14: rows of job {j['id'][-2:]} came to stand elsewhere")
    job.rows = rows


def _dropped_by_right(world: World, seen: Seen, job: Job, mine: dict[tuple[int, str], list[Any]]) -> None:
    """Late or abandoned is only what its callers may give up; late only what was never leased; and its key is free."""
    dropped = {at: answer for at, (answer, *_) in mine.items() if answer in DROPPED}
    if not dropped:
        return
    asks = [a for a in world.callers.asks if a.job == job.id and a.place is not None]
    of = {a: range(a.place[1] + a.place[2], a.place[1] + a.place[2] + len(a.rows)) for a in asks}  # type: ignore[index]
    passes = {t["name"]: t["pass_number"] for t in seen.tables["task"] if t["job_id"] == str(job.id)}
    leased = {
        (s["pass_number"], row)
        for s in seen.tables["subtask"]
        if s["job_id"] == str(job.id)
        for row in seen.rows(s)
    }
    for (row, task), answer in dropped.items():
        _must(
            any(a.drop and row in of[a] for a in asks),
            f"21: row {row} is {answer}, and nobody would give it up",
        )
        _must(
            answer != "late" or (passes[task], row) not in leased,
            f"21: row {row} was leased, and {task} is late",
        )
        held = [a.key for a in asks if row in of[a] and not a.gone]
        _must(not held, f"22: row {row} is {answer}, and keys {held} still stand for it")


def _folded_once(seen: Seen, job: Job, j: dict[str, Any]) -> None:
    """Each row was given what the rows of its key before it come to, and the state is that of all of them."""
    #: Whose -> how many rows, their sum, the last one.
    known: dict[str, list[Any]] = {}
    #: Row -> what it was given, of those that are still kept.
    given: dict[int, list[Any]] = {}
    for block in (b for b in seen.tables["block"] if b["job_id"] == j["id"]):
        values = decode_block(base64.b64decode(block["payload"])).values
        rows = zip(values["n"], values["spent"], values["lately"], strict=True)
        given.update(enumerate(map(list, rows), block["first_row"]))
    for row, words in enumerate(job.rows):
        if isinstance(words, str):
            before = known.setdefault(who_of(words), [0, 0, None])
            now = given.get(row, before)
            _must(now == before, f"20: row {row} was given {now}, and before it was {before}")
            known[who_of(words)] = [before[0] + 1, before[1] + amount_of(words), words]
    kept = [unwrap(base64.b64decode(f["state"])) for f in seen.tables["fold"] if f["job_id"] == j["id"]]
    # In the order of the names: the newest value with its time, a bucket of counts, one of sums.
    found = sorted([n[0], spent[0][0], lately[1]] for lately, n, spent in kept)
    _must(
        found == sorted(known.values()) or (not found and j["state"] != "open"),
        f"20: the state is {found}, and the rows come to {sorted(known.values())}",
    )


def _ends_when_closed(world: World, job: Job, j: dict[str, Any]) -> None:
    asked = world.callers.jobs[job.id].closing
    _must(asked or j["state"] in ("open", "cancelled"), f"16: nobody closed job {j['id'][-2:]}: {j['state']}")


def _uploaded_once(world: World, job: Job, j: dict[str, Any]) -> None:
    """An upload has the rows of its parts, and comes to its end only when it was closed."""
    _must(
        j["n_rows"] == len(job.rows), f"14: job {j['id'][-2:]} counts {j['n_rows']} rows of {len(job.rows)}"
    )
    closing = world.uploads.jobs[job.id].closing
    _must(
        closing or j["state"] in ("loading", "cancelled"),
        f"18: nobody closed the upload of job {j['id'][-2:]}: {j['state']}",
    )


def _told(world: World, job: Job, mine: dict[tuple[int, str], list[Any]]) -> None:
    """What a caller was told is what can be read, ever after."""
    for asked in world.callers.asks:
        if asked.job == job.id and asked.place is not None and asked.answer is not None:
            first = asked.place[1] + asked.place[2]
            for (i, task), answer in asked.answer.items():
                if first + i in job.gone:
                    continue
                now = mine.get((first + i, task), [None])[0]
                _must(now == answer, f"15: {asked.key!r} was told {answer} by {task}, and it is {now}")


def _own(job: Job, row: int) -> int:
    """The number that the row's text begins with, by which its failures and deaths are counted."""
    words = job.rows[row]
    return row_of(words) if isinstance(words, str) else -1


def _must(holds: object, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def _cells(seen: Seen) -> dict[str, dict[tuple[int, str], list[Any]]]:
    """Job -> (row, task) -> its answers: a code, or the class of its error."""
    names = {(t["job_id"], t["number"]): t["name"] for t in seen.tables["task"]}
    found: dict[str, dict[tuple[int, str], list[Any]]] = defaultdict(lambda: defaultdict(list))
    for part in seen.tables["cells"]:
        place = (part["job_id"], part["pass_number"], part["block_number"])
        rows = seen.order[place][part["lo"] : part["hi"]]
        for number, wire in unwrap(base64.b64decode(part["columns"])).items():
            column = Column.from_wire(wire)
            for i, (row, answer) in enumerate(zip(rows, _answers(column), strict=True)):
                if column.status[i] & STATE_MASK != RETURNED:
                    found[part["job_id"]][row, names[part["job_id"], int(number)]].append(answer)
    for c in seen.tables["shown"]:
        first = seen.first_row[c["job_id"], c["block_number"]]
        status = base64.b64decode(c["status"]) if c["status"] else bytes(c["n_rows"])
        for i in range(c["n_rows"]):
            at = (first + i, names[c["job_id"], c["task_number"]])
            ok = status[i] & STATE_MASK == OK
            found[c["job_id"]][at].append(c["codes"][i] if ok else c["errors"][str(i)]["error"])
    return found


def _answers(column: Column) -> list[Any]:
    codes = array_of(column, "codes").tolist()
    states = [s & STATE_MASK for s in column.status]
    return [
        codes[i] if s == OK else column.errors[i].error if s == ERROR else None for i, s in enumerate(states)
    ]


def _skipped(seen: Seen, job: str) -> int:
    """Cells of rows that were taken out of a pass, whether its block is sealed by now or not."""
    return sum(
        seen.taken_out[bp["job_id"], bp["pass_number"], bp["block_number"]] * bp["todo"].bit_count()
        for bp in seen.tables["block_pass"]
        if bp["job_id"] == job
    )


def _dropped(seen: Seen, job: str, mine: dict[tuple[int, str], list[Any]]) -> int:
    """Cells that were given up, but for those of rows that were taken out of their pass, since what it reads was."""
    rows: dict[int, set[int]] = defaultdict(set)
    for (of, number, _), order in seen.order.items():
        if of == job:
            rows[number].update(order)
    passes = {t["name"]: t["pass_number"] for t in seen.tables["task"] if t["job_id"] == job}
    return sum(answers[0] in DROPPED and row in rows[passes[task]] for (row, task), answers in mine.items())


def _counters(job: Job, j: dict[str, Any], mine: dict[tuple[int, str], list[Any]], skipped: int) -> None:
    twice = [at for at, answers in mine.items() if len(answers) > 1]
    _must(not twice, f"1: more than one result of {twice}")
    ok = sum(isinstance(answers[0], int) for answers in mine.values())
    shown = sum(answers[0] in (*TAKEN_OUT, *DROPPED) for answers in mine.values())
    error = len(mine) - ok - shown
    if j["state"] in CARVED:
        # A row that came in broken is an error from the first, and shown with its block.
        broken = [row for row, words in enumerate(job.rows) if isinstance(words, Problem)]
        error += sum((row, task) not in mine for row in broken if row not in job.gone for task in job.tasks)
    counted, found = (j["cells_ok"], j["cells_error"]), (job.past["ok"] + ok, job.past["error"] + error)
    _must(counted == found, f"2: counted {counted} cells, and found {found}")
    if j["state"] in (*CARVED, "succeeded"):
        n = job.past["skipped"] + (shown if j["state"] == "succeeded" else skipped)
        _must(j["cells_skipped"] == n, f"2: counted {j['cells_skipped']} skipped cells, and found {n}")


def _write_once(job: Job, j: dict[str, Any], mine: dict[tuple[int, str], list[Any]]) -> None:
    if job.frozen is None and j["state"] in (*CARVED, "succeeded"):
        for at, answer in job.cells.items():
            now = mine.get(at, [None])[0]
            _must(now == answer, f"4: {at} was {answer}, and is {now}")
    job.cells = {at: answers[0] for at, answers in mine.items()}


def _right(world: World, job: Job, mine: dict[tuple[int, str], list[Any]]) -> None:
    for (row, task), (answer, *_) in mine.items():
        words = job.rows[row]
        if isinstance(words, Problem):
            _must(answer == "bad_row", f"7: row {row} came in broken, and is {answer}")
        elif isinstance(answer, int):
            right = label_for(task, words)
            _must(answer == right, f"7: row {row} of {task} is {right}, not {answer}")
            if task in HELD_BY:
                _must(_held(mine, row, task), f"23: row {row} of {task} ran, and its condition does not hold")
        elif answer == "condition":
            _must(
                _held(mine, row, task) is False,
                f"23: row {row} of {task} is skipped, and its condition holds",
            )
        elif answer == "upstream":
            needed = NEEDS.get(task) or HELD_BY[task]
            read = mine.get((row, needed), [None])[0]
            _must(isinstance(read, str), f"7: row {row} of {task} is skipped, and {needed} is {read}")
        elif answer in DROPPED:
            continue
        elif answer == "poison":
            _must(
                job.died_alone[_own(job, row)] >= MAX_DEATHS_ALONE,
                f"9: row {row} is poison, and ran alone in {job.died_alone[_own(job, row)]} dying processes",
            )
        elif answer == "worker_died":
            _must(world.deaths >= MAX_DEATHS_UNSEEN, f"9: row {row} is {answer} after {world.deaths} deaths")
        else:
            failures = job.failures[_own(job, row)]
            _must(failures >= MAX_TRIES, f"9: row {row} is {answer} after {failures} failures")


def _held(mine: dict[tuple[int, str], list[Any]], row: int, task: str) -> bool | None:
    """Whether the condition of a task holds for a row; None where what it reads has no answer."""
    read = mine.get((row, HELD_BY[task]), [None])[0]
    return HEAD.labels[read] == HELD if isinstance(read, int) else None


def _frozen(job: Job, j: dict[str, Any], mine: dict[tuple[int, str], list[Any]]) -> None:
    if j["state"] not in ("succeeded", "cancelled", "failed"):
        return
    now = (*j.values(), sorted((at, *answers) for at, answers in mine.items()))
    if job.frozen is None:
        job.frozen = now
    _must(job.frozen == now, f"3: job {j['id'][-2:]} ended and changed: {job.frozen} {now}")


def _ends_are_told(world: World, seen: Seen) -> None:
    """One event of each job that has ended, deleted or not, and none of another."""
    told = sorted(t["about"] for t in seen.tables["told"])
    ended = {id_ for id_, j in seen.jobs.items() if j["state"] in ENDED}
    gone = {str(job.id) for job in world.jobs.values() if job.deleted}
    _must(told == sorted(ended | gone), f"3: {len(ended | gone)} jobs have ended, and of {told} it is told")


def _nothing_of_the_deleted(world: World, seen: Seen) -> None:
    gone = {str(job.id) for job in world.jobs.values() if job.deleted}
    _must(not gone & seen.jobs.keys(), "3: a deleted job is there")
    for name, rows in seen.tables.items():
        _must(not any(r.get("job_id") in gone for r in rows), f"3: a deleted job has rows in {name}")


def _each_row_in_one_place(seen: Seen) -> None:
    """Beyond the cursor, in one piece, in one open sub-task, or done; nothing of a job that has ended."""
    places: dict[Place, Counter[int]] = defaultdict(Counter)
    waiting: Counter[tuple[str, int]] = Counter()
    for p in seen.tables["piece"]:
        places[p["job_id"], p["pass_number"], p["block_number"]].update(range(p["lo"], p["hi"]))
        waiting[p["job_id"], p["pass_number"]] += p["hi"] - p["lo"]
    for s in seen.open.values():
        for b, lo, hi in zip(s["blocks"], s["los"], s["his"], strict=True):
            places[s["job_id"], s["pass_number"], b].update(range(lo, hi))
    busy = {job for job, _, _ in places} | {s["job_id"] for s in seen.open.values()}
    ended = {id_ for id_, j in seen.jobs.items() if j["state"] in ENDED}
    _must(not busy & ended, f"3: open sub-tasks or pieces of jobs that ended: {busy & ended}")
    for part in seen.tables["cells"]:
        column = Column.from_wire(next(iter(unwrap(base64.b64decode(part["columns"])).values())))
        done = [i for i, s in enumerate(column.status) if s & STATE_MASK != RETURNED]
        places[part["job_id"], part["pass_number"], part["block_number"]].update(part["lo"] + i for i in done)
    for bp in seen.tables["block_pass"]:
        if bp["job_id"] in ended:
            continue
        here = places[bp["job_id"], bp["pass_number"], bp["block_number"]]
        if bp["state"] == "waiting":
            _must(not here, f"5: rows of a block run that waits for others: {dict(here)}")
            continue
        if bp["state"] == "sealed":
            _must(not here, f"5: rows of a sealed block wait or run: {dict(here)}")
            continue
        here.update(range(bp["cursor"], bp["n"]))
        waiting[bp["job_id"], bp["pass_number"]] += bp["n"] - bp["cursor"]
        wrong = {i: here[i] for i in range(bp["n"]) if here[i] != 1}
        _must(not wrong, f"5: block {bp['block_number']}: position -> places it is in: {wrong}")
    for p in seen.tables["pass"]:
        counted, found = p["rows_waiting"], waiting[p["job_id"], p["number"]]
        _must(p["job_id"] in ended or counted == found, f"5: {found} rows wait, and {counted} are counted")


def _nothing_waits_in_vain_or_runs_early(seen: Seen) -> None:
    """A pass of a block waits if and only if something that it reads is not sealed there."""
    shown = {(c["job_id"], c["block_number"], c["task_number"]) for c in seen.tables["shown"]}
    needs = {(p["job_id"], p["number"]): p["needs"] for p in seen.tables["pass"]}
    for bp in seen.tables["block_pass"]:
        if seen.jobs[bp["job_id"]]["state"] in ENDED or not bp["todo"]:
            continue
        reads = needs[bp["job_id"], bp["pass_number"]]
        missing = [t for t in reads if (bp["job_id"], bp["block_number"], t) not in shown]
        where = f"pass {bp['pass_number']} of block {bp['block_number']}"
        # A block without a good row was never to wait.
        if bp["state"] != "waiting" and seen.order[bp["job_id"], bp["pass_number"], bp["block_number"]]:
            _must(not missing, f"5: {where} is {bp['state']}, and task {missing} that it reads is not sealed")
        if bp["state"] == "waiting":
            _must(missing, f"5: {where} waits for nothing")


def _leases(seen: Seen) -> None:
    of = Counter(subtask for subtask, _ in seen.leases)
    _must(
        of.keys() <= seen.open.keys(), f"5: leases of sub-tasks that closed: {of.keys() - seen.open.keys()}"
    )
    for id_, s in seen.open.items():
        _must(of[id_] in (1, 2), f"5: an open sub-task has {of[id_]} leases")
        _must(of[id_] == 1 or not (s["exclusive"] or s["deaths"]), "9: a suspect was doubled")


def _suspects(world: World, seen: Seen) -> None:
    """Whoever must run alone ran in a process that died, or between two that did."""
    for s in (*seen.open.values(), *seen.tables["piece"]):
        if not s["exclusive"]:
            continue
        blocks = (
            (s["blocks"], s["los"], s["his"])
            if "blocks" in s
            else ([s["block_number"]], [s["lo"]], [s["hi"]])
        )
        job = world.jobs[UUID(s["job_id"])]
        for b, lo, hi in zip(*blocks, strict=True):
            order = seen.order[s["job_id"], s["pass_number"], b]
            blamed = [i for i, row in enumerate(order) if _own(job, row) in job.suspects]
            fair = blamed and min(blamed) <= lo and hi - 1 <= max(blamed)
            _must(
                fair, f"9: rows {order[lo:hi]} are suspected; in dying processes ran {sorted(job.suspects)}"
            )


def _waste(world: World, seen: Seen) -> None:
    times: Counter[tuple[str, int, int]] = Counter(
        (s["job_id"], s["pass_number"], row)
        for s in seen.tables["subtask"]
        if s["job_id"] in seen.jobs
        for row in seen.rows(s)
    )
    most = max(times.values(), default=0)
    _must(
        most <= 1 + world.costs,
        f"8: a row was in {most} sub-tasks, after {world.costs} faults that may cost one",
    )


def _closed_by_right(world: World, seen: Seen) -> None:
    """A sub-task is done or failed by a report of an attempt that had a live lease, and by nothing else."""
    if world.before is None:
        return
    for s in seen.tables["subtask"]:
        if s["state"] not in ("done", "failed"):
            continue
        was = next((t["state"] for t in world.before.tables["subtask"] if t["id"] == s["id"]), "open")
        if was == s["state"]:
            continue
        _must(was == "open", f"5: sub-task {s['id']} was {was}, and is {s['state']}")
        by = [
            key
            for key in world.before.leases
            if key[0] == s["id"] and s["state"] in world.reported.get(key, ())
        ]
        _must(by, f"6: sub-task {s['id']} is {s['state']}, and no live attempt of it reported so")


def _no_report_lost(world: World, seen: Seen) -> None:
    """What was reported under a live lease waits on the stream until it is recorded."""
    waiting = {key for key, _ in world.transport.entries.values()}
    lost = (seen.leases.keys() & world.reported.keys()) - waiting
    _must(not lost, f"5: attempts {lost} reported; they are neither recorded nor on the stream")
