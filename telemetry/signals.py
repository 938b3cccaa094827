"""Detectors: what a new request tells about an earlier answer. Pure functions, each with a version.

Detected signals get an event id made from the detector and the request, so that detecting twice counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

from telemetry.events import Interaction, Signal

REGENERATE = "regenerate/1"


def regenerated(earlier: Sequence[Interaction], new: Interaction) -> Signal | None:
    """The same input sent again in the same session: the user wants another answer than the last one to it.

    Not when an SDK retried by itself, and not when the earlier attempt failed: that says nothing of its quality.
    """
    if new.sdk_retry or new.input_hash is None:
        return None
    same = [i for i in earlier if i.input_hash == new.input_hash and i.at <= new.at and i.event_id != new.event_id]
    if not same or same[-1].error not in (None, "client_left"):
        return None
    return Signal(
        event_id=f"{REGENERATE}:{new.event_id}",
        at=new.at,
        received_at=new.at,
        kind="regenerate",
        tenant=new.tenant,
        response_id=same[-1].request_id,
        subject=new.user,
        source="detected",
        detector=REGENERATE,
        reason="the same messages were sent again",
        verified=True,
    )
