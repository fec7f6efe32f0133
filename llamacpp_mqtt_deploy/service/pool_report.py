"""The retained status of a pool: who is in it, and how full it is. One of its workers publishes it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.events import PROTOCOL
from llamacpp_mqtt_deploy.pool_ports import MemberSeen, PoolLoad

# What fits into a status of 128 KiB; a pool of thousands tells the rest as a number.
_MOST_TOLD = 500


def pool_fields(name: str, load: PoolLoad, *, told_by: str, every_s: float) -> Mapping[str, Any]:
    """The status as it is published on `{root}/pool/{name}`."""
    here = [seen for seen in load.members if seen.lease_left_s > 0]
    return {
        "pool": name,
        "protocol": PROTOCOL,
        "ts": round(time.time(), 3),
        "every_s": every_s,
        "told_by": told_by,
        "workers": len(here),
        "slots": {"total": sum(seen.member.slots for seen in here), "busy": sum(seen.running for seen in here)},
        "queue": dict(load.queued),
        "oldest_wait_s": round(load.oldest_wait_s, 3),
        "models": sorted({model for seen in here for model in seen.member.models}),
        "members": [_member(seen) for seen in load.members[:_MOST_TOLD]],
    }


def _member(seen: MemberSeen) -> Mapping[str, Any]:
    state = "gone" if seen.lease_left_s <= 0 else "draining" if seen.member.draining else "online"
    return {
        "worker": seen.member.worker_id,
        "instance": seen.member.instance,
        "state": state,
        "slots": {"total": seen.member.slots, "busy": seen.running},
        "version": seen.member.version,
    }
