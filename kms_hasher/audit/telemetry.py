"""
An event in the names of OpenTelemetry's semantic conventions, for the log line.

They are those of an AWS SDK's call, version 1.37 of the conventions or later; what has a name
there that no attribute has is named by the metric.
See https://opentelemetry.io/docs/specs/semconv/cloud-providers/aws-sdk/.
"""

from __future__ import annotations

from kms_hasher import calls, signals
from kms_hasher.signals import Event

#: Operations of events that are no calls.
NO_CALLS = (signals.PARSE, signals.CIRCUIT_BREAKER)


def attributes(event: Event) -> dict[str, str | float]:
    """Return what the conventions have names for; nothing for an event that is no call."""
    if event.operation in NO_CALLS:
        return {}
    found: dict[str, str | float] = {
        "rpc.system": "aws-api",
        "rpc.service": "KMS",
        "rpc.method": event.operation,
        "rpc.client.call.duration": round(event.latency, 6),
    }
    if region := calls.region_of(event.key):
        found["cloud.region"] = region
    if event.request_ids:
        found["aws.request_id"] = event.request_ids[-1]
    if event.error_code:
        found["error.type"] = event.error_code
    return found
