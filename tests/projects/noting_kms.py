"""The KMS of tests/test_lost_events.py: the local one, which notes its calls."""

from __future__ import annotations

import dataclasses
import datetime
import json
import uuid
from collections.abc import Mapping
from typing import Any

from kms_hasher.providers.local import LocalProvider


class Provider(LocalProvider):
    """The file "calls" beside the key file has a line for each call that was answered."""

    def encrypt(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted("Encrypt", args[2], super().encrypt(*args, **kwargs))

    def decrypt(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted("Decrypt", args[2], super().decrypt(*args, **kwargs))

    def _noted(self, operation: str, context: Mapping[str, str], answer: Any) -> Any:
        id_ = str(uuid.uuid4())
        call = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "operation": operation,
            "request_id": id_,
            "key": answer.key_arn,
            "context": dict(context),
        }
        with self._file.path.with_name("calls").open("a") as file:
            file.write(json.dumps(call) + "\n")
        return dataclasses.replace(answer, request_ids=(id_,))
