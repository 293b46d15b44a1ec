"""The client: submit rows, plan without running, find jobs, look at models and workers.

It knows the API's routes (docs/http.md) and nothing of what is behind them. httpx loads with the first
``Client``, so that ``import motet`` stays instant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from motet.errors import Conflict, InvalidJob, NotFound, Problem
from motet.folds import Fold, parse_folds
from motet.head_inputs import all_as_trained, leaves_input_to_head
from motet.http import Address, BodyRefused, Http, json_of
from motet.job import Job
from motet.media.reading import MEDIA_SIZE
from motet.media.row_media import MediaOptions, RowMedia
from motet.messages.cluster import Worker, WorkerList
from motet.messages.jobs import (
    MAX_RETENTION_DAYS,
    MIN_KEEP_S,
    JobList,
    JobRecord,
    Plan,
    PlanRequest,
    Priority,
    Submission,
)
from motet.messages.registry import Alias, Promotion
from motet.messages.tokens import Scope, Token, TokenRequest
from motet.messages.webhooks import (
    EventName,
    Replayed,
    ReplayRequest,
    Webhook,
    WebhookList,
    WebhookRecord,
    WebhookRequest,
    WebhookTest,
)
from motet.protocol.manifest import Manifest
from motet.protocol.values import kind_of, text_flaw
from motet.rows import BadRows, cut, survey
from motet.sources import Source
from motet.states import State
from motet.tasks import Features, Prompted, Task, dialogues_of, fields_of, notify_problems, parse, short
from motet.training.lesson import Learned
from motet.training.recipe import Tune
from motet.training.run import TrainRun
from motet.training.starting import Training
from motet.training.starting import start as start_training
from motet.upload import open_job, submit_parts

if TYPE_CHECKING:
    from motet.feed import Feed

Tasks = Mapping[str, Task | Mapping[str, Any]]
#: Name of a field -> what it holds of the rows before.
Folds = Mapping[str, Fold | Mapping[str, Any]]

log = logging.getLogger(__name__)

_PAGE = 50
#: What an id or a model's name looks like.
_SEGMENT = re.compile(r"[A-Za-z0-9_.@+:-]{1,200}")


class Client:
    """A line to one motet server. Usable from several threads and in forked children; closing it leaves its jobs running.

    ``url`` and ``token`` default to ``MOTET_URL`` and ``MOTET_TOKEN``, else to what `motet up` wrote on this
    machine. ``timeout`` is how many seconds one call goes on trying while the server is away or overloaded;
    waiting for a job has a limit of its own. Raises SetupError or Unauthorized where there is no way in.
    """

    def __init__(self, url: str | None = None, token: str | None = None, timeout: float = 60.0) -> None:
        self._http = Http(Address.find(url, token), timeout_s=timeout)

    @classmethod
    def over(cls, http: Http) -> Client:
        """A client over a line that is open already."""
        client = cls.__new__(cls)
        client._http = http
        return client

    @property
    def url(self) -> str:
        return self._http.address.url

    # -- jobs

    def submit(
        self,
        source: Source,
        tasks: Tasks,
        *,
        name: str = "",
        priority: Priority = "normal",
        reuse: bool = True,
        bad_rows: BadRows = "refuse",
        deadline_s: float | None = None,
        retention_days: float | None = None,
        notify_when: str | None = None,
        progress: bool | None = None,
        key: str | None = None,
        opened: Callable[[Job], object] | None = None,
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
        media_thumbs: bool = False,
    ) -> Job:
        """Send the rows and start the job; return it when all of them are sent, while it runs.

        Rows that have arrived are run while others are sent. ``opened`` is called once with the job, in this thread,
        before its parts are sent (of a job that is one request, after it): another thread may read its results then.

        ``source`` is a path (.jsonl, .ndjson, .csv, .tsv, .txt, each also with .gz, or .parquet), a list or
        any iterable of texts or mappings (read once, in flat memory), a DataFrame or an Arrow table. Only the
        fields that tasks read leave this machine, with their types: numbers, dates, nulls, lists and objects as well as
        texts; one that a Chat reads may hold a list of messages. A file is
        read whole or refused: one with a quote that is never closed, say, or that grows meanwhile. With
        ``bad_rows="error"`` a value that is none (NaN, bytes, a missing field) gives error cells to the tasks that read
        it, and a row that is none to all; ``"refuse"`` raises InvalidJob that lists them, and nothing stays behind on
        the server.
        ``reuse=False`` computes everything anew. A job that has not ended ``deadline_s`` seconds from now fails;
        what is done by then can be read. ``retention_days`` after its end it is deleted with its results, or
        sooner where the server keeps jobs no longer. Webhooks are told of each row for which ``notify_when`` holds, a
        condition on answers such as ``"risk > 0.4"`` (docs/webhooks.md). ``progress`` forces the bar on or off. Submitting again
        with the same ``key`` gives the same job, or goes on with its upload where that broke off. Pictures that models
        read are opened below ``media_root``, sent once by content, and made smaller to ``media_size`` pixels of their
        longer side; None sends them as they are. ``media_thumbs`` sends each in small as well, for the page of the job's
        rows (docs/media.md).

        While the cluster takes no more rows it waits, and says so on the bar or in the log; where a proxy takes no
        large bodies it sends smaller parts, and logs what to set. Raises InvalidJob,
        Unauthorized, Conflict (the key belongs to another job), Overloaded where that lasts longer than the
        client's ``timeout``, Unreachable.
        """
        specs = self._specs(tasks)
        opening = Submission(
            tasks={task: spec.to_json() for task, spec in specs.items()},
            name=name,
            priority=priority,
            reuse=reuse,
            bad_rows=bad_rows,
            notify_when=_condition(notify_when, specs),
            **_amounts(deadline_s=deadline_s, retention_days=retention_days),
        )
        if key:
            _check_text("key", key, "a key to submit by again", "give one, such as tickets-2026-12")
        own_key = _key_of(key) if key else secrets.token_hex(16)
        options = MediaOptions(root=media_root, size=media_size, thumbs=media_thumbs)
        with RowMedia(self._http, specs, options, key=own_key) as media:
            parts = cut(
                source, fields_of(specs), dialogues=dialogues_of(specs), bad_rows=bad_rows, media=media.rows
            )
            return submit_parts(
                self._http,
                opening,
                parts,
                media,
                prompted=any(isinstance(spec, Prompted) for spec in specs.values()),
                key=own_key,
                resumable=key is not None,
                progress=progress,
                opened=opened,
            )

    def open(
        self,
        tasks: Tasks,
        *,
        name: str,
        priority: Priority = "interactive",
        bad_rows: BadRows = "refuse",
        keep_days: float | None = None,
        retention_days: float | None = None,
        state: Folds | None = None,
        notify_when: str | None = None,
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
        media_thumbs: bool = False,
    ) -> Feed:
        """Open a job for rows that come one by one, each answered at once: ``feed.ask({"text": …})`` (docs/live.md).

        The job stays open until it is closed, whoever leaves. Opening again under its ``name`` with the same tasks and
        options attaches to it, from anywhere; with others it is a Conflict, and so is the name of a job that was closed.
        With ``bad_rows="error"`` a row that a task cannot read is asked and its cell is an error; with ``"refuse"`` it
        raises InvalidJob for its caller. Each row and its key are deleted ``keep_days`` after it was answered, or 7; the
        whole job ``retention_days`` after its end. ``state`` gives each row what was folded of the rows of its key before
        it, as fields of these names. Webhooks are told of each row for which ``notify_when`` holds, a condition on
        answers such as ``"risk > 0.4"`` (docs/webhooks.md). ``media_root``, ``media_size`` and ``media_thumbs`` are as of ``submit``. Raises
        InvalidJob, Unauthorized, Overloaded, Unreachable.
        """
        from motet.feed import Feed

        _check_text("name", name, "a name to find the job by", "give one, such as risk")
        specs = self._specs(tasks)
        opening = Submission(
            tasks={task: spec.to_json() for task, spec in specs.items()},
            name=name,
            priority=priority,
            bad_rows=bad_rows,
            open=True,
            notify_when=_condition(notify_when, specs),
            state=_state(state, specs),
            **_amounts(keep_s=_kept_s(keep_days), retention_days=retention_days),
        )
        try:
            record = open_job(
                self._http, opening, _key_of(name), lambda refusal: log.warning("waiting: %s", refusal)
            )
        except Conflict as refused:
            # Others say what to do by themselves: a model that was removed, the same request under way.
            if "Idempotency-Key" not in str(refused):
                raise
            raise Conflict(
                f"there is a job {short(name)} with other tasks or options; take another name, or pick that one "
                "up by its name alone (client.feed, `motet ask`)"
            ) from None
        if record.state != State.OPEN:
            raise Conflict(
                f"the job {short(name)} of these tasks is {record.state} and takes no more rows; "
                "take another name, or remove it first"
            )
        media = MediaOptions(root=media_root, size=media_size, thumbs=media_thumbs)
        return Feed(self._http, record, bad_rows=bad_rows, media=media)

    def feed(
        self,
        name: str,
        *,
        bad_rows: BadRows = "refuse",
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
        media_thumbs: bool = False,
    ) -> Feed:
        """Pick up an open job by its name or id, without its tasks; by its id also one that was closed.

        Of several of that name the newest. Raises NotFound.
        """
        from motet.feed import Feed

        found = next((job for job in self.jobs(State.OPEN) if job.name == name), None)
        if found is None:
            try:
                found = self.job(name)
            except NotFound:
                raise NotFound(
                    f"no open job is called {short(name)}; see `motet jobs --state open`"
                ) from None
        media = MediaOptions(root=media_root, size=media_size, thumbs=media_thumbs)
        return Feed(self._http, JobRecord.of(found.record), bad_rows=bad_rows, media=media)

    def plan(
        self,
        source: Source,
        tasks: Tasks,
        *,
        priority: Priority = "normal",
        bad_rows: BadRows = "refuse",
        media_root: str | os.PathLike[str] | None = None,
        media_size: int | None = MEDIA_SIZE,
    ) -> Plan:
        """What ``submit`` would run, without running it: passes, tokens, seconds, rows that will be cut.

        The whole source is read, so an iterator is used up; only a sample of it is sent, and of pictures no byte. Raises as
        ``submit``.
        """
        specs = self._specs(tasks)
        options = MediaOptions(root=media_root, size=media_size)
        with RowMedia(self._http, specs, options, sends=False) as media:
            found = survey(
                source, fields_of(specs), dialogues=dialogues_of(specs), bad_rows=bad_rows, media=media.rows
            )
        if not found.sample:
            raise InvalidJob(Problem("rows", "no rows", "at least one good row", "check the source"))
        asked = PlanRequest(
            tasks={task: spec.to_json() for task, spec in specs.items()},
            priority=priority,
            bad_rows=bad_rows,
            rows=found.sample,
            total_rows=found.rows,
            total_bytes=found.text_bytes,
        )
        while True:
            try:
                return Plan.of(self._http.post("/v1/plan", asked.to_json(sparse=True)))
            except BodyRefused:
                if asked.rows is None or len(asked.rows) == 1:
                    raise
                # An even sample of an even sample: the estimate is a little rougher.
                asked = replace(asked, rows=asked.rows[::2])

    def train(
        self,
        *,
        name: str,
        trunk: str,
        tasks: Mapping[str, Learned],
        train: Source,
        test: Source | None = None,
        tune: Tune = "heads",
        epochs: int | None = None,
        text: str | Sequence[str] = "text",
        numbers: Sequence[str] = (),
        image: str | None = None,
        features: Features = "last",
        media_root: str | os.PathLike[str] | None = None,
        version: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        command: str = "",
        licence: str = "",
        **more: Any,
    ) -> TrainRun:
        """Train models on labelled rows; return the run at once, while it learns.

        ``tasks``: ``Labels(field)`` or ``Number(field)`` by the name of the task; a row may lack some of them. Rows of
        ``test`` measure what is learned; without it some rows of ``train`` are kept for that. The trunk embeds every row
        once, split over all devices and found again when the same rows come back; then the heads learn in seconds
        (``tune="heads"``), and with ``"lora"`` or ``"all"`` the trunk learns after them, on one device. Out comes a head
        ``<name>.<task>`` for each task, and with the latter two a trunk ``<name>``; ``version`` counts up by default.
        ``text`` is the field, or a template, that heads read; several (``("{history}", "{last}")``) are read apart by the
        trunk, and a head reads their vectors side by side. ``numbers`` are fields that it reads beside them, standardised;
        null is their mean, and told apart. Tasks that ask such a head read the same unless they name others.
        On a trunk that reads pictures only heads learn, from those in the field ``image``, read as ``submit`` reads them;
        ``features="stages"`` gives them more to tell small or drawn things apart.
        ``more``: further fields of ``motet.training.recipe.Recipe``, such as ``patience``, ``hidden``, ``rate``, ``loss``.

        Raises InvalidJob with every problem of the rows, NotFound for the trunk, and as ``submit``.
        """
        return start_training(
            self,
            Training(
                name=name, trunk=trunk, tasks=tasks, train=train, test=test, tune=tune, epochs=epochs, text=text,
                numbers=numbers, image=image, features=features, media_root=media_root, version=version, seed=seed,
                progress=progress, command=command, licence=licence, more=more,
            ),
        )  # fmt: skip

    def jobs(self, state: str | None = None, limit: int | None = None) -> Iterator[Job]:
        """The jobs of the token's tenant, newest first; all of them, or up to ``limit``."""
        left, after = limit, None
        while left is None or left > 0:
            most = _PAGE if left is None else min(left, _PAGE)
            page = JobList.of(self._http.get("/v1/jobs", limit=most, after=after, state=state))
            for record in page.jobs:
                yield Job(self._http, record)
            left = None if left is None else left - len(page.jobs)
            after = page.next
            if after is None:
                return

    def job(self, job_id: str) -> Job:
        """Pick up a job that was submitted before, here or elsewhere. Raises NotFound."""
        return Job(self._http, JobRecord.of(self._http.get(f"/v1/jobs/{_segment('job', job_id)}")))

    # -- what there is

    def models(self) -> list[Manifest]:
        """The registered models."""
        return [Manifest.from_json(model) for model in self._http.get("/v1/models")["models"]]

    def model(self, name: str) -> Manifest:
        """The newest version of a model, or the one of ``name@version`` or ``name@alias``. Raises NotFound."""
        return Manifest.from_json(self._http.get(f"/v1/models/{_segment('model', name)}"))

    def aliases(self) -> list[Alias]:
        """The aliases of all models, each with the version that it means now."""
        models = self._http.get("/v1/models")["models"]
        found = [Alias.of(alias) for model in models for alias in model.get("aliases", ())]
        return sorted(found, key=lambda alias: alias.alias)

    def workers(self) -> list[Worker]:
        """The workers and their devices."""
        return list(WorkerList.of(self._http.get("/v1/workers")).workers)

    # -- webhooks

    def webhooks(self) -> list[WebhookRecord]:
        """The tenant's webhooks, and how their deliveries stand."""
        return list(WebhookList.of(self._http.get("/v1/webhooks")).webhooks)

    def add_webhook(
        self, url: str, *, events: Sequence[EventName] | None = None, job: str | None = None
    ) -> Webhook:
        """Post events to this address from now on: all kinds, or ``events``; of all jobs, or of one.

        Its ``secret``, which proves that a message is motet's, is shown this once. Raises InvalidJob for an address that
        the server does not connect to, NotFound for a job that is none.
        """
        asked = WebhookRequest(url=url, events=None if events is None else tuple(events), job=job)
        # Not tried again: a webhook whose answer was lost would be told all the same, and nobody knew its secret.
        return Webhook.of(self._http.post("/v1/webhooks", asked.to_json(sparse=True), again=False))

    def test_webhook(self, webhook: str) -> WebhookTest:
        """Send a message of type ``test``, once, at once, and say what became of it. Raises NotFound."""
        return WebhookTest.of(self._http.post(f"{_webhook_path(webhook)}/test", {}, again=False))

    def replay_webhook(self, webhook: str, *, event: str | None = None, since_s: float | None = None) -> int:
        """Deliver again what was given up, and all of the last ``since_s`` seconds; or one event, by its ``webhook-id``.

        How many. Raises NotFound.
        """
        asked = ReplayRequest(event=event, **_amounts(since_s=since_s))
        answer = self._http.post(f"{_webhook_path(webhook)}/replay", asked.to_json(sparse=True))
        return Replayed.of(answer).events

    def remove_webhook(self, webhook: str) -> None:
        """Tell it nothing more. Raises NotFound."""
        self._http.request("DELETE", _webhook_path(webhook))

    # -- for administrators

    def drain(self, name: str) -> list[Worker]:
        """Give a worker, or all workers of a host, no more work; they finish what they hold, and stay so.

        Returns them as they are now: ``draining``, then ``drained``. Again is harmless. Raises NotFound.
        """
        return self._tell_workers(name, "drain")

    def resume(self, name: str) -> list[Worker]:
        """Give a drained worker, or all workers of a host, work again. Again is harmless. Raises NotFound."""
        return self._tell_workers(name, "resume")

    def _tell_workers(self, name: str, what: str) -> list[Worker]:
        answer = self._http.post(f"/v1/workers/{_segment('worker', name)}/{what}", {})
        return list(WorkerList.of(answer).workers)

    def remove_model(self, ref: str) -> None:
        """Take ``name@version`` from the registry. Raises Conflict while a running job uses it or an alias means it."""
        self._http.request("DELETE", f"/v1/models/{_segment('model', ref)}")

    def add_artefact(
        self, source: str | Path, name: str, *, version: str | None = None, licence: str = ""
    ) -> Manifest:
        """Register data for functions: a file (.json, .safetensors, .parquet) or a folder of them.

        ``version`` counts up by default; content that is the newest version's already stays that version. Needs an
        administrator's token. Raises SetupError for files that are no data.
        """
        from motet.artefacts import add_artefact

        return add_artefact(self._http, Path(source), name=name, version=version, licence=licence)

    def promote(self, ref: str, alias: str) -> Alias:
        """Let an alias mean a version: after ``promote("support@2", "prod")`` a task may ask for ``support@prod``.

        A job uses, and records, the version that the alias meant when it was submitted. Again is harmless. Raises
        InvalidJob, NotFound, Conflict where the alias is the name of a version.
        """
        name, version = _halves(ref, "version")
        body = json.dumps(Promotion(version=version).to_json()).encode()
        kind = {"Content-Type": "application/json"}
        made = self._http.request("PUT", _alias_path(name, alias), content=body, headers=kind)
        return Alias.of(json_of(made))

    def rollback(self, alias: str) -> Alias:
        """Let ``name@alias`` mean again what it meant before. Twice goes back twice.

        Raises NotFound, Conflict where nothing stood before or that was removed.
        """
        # Not tried again: an answer that was lost may have gone back already.
        path = f"{_alias_path(*_halves(alias, 'alias'))}/rollback"
        return Alias.of(self._http.post(path, {}, again=False))

    def remove_alias(self, alias: str) -> None:
        """Take ``name@alias`` away; the version that it meant stays. Raises NotFound."""
        self._http.request("DELETE", _alias_path(*_halves(alias, "alias")))

    def tokens(self) -> list[Token]:
        """All tokens, without their secrets."""
        return [Token.of(token) for token in self._http.get("/v1/tokens")["tokens"]]

    def create_token(
        self,
        name: str,
        scope: Scope = "user",
        *,
        tenant: str | None = None,
        expires_days: float | None = None,
    ) -> Token:
        """Make a token; its ``token`` is shown this once and stored nowhere."""
        asked = TokenRequest(name=name, scope=scope, tenant=tenant, **_amounts(expires_days=expires_days))
        # Not tried again: a token whose answer was lost would live on unseen.
        return Token.of(self._http.post("/v1/tokens", asked.to_json(sparse=True), again=False))

    def revoke_token(self, token_id: str) -> None:
        """End a token at once. Raises NotFound."""
        self._http.request("DELETE", f"/v1/tokens/{_segment('token', token_id)}")

    # -- the line

    def close(self) -> None:
        """Close the connections. Jobs go on."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.url}>"

    # -- inside

    def _specs(self, tasks: object) -> dict[str, Task]:
        """The tasks, checked as the server would, with what their heads were trained to read. Raises InvalidJob."""
        specs = _parsed(tasks)
        # A head that motet trained is NAME.TASK; no other can know what it reads.
        wanted = {
            task.model
            for task in specs.values()
            if leaves_input_to_head(task) and "." in task.model.partition("@")[0]
        }
        found: dict[str, Manifest] = {}
        for ref in wanted:
            # What is not there the server refuses, beside all other problems.
            with suppress(NotFound):
                found[ref] = self.model(ref)
        return all_as_trained(specs, found)


def _parsed(tasks: object) -> dict[str, Task]:
    """Check the tasks here as the server would, before any row is read. Raises InvalidJob."""
    if isinstance(tasks, Mapping):
        tasks = {name: spec.to_json() if isinstance(spec, Task) else spec for name, spec in tasks.items()}
    specs = parse(tasks)
    if not fields_of(specs):
        raise InvalidJob(
            Problem(
                "tasks",
                "tasks that read only each other",
                "a task that reads a field of the row",
                "name a field, such as {text}, in one of them",
            )
        )
    return specs


def _state(state: object, tasks: Mapping[str, Task]) -> dict[str, Any] | None:
    """Check the folds as the server would. Raises InvalidJob."""
    if state is None:
        return None
    if isinstance(state, Mapping):
        state = {name: fold.to_json() if isinstance(fold, Fold) else fold for name, fold in state.items()}
    return {name: fold.to_json() for name, fold in parse_folds(state, tasks).items()}


def _check_text(field: str, value: object, expected: str, remedy: str) -> None:
    """Raises InvalidJob for what is no text, for an empty one, and for one that cannot be stored."""
    flaw = (
        (text_flaw(value) or ("" if value else f"no {field}")) if isinstance(value, str) else kind_of(value)
    )
    if flaw:
        raise InvalidJob(Problem(field, flaw, expected, remedy))


def _key_of(name: str) -> str:
    """The Idempotency-Key of a job of this name, or of a caller's own key: that, where a header can hold it."""
    if name.isascii() and name.isprintable() and len(name) <= 200:
        return name
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def _kept_s(keep_days: float | None) -> float | None:
    """Seconds for which an open job keeps a row. Raises InvalidJob, by the name under which a caller gave it."""
    if keep_days is None:
        return None
    _amounts(keep_days=keep_days)
    seconds = keep_days * 86_400
    if not MIN_KEEP_S <= seconds <= MAX_RETENTION_DAYS * 86_400:
        least = f"{MIN_KEEP_S / 86_400:.4f} (a minute)"
        what = f"days, {least} to {MAX_RETENTION_DAYS:,}"
        raise InvalidJob(Problem("keep_days", short(keep_days), what, "leave it out for 7"))
    return seconds


