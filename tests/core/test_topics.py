"""A topic becomes an address and back, and topics that would loop or mix are refused before anything is subscribed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.route_checks import check_routes
from llamacpp_mqtt_deploy.core.routes import MAX_TOPIC_BYTES, RouteTopics, TopicTemplate, is_session, route_topics
from llamacpp_mqtt_deploy.core.topics import filter_fault, filters_overlap, topic_fault, topic_matches

LEVEL = st.text("ABCXYZabcxyz0189_.-", min_size=1, max_size=64)
SHORT = st.text("abz0_.-", min_size=1, max_size=8)
SESSION = st.one_of(SHORT, st.tuples(SHORT, SHORT).map("/".join))

MAZE = route_topics(
    root="llm",
    name="maze",
    request="maze/user_input",
    reply="maze/assistant_response/{session}",
    trust_payload_session=True,
)
PORTAL = route_topics(root="llm", name="portal")
LAB = route_topics(
    root="llm", name="lab", request="lab/{session}/ask", reply="lab/{session}/answer", control="lab/{session}/control"
)
WORLD = TopicMap("llm", "orin1", (MAZE, PORTAL, LAB))


def faults(*routes: RouteTopics, root: str = "llm") -> list[str]:
    return check_routes(root=root, worker_id="orin1", routes=routes)


def custom(**topics: str | bool | None) -> RouteTopics:
    given = {"name": "maze", "request": "maze/{session}/ask", "reply": "maze/{session}/answer", "control": None}
    return RouteTopics(**(given | topics))  # type: ignore[arg-type]


# --- session paths ---------------------------------------------------------------------------------------------------


@given(SESSION)
def test_a_session_path_has_one_or_two_levels(session: str) -> None:
    assert is_session(session)


@pytest.mark.parametrize(
    "session",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "a/b/c",
        "abc\n",
        "abc\r",
        "a/b\n",
        "a b",
        "a+",
        "#",
        "$SYS",
        "é",
        "a\0",
        "a" * 65,
        "a:b",
    ],
)
def test_what_is_no_session_path_is_refused(session: str) -> None:
    assert not is_session(session)
    assert WORLD.address(f"llm/request/{session}") is None
    assert WORLD.address(f"llm/control/{session}") is None
    with pytest.raises(BadRequest) as caught:
        WORLD.with_session("maze", session)
    assert "session_id" in caught.value.details["fields"]


@given(st.text())
def test_any_topic_gives_an_address_or_none(topic: str) -> None:
    for candidate in (topic, f"llm/request/{topic}", f"lab/{topic}/ask"):
        address = WORLD.address(candidate)
        assert address is None or address.reply_topic is not None


# --- addresses -------------------------------------------------------------------------------------------------------


@given(SESSION)
def test_the_reply_topic_is_the_request_topic_with_request_replaced_by_reply(session: str) -> None:
    address = WORLD.address(f"llm/request/{session}")
    assert address is not None
    assert (address.kind, address.route, address.session) == ("request", "default", session)
    assert address.reply_topic == f"llm/reply/{session}"
    assert address.first_level == session.split("/", maxsplit=1)[0]


@given(SESSION)
def test_control_of_a_session_answers_where_its_requests_do(session: str) -> None:
    for ask, control in (("llm/request/{}", "llm/control/{}"), ("lab/{}/ask", "lab/{}/control")):
        request, order = WORLD.address(ask.format(session)), WORLD.address(control.format(session))
        assert request is not None
        assert order is not None
        assert order.kind == "control"
        assert (order.route, order.session, order.reply_topic) == (request.route, request.session, request.reply_topic)


@given(SESSION)
def test_a_reply_topic_has_no_address(session: str) -> None:
    for topic in ("llm/request/{}", "llm/portal/request/{}", "lab/{}/ask"):
        address = WORLD.address(topic.format(session))
        assert address is not None
        assert address.reply_topic is not None
        assert WORLD.address(address.reply_topic) is None


@given(SESSION)
def test_every_subscribed_filter_leads_to_an_address_and_every_address_is_subscribed(session: str) -> None:
    topics = ["llm/request/{}", "llm/portal/request/{}", "lab/{}/ask", "llm/control/{}", "lab/{}/control"]
    filters = [*WORLD.request_filters(), *WORLD.control_filters()]
    for topic in [*(topic.format(session) for topic in topics), "maze/user_input"]:
        assert WORLD.address(topic) is not None
        assert sum(topic_matches(each, topic) for each in filters) == 1


@given(SESSION)
def test_a_session_from_the_payload_counts_as_its_route(session: str) -> None:
    bare = WORLD.address("maze/user_input")
    assert bare is not None
    assert (bare.session, bare.reply_topic) == (None, None)
    address = WORLD.with_session("maze", session)
    assert address.reply_topic == f"maze/assistant_response/{session}"
    assert address.first_level == bare.first_level == "route:maze"


def test_a_payload_session_too_long_for_the_reply_topic_is_refused() -> None:
    reply = "maze/" + "r" * 100 + "/{session}"
    world = TopicMap("llm", "w", (route_topics(root="llm", name="maze", reply=reply, trust_payload_session=True),))
    assert world.with_session("maze", "s" * 64).session == "s" * 64
    with pytest.raises(BadRequest):
        world.with_session("maze", "s" * 64 + "/" + "s" * 64)


@given(LEVEL, LEVEL, LEVEL)
def test_no_address_has_a_topic_over_the_limit(root: str, user: str, name: str) -> None:
    topic = f"{root}/request/{user}/{name}"
    address = TopicMap(root, "w").address(topic)
    if len(topic) > MAX_TOPIC_BYTES:
        assert address is None
    else:
        assert address is not None
        assert address.reply_topic is not None
        assert len(address.reply_topic) <= MAX_TOPIC_BYTES


def test_only_the_own_admin_topic_is_an_address() -> None:
    address = WORLD.address("llm/admin/orin1")
    assert address is not None
    assert (address.kind, address.reply_topic) == ("admin", "llm/admin-reply/orin1")
    assert WORLD.address("llm/admin/orin2") is None
    for topic in (WORLD.admin_reply_topic, WORLD.status_topic, WORLD.health_topic):
        assert WORLD.address(topic) is None
    assert topic_matches(WORLD.status_filter, WORLD.status_topic)
    for topic in (
        WORLD.status_topic,
        "llm/status/",
        "llm/status",
        "llm/status/a/b",
        "other/status/a",
        "status/a",
        "x/llm/status/a",
    ):
        assert WORLD.is_status(topic) == topic_matches(WORLD.status_filter, topic)


def test_a_route_without_topics_lives_below_the_root_under_its_name() -> None:
    assert (PORTAL.request, PORTAL.reply, PORTAL.control) == (
        "llm/portal/request/{session}",
        "llm/portal/reply/{session}",
        "llm/portal/control/{session}",
    )
    trusting = route_topics(root="llm", name="portal", trust_payload_session=True)
    assert (trusting.request, trusting.control) == ("llm/portal/request", None)
    assert faults(PORTAL) == faults(trusting) == []


# --- filters ---------------------------------------------------------------------------------------------------------

WORDS = ["a", "b", "", "$x"]
TOPICS = ["/".join(levels) for size in (1, 2, 3, 4) for levels in itertools.product(WORDS, repeat=size)]
FILTER = st.builds(
    lambda levels, rest: "/".join([*levels, *rest]) or "#",
    st.lists(st.sampled_from([*WORDS, "+", "+"]), max_size=3),
    st.sampled_from([[], [], ["#"]]),
)


@given(FILTER, FILTER)
def test_filters_overlap_when_some_topic_matches_both(one: str, other: str) -> None:
    shared = any(topic_matches(one, topic) and topic_matches(other, topic) for topic in TOPICS)
    assert filters_overlap(one, other) == filters_overlap(other, one) == shared


@pytest.mark.parametrize(
    "topic_filter, topic, expected",
    [
        ("sport/#", "sport", True),
        ("sport/#", "sport/a/b", True),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+", "/finance", False),
        ("+/+", "/finance", True),
        ("#", "$SYS/a", False),
        ("+/a", "$SYS/a", False),
        ("$SYS/#", "$SYS/a", True),
    ],
)
def test_filters_match_as_in_the_examples_of_the_standard(topic_filter: str, topic: str, expected: bool) -> None:
    assert topic_matches(topic_filter, topic) is expected


# --- checks ----------------------------------------------------------------------------------------------------------


def test_the_topics_of_the_protocol_have_no_fault() -> None:
    assert faults() == []
    assert faults(MAZE, PORTAL, LAB) == []


@pytest.mark.parametrize(
    "route, words",
    [
        (custom(request="llm/request/{session}"), "run twice"),
        (custom(request="llm/{session}/x"), "run twice"),
        (custom(request="llm/control/{session}"), "run twice"),
        (custom(request="llm/admin/{session}"), "run twice"),
        (custom(request="llm/reply/{session}"), "its own messages"),
        (custom(request="llm/status/{session}"), "its own messages"),
        (custom(request="llm/health/{session}"), "its own messages"),
        (custom(request="llm/admin-reply/{session}"), "its own messages"),
        (custom(reply="llm/request/{session}"), "its own messages"),
        (custom(reply="llm/admin/{session}"), "its own messages"),
        (custom(reply="maze/{session}/ask"), "its own messages"),
        (custom(reply="llm/reply/{session}"), "mix"),
        (custom(reply="llm/status/{session}"), "mix"),
        (custom(control="maze/{session}/ask"), "run twice"),
        (custom(request="maze/ask"), "trust_payload_session"),
        (custom(reply="maze/answers"), "every client reads every answer"),
        (custom(control="maze/control"), "control needs a level"),
        (custom(trust_payload_session=True), "remove one of the two"),
        (custom(request="maze/in", trust_payload_session=True, control="maze/{session}/stop"), "no control topic"),
        (custom(request="maze/+/{session}"), "wildcard"),
        (custom(request="maze/{session}/#"), "wildcard"),
        (custom(request="$share/g/{session}"), "begins with $"),
        (custom(reply="$SYS/{session}"), "begins with $"),
        (custom(request="maze\n/{session}"), "control character"),
        (custom(request="maze\0/{session}"), "control character"),
        (custom(reply="maze/\ud800/{session}"), "surrogate"),
        (custom(request="/maze/{session}"), "empty level"),
        (custom(request=""), "empty"),
        (custom(request="maze/{session}/{session}"), "more than once"),
        (custom(request="maze/x{session}"), "braces"),
        (custom(request="maze/{user}/{session}"), "braces"),
        (custom(reply="r" * 150 + "/{session}"), "too long"),
        (custom(name="two words"), "no name for a route"),
        (custom(name="default"), "its topics are fixed"),
    ],
)
def test_a_route_that_cannot_be_served_is_refused_with_a_sentence(route: RouteTopics, words: str) -> None:
    found = faults(route)
    assert any(words in fault for fault in found), found
    assert all(fault.isprintable() for fault in found)
    with pytest.raises(ValueError, match=r"."):
        TopicMap("llm", "orin1", (route,))


def test_two_routes_that_share_requests_or_answers_are_refused() -> None:
    one, other = custom(), custom(name="other", request="{session}/maze/ask")
    assert any("routes.maze.request" in fault and "routes.other.request" in fault for fault in faults(one, other))
    assert any("mix" in fault for fault in faults(one, custom(name="other", request="other/{session}")))
    assert faults(one, one) == ["route maze is configured twice"]


def test_the_default_route_may_be_configured_but_not_moved() -> None:
    assert faults(route_topics(root="llm", name="default")) == []
    assert faults(route_topics(root="llm", name="default", request="x/{session}")) != []
    assert faults(route_topics(root="llm", name="default", trust_payload_session=True)) != []


def test_a_root_or_worker_id_that_is_no_level_is_refused() -> None:
    for bad in ("", "a/b", "$SYS", "llm\n", "+"):
        assert "mqtt.root" in check_routes(root=bad, worker_id="w", routes=())[0]
        assert "mqtt.worker_id" in check_routes(root="llm", worker_id=bad, routes=())[0]


TEMPLATE = st.lists(
    st.sampled_from(["llm", "request", "reply", "status", "a", "b", "{session}"]), min_size=1, max_size=4
)


@given(st.lists(st.tuples(TEMPLATE, TEMPLATE), max_size=3), SESSION)
def test_a_map_that_can_be_made_never_reads_its_own_messages(
    templates: list[tuple[list[str], list[str]]], session: str
) -> None:
    routes = tuple(
        RouteTopics(name=f"r{number}", request="/".join(request), reply="/".join(reply))
        for number, (request, reply) in enumerate(templates)
    )
    if faults(*routes):
        return
    world = TopicMap("llm", "w", routes)
    for route in world.routes:
        address = world.address(route.request.replace("{session}", session))
        assert address is not None
        assert (address.route, address.session) == (route.name, session)
        assert address.reply_topic is not None
        assert world.address(address.reply_topic) is None
        subscribed = [*world.request_filters(), *world.control_filters()]
        assert not any(topic_matches(each, address.reply_topic) for each in subscribed)


@pytest.mark.parametrize(
    "character", ["\x01", "\x1f", "\x7f", "\x9f", "\ufdd0", "\ufdef", "\ufffe", "\U0001ffff", "\ud800"]
)
def test_a_character_that_a_broker_may_disconnect_for_is_a_fault_of_a_topic(character: str) -> None:
    assert topic_fault(f"a/{character}")


@pytest.mark.parametrize("character", [" ", "~", "\xa0", "\ufdcf", "\ufdf0", "\ufffd", "\U00010000", "é"])
def test_characters_beside_those_are_none(character: str) -> None:
    assert topic_fault(f"a/{character}") is None


def test_a_topic_and_a_filter_have_at_most_200_levels() -> None:
    most = "/".join(["a"] * 200)
    for fault in (topic_fault, filter_fault):
        assert fault(most) is None
        assert "200 levels" in (fault(f"{most}/a") or "")


# --- borders ---------------------------------------------------------------------------------------------------------


def test_a_topic_has_two_hundred_bytes_at_most() -> None:
    session = "s" * 64 + "/" + "t" * 64
    for less, found in ((0, True), (1, False)):
        tail = "x" * (200 - len(f"a/{session}/") + less)
        map_ = TopicMap("llm", "w", (custom(request=f"a/{{session}}/{tail}"),))
        assert (map_.address(f"a/{session}/{tail}") is not None) is found
        map_ = TopicMap("llm", "w", (custom(reply=f"b/{{session}}/{tail}"),))
        assert (map_.address(f"maze/{session}/ask") is not None) is found
        assert map_.address("maze/short/ask") is not None


def test_a_session_that_makes_the_reply_topic_too_long_is_refused_with_that_reason() -> None:
    map_ = TopicMap("llm", "w", (custom(request="a", reply="b" * 110 + "/{session}", trust_payload_session=True),))
    with pytest.raises(BadRequest, match="shorter: the reply topic must not be longer than 200 bytes"):
        map_.with_session("maze", "s" * 64 + "/" + "t" * 64)
    with pytest.raises(BadRequest, match="mySession: expected one or two levels") as caught:
        map_.with_session("maze", None, field_name="mySession")
    assert list(caught.value.details["fields"]) == ["mySession"]
    assert map_.find_session("maze", "s" * 64) is not None
    assert map_.find_session("maze", "a b") is None


@pytest.mark.parametrize("rest,long", [("a/" + "r" * 133, False), ("a/" + "r" * 134, True)])
def test_a_template_leaves_sixty_four_bytes_for_the_session(rest: str, long: bool) -> None:
    assert (faults(custom(request=f"{rest}/{{session}}")) == []) is not long
    fixed = rest + "r" * 64
    assert (faults(custom(request=fixed, trust_payload_session=True)) == []) is not long


@pytest.mark.parametrize("character", list(map(chr, (0x1F, 0x7F, 0x80, 0x9F, 0xD800, 0xDFFF, 0xFEFF))))
def test_a_character_for_which_a_broker_hangs_up_is_refused_in_a_template(character: str) -> None:
    assert any("control character" in fault for fault in faults(custom(request=f"a{character}/{{session}}")))


@pytest.mark.parametrize("character", [" ", "~", "\xa0", "\ud7ff", "\ue000", "\ufefe", "é"])
def test_a_character_beside_those_is_taken_in_a_template(character: str) -> None:
    assert faults(custom(request=f"a{character}/{{session}}")) == []


def test_a_long_topic_is_shown_in_part_only() -> None:
    (fault,) = faults(custom(request="+" * 90 + "/{session}"))
    assert "+" * 80 in fault
    assert "+" * 81 not in fault


def test_a_route_is_below_the_root_unless_its_topics_are_named() -> None:
    named = route_topics(root="llm", name="maze", request="a/{session}", reply="b/{session}", control="c/{session}")
    assert (named.request, named.reply, named.control) == ("a/{session}", "b/{session}", "c/{session}")
    assert not named.trust_payload_session
    default = route_topics(root="llm", name="default")
    assert (default.request, default.reply, default.control) == tuple(
        f"llm/{kind}/{{session}}" for kind in ("request", "reply", "control")
    )


def test_the_default_route_is_there_once_and_first() -> None:
    assert [route.name for route in TopicMap("llm", "w", (PORTAL,)).routes] == ["default", "portal"]
    default = route_topics(root="llm", name="default")
    assert [route.name for route in TopicMap("llm", "w", (PORTAL, default)).routes] == ["portal", "default"]


def test_maps_of_the_same_topics_are_equal_and_show_their_routes_once() -> None:
    one, other = (TopicMap("llm", "orin1", (PORTAL,)) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1
    assert repr(one).count("name='portal'") == 1


def test_a_template_reads_what_it_fills() -> None:
    for text in ("a/{session}/b", "{session}", "{session}/b", "a/{session}"):
        template = TopicTemplate.cut(text)
        for session in ("s", "u/s"):
            assert template.read(template.fill(session).split("/")) == session
        assert template.read(template.fill("u/s/t").split("/")) is None
        assert template.read(template.fill("u s").split("/")) is None
    fixed = TopicTemplate.cut("a/b")
    assert (fixed.filters(), fixed.fill("s")) == (["a/b"], "a/b")
    assert (fixed.read(["a", "b"]), fixed.read(["a"]), fixed.read(["a", "c"])) == ("", None, None)
    assert TopicTemplate.cut("a/{session}/b").filters() == ["a/+/b", "a/+/+/b"]
    between = TopicTemplate.cut("a/{session}/b")
    assert between.read(["x", "s", "b"]) is None
    assert between.read(["a", "s", "x"]) is None


def test_a_topic_has_65535_bytes_at_most() -> None:
    assert topic_fault("x" * 65_535) is None
    assert "65536 bytes" in (topic_fault("x" * 65_536) or "")
    assert filter_fault("é" * 32_768) is not None


def test_the_topics_of_a_worker_bear_its_root_and_its_name() -> None:
    assert (WORLD.admin_topic, WORLD.admin_reply_topic) == ("llm/admin/orin1", "llm/admin-reply/orin1")
    assert (WORLD.status_topic, WORLD.status_filter, WORLD.health_topic) == (
        "llm/status/orin1",
        "llm/status/+",
        "llm/health/orin1",
    )
    admin = WORLD.address("llm/admin/orin1")
    assert admin is not None
    assert (admin.kind, admin.route, admin.session, admin.reply_topic, admin.first_level) == (
        "admin",
        "",
        None,
        "llm/admin-reply/orin1",
        "",
    )
    assert WORLD.address("llm/admin/other") is None
    request = WORLD.address("maze/user_input")
    assert request is not None
    assert (request.kind, request.route, request.session, request.reply_topic, request.first_level) == (
        "request",
        "maze",
        None,
        None,
        "route:maze",
    )
    assert WORLD.with_session("maze", "u/s").first_level == "route:maze"


@pytest.mark.parametrize("topic", ["", "$SYS/a", "a/+", "+", "a/#", "#", "a+b", "a#b"])
def test_what_no_broker_would_publish_is_a_fault_of_a_topic(topic: str) -> None:
    assert topic_fault(topic)


@pytest.mark.parametrize("good", ["a", "+", "#", "+/+", "a/#", "+/a/#", "$SYS/#", "/", "a//b"])
def test_a_legal_filter_has_no_fault(good: str) -> None:
    assert filter_fault(good) is None


@pytest.mark.parametrize("bad", ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "a/b+", "a/##", "a/\x00"])
def test_an_illegal_filter_is_refused(bad: str) -> None:
    assert filter_fault(bad)


@pytest.mark.parametrize(
    "one, other, overlap",
    [("a/#", "a", True), ("a/b/#", "a", False), ("a/+", "a", False), ("a/#", "b", False), ("#", "a/b", True)],
)
def test_a_filter_for_all_below_a_level_overlaps_the_level_itself(one: str, other: str, overlap: bool) -> None:
    assert filters_overlap(one, other) is filters_overlap(other, one) is overlap
