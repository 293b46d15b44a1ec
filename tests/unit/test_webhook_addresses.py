"""Where motet may connect to on a stranger's word, and what it says there."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime

import pytest

from scheduler.webhooks.addresses import RefusedAddress, is_public, target
from scheduler.webhooks.deliverer import again_after_s, rest_after_s
from scheduler.webhooks.telling import event_of, message_id, shown_secret, signed_headers


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "169.254.1.1", "100.64.0.1", "100.100.100.200", "168.63.129.16"),
        *(
            "192.0.0.1",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.9",
        ),
        *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1"),
        *("2001::1", "2001:0:4136:e378::", "2001:10::1", "2001:db8::1", "3fff::1"),
        *("fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "5f00::1", "4000::1"),
    ],
)
def test_an_address_that_is_no_public_host_is_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.32.0.1",
        "100.128.0.1",
        "198.20.0.1",
        "2606:4700::1111",
        "2a00:1450:4001::200e",
    ],
)
def test_a_public_host_is_not(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "http without TLS"),
        ("ftp://example.com/", "no URL of the form"),
        ("https:///path", "no URL of the form"),
        ("example.com/hook", "no URL of the form"),
        ("https://user:pass@example.com/", "a user or a password"),
        ("https://@example.com/", "a user or a password"),
        ("https://example.com/#part", "a fragment"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:99999/", "no URL"),
        ("https://[::1/", "no URL"),
        ("https://[fe80::1%25eth0]/", "a zone"),
        ("https://2130706433/", "odd form"),
        ("https://0x7f000001/", "odd form"),
        ("https://0x7f.1/", "odd form"),
        ("https://0177.0.0.1/", "odd form"),
        ("https://127.1/", "odd form"),
        ("https://127.0.0.1.nip.1/", "odd form"),
        ("https://exam ple.com/", "characters that no URL has"),
        ("https://example.com\\@evil.com/", "characters that no URL has"),
        ("https://example.com/\r\nHost: evil", "characters that no URL has"),
        ("https://ex\u0430mple.com/", "characters that no URL has"),
        ("https://-example.com/", "no name of a host"),
        ("https://a..b/", "no name of a host"),
        ("https://127%2e0%2e0%2e1/", "a name with a %"),
        ("https://example.com/" + "a" * 2000, "more than 2,000"),
    ],
)
def test_a_url_with_two_meanings_is_refused(url: str, why: str) -> None:
    with pytest.raises(RefusedAddress, match=why):
        target(url)


def test_a_url_is_taken_apart_once() -> None:
    to = target("https://Example.com.:8443/hook?a=b%20c")
    assert (to.tls, to.host, to.port, to.path, to.allowed) == (
        True,
        "example.com",
        8443,
        "/hook?a=b%20c",
        False,
    )
    assert to.host_header == "example.com:8443"
    assert target("https://[2606:4700::1111]").host_header == "[2606:4700::1111]"
    assert target("https://example.com:443").host_header == "example.com"


def test_an_administrator_allows_a_host_or_one_port_of_it() -> None:
    for allowed in ("hooks.lan", "hooks.lan:9000"):
        assert target("http://hooks.lan:9000/", frozenset({allowed})).allowed
    with pytest.raises(RefusedAddress):
        target("http://hooks.lan:9001/", frozenset({"hooks.lan:9000"}))
    assert not target("https://sub.hooks.lan/", frozenset({"hooks.lan"})).allowed


def test_a_message_is_signed_as_standard_webhooks_says() -> None:
    """The example of its specification, with the digest computed here."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"event_type":"ping"}'
    headers = signed_headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9, body)
    signed = b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330." + body
    digest = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{digest}"
    assert headers["webhook-timestamp"] == "1614265330"
    assert shown_secret(secret) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_an_event_has_one_name_for_ever() -> None:
    at = datetime(2026, 12, 1, tzinfo=UTC)
    assert message_id(17, at) == message_id(17, at) != message_id(17, datetime(2026, 12, 2, tzinfo=UTC))
    assert event_of(message_id(17, at)) == event_of("msg_17") == 17
    assert event_of("msg_test_17") is event_of("17") is event_of("msg_1 ") is None


def test_tries_come_slower_and_slower_and_a_day_holds_some_dozen() -> None:
    assert [again_after_s(n, 0.5) for n in (1, 2, 3, 4)] == [5, 20, 80, 320]
    assert (again_after_s(1, 0.0), again_after_s(1, 1.0)) == pytest.approx((4, 6))
    after = [0.0]
    while after[-1] < 86_400:
        after.append(after[-1] + again_after_s(len(after), 0.5))
    assert 10 <= len(after) <= 16
    assert [rest_after_s(n) for n in (1, 2, 3)] == [5, 10, 20]
    assert rest_after_s(10_000) == 300
