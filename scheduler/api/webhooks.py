"""Routes of webhooks: a tenant says where it wants to be told of events. A secret is shown once."""

from __future__ import annotations

import logging
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Annotated, Any, get_args

from fastapi import Path, Response
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, NotFound, Problem
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
from motet.tasks import short
from scheduler.api.auth import Caller, Identity
from scheduler.api.records import moment
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.routing import Routes, body, reply, takes
from scheduler.store import webhooks as store
from scheduler.store.webhooks import WebhookEntry
from scheduler.webhooks.addresses import RefusedAddress, resolved_addresses, target
from scheduler.webhooks.deliverer import allowed_hosts
from scheduler.webhooks.posting import NotTaken, post
from scheduler.webhooks.telling import (
    body_of,
    event_kind,
    event_name,
    event_of,
    shown_secret,
    signed_headers,
)

log = logging.getLogger(__name__)
routes = Routes(tags=["webhooks"])

WebhookPath = Annotated[str, Path(description="The webhook's id.", examples=["wh_3f9c2a8e51d0"])]

_EVENTS: tuple[str, ...] = get_args(EventName)
_ID = re.compile(r"wh_[0-9a-f]{12}")
_SECRET_BYTES = 32


@routes.get(
    "/v1/webhooks",
    summary="The tenant's webhooks, and how their deliveries stand",
)
def list_webhooks(use: Use, caller: Caller) -> WebhookList:
    with use.database.transaction() as connection:
        found = store.webhooks(connection, caller.tenant)
    return WebhookList(webhooks=tuple(WebhookRecord(**_described(one)) for one in found))


@routes.post(
    "/v1/webhooks",
    summary="Be told of events from now on",
    status_code=201,
    response_model=Webhook,
    response_description="Its secret is never shown again.",
    openapi_extra=takes(WebhookRequest, {"url": "https://hooks.example/motet", "events": ["job.ended"]}),
)
async def make_webhook(
    use: Use, caller: Caller, asked: Annotated[WebhookRequest, body(WebhookRequest)]
) -> Response:
    await _must_be_reachable(asked.url, use)
    return await run_in_threadpool(_make, use, caller, asked)


async def _must_be_reachable(url: str, use: Resources) -> None:
    """Raises InvalidJob for an address that motet does not connect to. It is looked at again at each delivery."""
    try:
        await resolved_addresses(target(url, allowed_hosts(use.settings)))
    except RefusedAddress as refused:
        raise InvalidJob(
            Problem(
                "url",
                f"{short(url)}: {refused}",
                "https, and a host of the public internet",
                "choose another address, or have an administrator allow its host in MOTET_WEBHOOK_HOSTS",
            )
        ) from None


def _make(use: Resources, caller: Identity, asked: WebhookRequest) -> Response:
    id_, secret = f"wh_{secrets.token_hex(6)}", secrets.token_bytes(_SECRET_BYTES)
    with use.database.transaction() as connection:
        store.add_webhook(
            connection,
            caller.tenant,
            id_=id_,
            url=asked.url,
            kinds=[event_kind(name) for name in asked.events or _EVENTS],
            job=None if asked.job is None else job_id(asked.job),
            secret=secret,
            by=caller.token,
        )
        (made,) = store.webhooks(connection, caller.tenant, id_)
    log.info("webhook made", extra={"webhook": id_, "tenant": caller.tenant})
    shown = Webhook(**_described(made), secret=shown_secret(secret))
    return reply(shown, 201, {"Cache-Control": "no-store"})


@routes.delete(
    "/v1/webhooks/{webhook}",
    summary="Tell it nothing more",
    status_code=204,
    response_description="What waited for it is dropped.",
)
def remove_webhook(use: Use, caller: Caller, webhook: WebhookPath) -> Response:
    _must_be_an_id(webhook)
    with use.database.transaction() as connection:
        if not store.remove_webhook(connection, caller.tenant, webhook):
            raise NotFound("no webhook of this id; GET /v1/webhooks lists them")
    log.info("webhook removed", extra={"webhook": webhook})
    return Response(status_code=204)


@routes.post(
    "/v1/webhooks/{webhook}/test",
    summary="Send a message of type `test`, once, at once",
)
async def test_webhook(use: Use, caller: Caller, webhook: WebhookPath) -> WebhookTest:
    _must_be_an_id(webhook)
    url, secret = await run_in_threadpool(_secret, use, caller, webhook)
    sent, name = body_of("test", datetime.now(UTC), {"webhook": webhook}), f"msg_test_{secrets.token_hex(6)}"
    began = time.monotonic()
    status, error = None, ""
    try:
        status = await post(
            url,
            signed_headers(secret, name, time.time(), sent),
            sent,
            allowed=allowed_hosts(use.settings),
            ca=use.settings.webhook_ca,
        )
    except NotTaken as why:
        error = str(why)
    took_s = round(time.monotonic() - began, 3)
    return WebhookTest(taken=status is not None, status=status, error=error, seconds=took_s)


def _secret(use: Resources, caller: Identity, webhook: str) -> tuple[str, bytes]:
    with use.database.transaction() as connection:
        return store.webhook_secret(connection, caller.tenant, webhook)


@routes.post(
    "/v1/webhooks/{webhook}/replay",
    summary="Deliver events again",
    openapi_extra=takes(ReplayRequest, {"since_s": 3600}),
)
def replay_events(
    use: Use, caller: Caller, webhook: WebhookPath, asked: Annotated[ReplayRequest, body(ReplayRequest)]
) -> Replayed:
    _must_be_an_id(webhook)
    event = None if asked.event is None else event_of(asked.event)
    if asked.event is not None and event is None:
        raise NotFound("no event of this webhook-id; it is kept for some days")
    with use.database.transaction() as connection:
        again = store.replay(connection, caller.tenant, webhook, event=event, since_s=asked.since_s)
    if event is not None and not again:
        raise NotFound("no event of this webhook-id; it is kept for some days")
    log.info("events replayed", extra={"webhook": webhook, "events": again})
    return Replayed(events=again)


def _must_be_an_id(webhook: str) -> None:
    """What has no such form is none. Raises NotFound."""
    if not _ID.fullmatch(webhook):
        raise NotFound("no webhook of this id; GET /v1/webhooks lists them")


def _described(one: WebhookEntry) -> dict[str, Any]:
    return {
        "id": one.id,
        "url": one.url,
        "events": tuple(map(event_name, one.kinds)),
        "job": None if one.job_id is None else str(one.job_id),
        "created": moment(one.created) or "",
        "by": one.by,
        "waiting": one.waiting,
        "delivered": one.delivered,
        "given_up": one.given_up,
        "failures": one.failures,
        "oldest_waiting": moment(one.oldest),
        "last_error": one.said,
    }
