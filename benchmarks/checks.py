"""What a worker does with a request before its engine has it, in one thread and nothing else: the pure functions, one after the other.

With them the relay of (k) tells what the checks cost, and what is left are the worker's threads, its queue and its journal.
"""

from __future__ import annotations

import time

import orjson

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.control_tokens import clean_call
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.history import fit
from llamacpp_mqtt_deploy.core.requests import check_request, read_request
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.engines.server import dialects
from llamacpp_mqtt_deploy.engines.server.controls import LearnedControls
from llamacpp_mqtt_deploy.stopping import StopSignal
from llamacpp_mqtt_deploy.worker.policies import Policies

_BUDGET_TOKENS = 1024


class Checks:
    """Reads and checks requests as the worker does: address, payload, fields, place in the queue, history, forged turns, body."""

    def __init__(self, root: str) -> None:
        self._topics = TopicMap(root, "relay")
        self._policies = Policies.of(Settings())
        self._queue = AdmissionQueue(limits=QueueLimits(queue_size=64, session_queue=8), aging_s=30.0)
        self._controls = LearnedControls(lambda *_: (404, {}))
        self._stop = StopSignal()

    def read(self, topic: str, payload: bytes) -> tuple[str, str, bytes]:
        """Session, request id and the body for the engine. Raises what a worker refuses."""
        address = self._topics.address(topic)
        assert address is not None
        policy = self._policies.routes[address.route]
        raw = read_request(payload, policy=policy.parse, templated=address.templated)
        assert raw is not None
        address = self._topics.with_payload(address, raw.body, policy.parse.names)
        request = check_request(raw, policy=self._policies.parse_for(address.route, address.first_level))
        assert address.session is not None
        assert request.request_id is not None
        self._queue_up(address.first_level, (address.route, address.session), request.request_id, len(payload))
        fitted = fit(
            (),
            system_prompt=policy.system_prompt,
            newest=request.new_messages(),
            budget_tokens=_BUDGET_TOKENS,
            count=lambda _: None,
        )
        call = EngineCall(messages=fitted.messages, sampling={**policy.sampling, **request.sampling})
        call, _ = clean_call(call, self._controls.of(call, None, self._stop))
        return address.session, request.request_id, orjson.dumps(dialects.body(call, "llamacpp", model=None))

    def _queue_up(self, first_level: str, session: tuple[str, str], request_id: str, size: int) -> None:
        """In and out again: a relay makes nobody wait."""
        now = time.monotonic()
        ticket = Ticket((*session, request_id), 1, first_level, session, now, size)
        self._queue.admit(ticket, retry_after_s=1.0)
        assert self._queue.next(now) is ticket
        self._queue.leave_session(session)
