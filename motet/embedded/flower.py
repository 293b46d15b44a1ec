"""The Celery app that Flower looks through: ``celery --app=motet.embedded.flower flower``, set up for its narrow rights."""

from __future__ import annotations

from celery import Celery

from motet.settings import Settings

app = Celery("flower", broker=Settings.from_env().need("redis_url").redis_url)
app.conf.update(
    accept_content=["json"],
    broker_connection_max_retries=None,
    broker_transport_options={
        "ack_emulation": False,
        "priority_steps": [0],
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "health_check_interval": 5,
    },
    # kombu tends queues that expire with Lua scripts, which no user of ours may run.
    event_queue_expires=None,
    control_queue_expires=None,
)
