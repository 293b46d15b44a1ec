"""One Redis setting serves kombu and redis-py."""

import pytest
from redis import Redis

from motet.errors import SetupError
from motet.protocol.redis_url import redis_py_url


def test_redis_py_finds_in_our_socket_url_what_kombu_finds_there():
    url = redis_py_url("redis+socket://worker:p%40ss-_x@/tmp/a%20b/valkey.sock?virtual_host=3")
    found = Redis.from_url(url).connection_pool.connection_kwargs
    wanted = {"username": "worker", "password": "p@ss-_x", "path": "/tmp/a b/valkey.sock", "db": 3}
    assert {name: found[name] for name in wanted} == wanted


def test_the_database_of_a_socket_is_0_unless_named():
    assert redis_py_url("redis+socket:///run/v.sock") == "unix:///run/v.sock?db=0"


@pytest.mark.parametrize("url", ["redis://a:b@host:6379/0", "rediss://a:b@host/1?ssl_cert_reqs=required"])
def test_a_tcp_url_stays_as_it_is(url: str):
    assert redis_py_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:6379",
        "unix://a:secret@/v.sock",
        "redis+socket://a:secret@",
        "redis+socket://a:secret@host/v.sock",
        "redis:///0",
        "redis://a:secret@[::1",
    ],
)
def test_any_other_url_is_refused_without_showing_its_password(url: str):
    with pytest.raises(SetupError, match="expected redis://") as caught:
        redis_py_url(url)
    assert "secret" not in str(caught.value)
