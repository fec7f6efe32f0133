"""The table in docs/brokers.md says what the tests said."""

from __future__ import annotations

from tests.support.broker_table import read, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.mqtt.test_contract" name="test_order_is_kept[mosquitto-5]"/>
<testcase classname="tests.mqtt.test_contract" name="test_order_is_kept[nats-3.1.1]"><failure message="TimeoutError: no message&#10;more"/></testcase>
<testcase classname="tests.mqtt.test_contract" name="test_properties[mosquitto-5]"/>
<testcase classname="tests.mqtt.test_contract" name="test_properties[nats-3.1.1]"><skipped message="MQTT 3.1.1 has none"/></testcase>
<testcase classname="tests.mqtt.test_contract" name="test_topic[mosquitto-5-nul]"/>
<testcase classname="tests.mqtt.test_contract" name="test_topic[nats-3.1.1-nul]"/>
<testcase classname="tests.mqtt.test_contract" name="test_topic[nats-3.1.1-plus]"><error message="it hung up"/></testcase>
<testcase classname="tests.mqtt.test_contract" name="test_of_no_broker"/>
</testsuite></testsuites>"""


def rows(notes: dict[tuple[str, str], str] | None = None) -> list[str]:
    return table(list(read(REPORT)), notes or {}).splitlines()


def test_each_promise_is_a_row_and_each_broker_a_column() -> None:
    assert rows()[0] == "| | mosquitto, 5 | nats, 3.1.1 |"
    assert rows()[2] == "| Order is kept | yes | **no** (1) |"


def test_what_does_not_apply_is_neither_yes_nor_no() -> None:
    assert rows()[3] == "| Properties | yes | - |"


def test_a_promise_with_several_cases_holds_only_when_all_do() -> None:
    assert rows()[4] == "| Topic | yes | **no** (2) |"


def test_what_failed_says_why_in_the_words_of_the_test_or_of_who_knows() -> None:
    assert "1. nats: Not known; the test says: no message" in rows()
    assert "1. nats: It forgets." in rows({("nats", "test_order_is_kept"): "It forgets."})
