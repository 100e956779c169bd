"""The KMS of tests/projects/live.py: the local one, which fails where a file says so."""

from __future__ import annotations

from typing import Any

from kms_hasher import exceptions
from kms_hasher.providers import base
from kms_hasher.providers.local import LocalProvider


class Provider(LocalProvider):
    """Beside the key file "fault" may name the class of the error that ReEncrypt meets."""

    def re_encrypt(self, *args: Any, **kwargs: Any) -> base.ReEncrypted:
        try:
            fault = self._file.path.with_name("fault").read_text()
        except FileNotFoundError:
            return super().re_encrypt(*args, **kwargs)
        raise getattr(exceptions, fault)("of the test", operation="ReEncrypt")
