"""
A KMS of one's own, in a file: for development and the demo; never for production.

The file is `_keyfile`, what the keys do is `_service`.
"""

from __future__ import annotations

import os

from django.conf import settings

from kms_hasher.exceptions import ConfigurationError
from kms_hasher.providers._keyfile import KeyFile
from kms_hasher.providers._service import SoftwareProvider


class LocalProvider(SoftwareProvider):
    """
    AWS KMS on the key file at `path`, which the first `create_key` makes.

    `account` (12 digits) and `region` only form the ARNs. Any number of threads and processes
    may share the file. Beyond what `Provider` says, the methods raise `KeyFileError`, a
    `KMSError`, if the file cannot be used. Raises `ConfigurationError` where
    `settings.DEBUG` is off, unless `allow_without_debug` is True.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        account: str = "000000000000",
        region: str = "local-1",
        allow_without_debug: bool = False,
    ) -> None:
        if not settings.DEBUG and allow_without_debug is not True:
            raise ConfigurationError(
                "The local provider keeps its keys in a plain file and is for development: "
                'set KMS_HASHER["PROVIDER"] to "aws". Where no real password is ever '
                'stored, KMS_HASHER["OPTIONS"] may hold "allow_without_debug": True.'
            )
        self._file = KeyFile(path)
        super().__init__(self._file, account=account, region=region)
