"""Makes the job of a request, with the responder that publishes its events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.formats.route_formats import WHOLE_FORMATS
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.core.requests import Generate
from llamacpp_mqtt_deploy.core.spending import Estimate
from llamacpp_mqtt_deploy.io_loop import IoLoop, Timer
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Outbox
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.responder import Responder
from llamacpp_mqtt_deploy.worker.route_renderings import RenderedOutbox

# Of a request's JSON, for a guess at its prompt.
_BYTES_PER_TOKEN = 4


class JobMaker:
    """Builds a job with its responder; the same for fresh requests and for those recovered from the journal."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        loop: IoLoop,
        policies: Callable[[], Policies],
        max_event_bytes: Callable[[], int],
        active_streams: Callable[[], int],
        new_rendering: Callable[[EntryKey], RouteRendering | None] = lambda _key: None,
    ) -> None:
        self._new_rendering = new_rendering
        self._outbox = outbox
        self._loop = loop
        self._active_streams = active_streams
        self._policies = policies
        self._max_event_bytes = max_event_bytes

    def make(self, *, entry: Entry, address: Address, request: Generate, received_at: float, deadline: float) -> Job:
        assert address.session is not None
        assert address.reply_topic is not None
        policies = self._policies()
        streaming = policies.settings.streaming
        policy = policies.routes[address.route]
        rendering = self._new_rendering(entry.key)
        if rendering is not None:
            # What its messages are made of; no client of the route reads the event itself.
            request = replace(request, full_content=True)
        responder = Responder(
            outbox=self._outbox if rendering is None else RenderedOutbox(self._outbox, rendering),
            topic=address.reply_topic,
            writer=EventWriter(
                request_id=entry.key.request_id, session_id=address.session, max_bytes=self._max_event_bytes()
            ),
            correlation=entry.correlation,
            silent=request.stream is False or policy.mode == "off" or policy.format in WHOLE_FORMATS,
            wake=self._wake,
            coalesce_min_s=streaming.coalesce_min_s,
            active_streams=self._active_streams,
            coalesce_max_chars=streaming.coalesce_max_chars,
            max_event_bytes=self._max_event_bytes,
        )
        job = Job(
            key=entry.key,
            entry=entry,
            address=address,
            request=request,
            responder=responder,
            session=None if request.mode == "messages" else (address.route, address.session),
            received_at=received_at,
            deadline=deadline,
            estimate=Estimate(
                tokens_in=len(entry.payload) // _BYTES_PER_TOKEN,
                tokens_out=policies.longest_answer(address.route, request),
            ),
            rendering=rendering,
        )
        stop = job.stop  # not the job: a reference cycle would keep it until the garbage collector runs
        responder.on_overflow = lambda: stop.set("outbox_full")
        return job

    def _wake(self, seconds: float, call: Callable[[], None]) -> Timer | None:
        if seconds > 0:
            return self._loop.after(seconds, call)
        self._loop.call_soon(call)
        return None
