"""Where metrics may be served: an address that says what it opens."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.config.listen_address import parse
from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load


@pytest.mark.parametrize(
    "text,shown,loopback",
    [
        ("127.0.0.1:9469", "127.0.0.1:9469", True),
        ("localhost:9469", "127.0.0.1:9469", True),
        ("[::1]:9469", "[::1]:9469", True),
        ("unix:///run/lmd/metrics.sock", "unix:///run/lmd/metrics.sock", True),
        ("0.0.0.0:9469", "0.0.0.0:9469", False),
        ("[::]:9469", "[::]:9469", False),
        ("192.168.1.5:9469", "192.168.1.5:9469", False),
    ],
)
def test_an_address_is_read_and_only_this_machine_is_loopback(text: str, shown: str, loopback: bool) -> None:
    address = parse(text)
    assert (str(address), address.is_loopback) == (shown, loopback)


@pytest.mark.parametrize(
    "text",
    ["", "9469", ":9469", "*:9469", "worker.lan:9469", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1", "::1:9469",
     "[127.0.0.1]:9469", "http://127.0.0.1:9469", "unix:run/x.sock", "unix://run/x.sock", "unix:///", "unix:///run/",
     "unix:///" + "x" * 120, "127.0.0.1:９"],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_start_with_its_key(text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(None, {"metrics.listen": text}, environ={})
    assert any("listen" in problem and "expected" in problem for problem in raised.value.problems)


def test_an_address_that_others_reach_is_warned_of() -> None:
    (warning,) = [w for w in load(None, {"metrics.listen": "0.0.0.0:9469"}, environ={}).warnings if "metrics" in w]
    assert "ask for no password" in warning
    assert not any("metrics" in w for w in load(None, {"metrics.listen": "127.0.0.1:9469"}, environ={}).warnings)


def test_a_file_that_node_exporter_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(None, {"metrics.textfile": "/tmp/lmd.txt"}, environ={})
    assert any(".prom" in problem for problem in raised.value.problems)