def _amounts(**options: object) -> dict[str, Any]:
    """Those options that are given. Raises InvalidJob for what is no number; its limits are the server's to know."""
    given = {name: value for name, value in options.items() if value is not None}
    problems = [
        Problem(name, short(value), "a finite number", "leave it out for none")
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ]
    if problems:
        raise InvalidJob(problems)
    return given


def _segment(what: str, name: str) -> str:
    """An id as one segment of a path. Raises NotFound for what cannot be one, before it asks for another path."""
    if not isinstance(name, str) or not _SEGMENT.fullmatch(name) or name.strip(".") == "":
        raise NotFound(f"no {what} {short(name)!r}")
    return name


def _halves(ref: str, what: str) -> tuple[str, str]:
    """The two sides of ``name@what``. Raises InvalidJob where one is missing."""
    name, _, rest = ref.partition("@")
    if not (name and rest):
        problem = Problem("model", short(ref), f"name@{what}", "see `motet models`")
        raise InvalidJob(problem)
    return name, rest


def _webhook_path(webhook: str) -> str:
    return f"/v1/webhooks/{_segment('webhook', webhook)}"


def _condition(written: str | None, tasks: Mapping[str, Task]) -> str | None:
    """A condition on answers of these tasks. Raises InvalidJob."""
    if problems := notify_problems(written, tasks):
        raise InvalidJob(problems)
    return written


def _alias_path(name: str, alias: str) -> str:
    return f"/v1/models/{_segment('model', name)}/aliases/{_segment('alias', alias)}"
