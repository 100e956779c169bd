"""What a killed site had not written yet is what the comparison with CloudTrail finds."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from tests.test_audit import empty_site, run, site
from tests.trail import record, write

__all__ = ["empty_site", "site"]

pytestmark = pytest.mark.everywhere

#: Calls whose events are written before the site holds them, and calls before it is killed.
WRITTEN, CALLS = 20, 50

KILLED = f"""
    import signal, time
    from pathlib import Path
    folder = Path(os.environ["FOLDER"])
    settings.KMS_HASHER = {{
        **settings.KMS_HASHER,
        "PROVIDER": "tests.projects.noting_kms.Provider",
        "OPTIONS": {{"path": folder / "keys.json", "allow_without_debug": True}},
    }}
    from django.contrib.auth.hashers import check_password, make_password
    from kms_hasher import keyring
    from kms_hasher.audit import writer
    provider = keyring.provider()
    provider.create_alias("alias/tests", provider.create_key().key_arn)
    pid = os.fork()
    if not pid:
        writer.FLUSH_AGE = 0.05
        encoded = make_password("secret")
        for _ in range({WRITTEN} - 1):
            assert check_password("secret", encoded)
        while AuditEvent.objects.count() < {WRITTEN}:
            time.sleep(0.01)
        time.sleep(0.1)
        writer.FLUSH_AGE = 60.0
        while True:
            assert check_password("secret", encoded)
    calls = folder / "calls"
    while not calls.exists() or calls.read_text().count("\\n") < {CALLS}:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""

COMPARED = """
    import datetime, json, logging
    logging.getLogger("kms_hasher.alarms").disabled = True  # alarms are what is wanted
    from kms_hasher import history
    from kms_hasher.audit import reconcile
    from kms_hasher.models import AuditEvidence
    now = datetime.datetime.now(datetime.timezone.utc)
    history.record_key(os.environ["KEY"], now)
    later = now + datetime.timedelta(hours=1)
    report = reconcile.reconcile([os.environ["FOLDER"]], now=later)
    assert not report.errors, report.errors
    kinds = AuditEvidence.objects.values_list("finding__kind", flat=True).distinct()
    print(json.dumps({
        "calls": report.calls,
        "matched": report.matched,
        "recorded": " ".join(AuditEvent.objects.values_list("request_ids", flat=True)).split(),
        "found": list(AuditEvidence.objects.values_list("request_id", flat=True)),
        "kinds": list(kinds.order_by()),
    }))
    connection.close()
"""


def test_what_a_killed_site_lost_is_found_by_the_comparison(site: str, tmp_path: Path) -> None:
    noted, trail = tmp_path / "site", tmp_path / "trail"
    noted.mkdir()
    run(KILLED, site, FOLDER=str(noted))
    calls = [json.loads(line) for line in (noted / "calls").read_text().splitlines()]
    times = [datetime.datetime.fromisoformat(call.pop("time")) for call in calls]
    write(
        trail,
        times[-1],
        [
            record(time, awsRegion="local-1", **call)
            for time, call in zip(times, calls, strict=True)
        ],
    )
    ids = {call["request_id"] for call in calls}
    told = json.loads(run(COMPARED, site, FOLDER=str(trail), KEY=calls[0]["key"]))
    lost = ids - set(told["recorded"])
    assert len(told["found"]) == len(lost) and set(told["found"]) == lost
    assert told["kinds"] == (["unknown-call"] if lost else [])
    assert (told["calls"], told["matched"]) == (len(ids), len(ids) - len(lost))
    if os.environ.get("AUDIT") == "buffered":
        assert len(lost) >= CALLS - WRITTEN
    else:
        assert len(lost) <= 1  # the one that was under way
