"""Keys that an operator puts into the environment, for a site that has no KMS."""

import base64
import functools
import json
import os
import uuid
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from django.views.decorators.debug import sensitive_variables

from kms_hasher.exceptions import (
    ConfigurationError,
    DryRunOperation,
    IncorrectKey,
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KMSError,
)
from kms_hasher.providers.base import (
    OPERATIONS,
    SYMMETRIC_DEFAULT,
    Decrypted,
    Encrypted,
    Key,
    ReEncrypted,
)

HOME = "arn:aws:kms:settings-1:000000000000:key/"


def call(method):
    """Make a method one call: with a request id, and errors that say what was asked."""

    @functools.wraps(method)
    @sensitive_variables()  # no error report shows what is in the frames below
    def wrapped(self, *args, **kwargs):
        request_ids = (str(uuid.uuid4()),)
        try:
            return replace(method(self, *args, **kwargs), request_ids=request_ids)
        except KMSError as error:
            error.operation = OPERATIONS[method.__name__]
            error.key = args[0] if args else kwargs.get("key", "")
            error.request_ids = request_ids
            raise

    return wrapped


class SettingsProvider:
    """`keys` maps key ids, which are UUIDs in lower case, to AES keys in base64."""

    def __init__(self, *, keys):
        try:
            self._ciphers = {id_: AESGCM(base64.b64decode(key)) for id_, key in keys.items()}
            self._headers = {id_: uuid.UUID(id_).bytes for id_ in keys}
        except (ValueError, AttributeError):
            raise ConfigurationError("'keys' must map UUIDs to AES keys in base64.") from None

    @call
    def encrypt(self, key, plaintext, context, *, algorithm=SYMMETRIC_DEFAULT, dry_run=False):
        key_id = self._find(key, algorithm, dry_run)
        return Encrypted(
            key_arn=HOME + key_id, ciphertext=self._seal(key_id, plaintext, context)
        )

    @call
    def decrypt(self, key, ciphertext, context, *, algorithm=SYMMETRIC_DEFAULT, dry_run=False):
        key_id = self._find(key, algorithm, dry_run)
        return Decrypted(
            key_arn=HOME + key_id, plaintext=self._open(key_id, ciphertext, context)
        )

    @call
    def re_encrypt(
        self,
        source_key,
        ciphertext,
        source_context,
        key,
        context,
        *,
        source_algorithm=SYMMETRIC_DEFAULT,
        algorithm=SYMMETRIC_DEFAULT,
        dry_run=False,
    ):
        source = self._find(source_key, source_algorithm)
        target = self._find(key, algorithm, dry_run)
        plaintext = self._open(source, ciphertext, source_context)
        return ReEncrypted(
            key_arn=HOME + target,
            source_key_arn=HOME + source,
            ciphertext=self._seal(target, plaintext, context),
        )

    @call
    def describe_key(self, key):
        return Key(
            key_arn=HOME + self._find(key),
            spec=SYMMETRIC_DEFAULT,
            usage="ENCRYPT_DECRYPT",
            state="Enabled",
        )

    def close(self):
        """Nothing is held open."""

    def __getattr__(self, name):
        if name not in OPERATIONS:
            raise AttributeError(name)

        def refuse(key="", *args, **kwargs):
            raise InvalidRequest(
                "Keys are managed in the settings.",
                code="UnsupportedOperationException",
                operation=OPERATIONS[name],
                key=key,
            )

        return refuse

    def _find(self, name, algorithm=SYMMETRIC_DEFAULT, dry_run=False):
        key_id = name.removeprefix(HOME)
        if key_id not in self._ciphers:
            raise KeyNotFound(code="NotFoundException")
        if algorithm != SYMMETRIC_DEFAULT:
            raise InvalidRequest("There are no RSA keys.", code="InvalidKeyUsageException")
        if dry_run:
            raise DryRunOperation(code="DryRunOperationException")
        return key_id

    def _seal(self, key_id, plaintext, context):
        if not 1 <= len(plaintext) <= 4096:
            raise InvalidRequest("1 to 4096 bytes can be sealed.", code="ValidationException")
        header, nonce = self._headers[key_id], os.urandom(12)
        sealed = self._ciphers[key_id].encrypt(nonce, plaintext, header + _aad(context))
        return header + nonce + sealed

    def _open(self, key_id, blob, context):
        header, nonce, sealed = blob[:16], blob[16:28], blob[28:]
        if header != self._headers[key_id]:
            raise IncorrectKey if header in self._headers.values() else InvalidCiphertext
        try:
            return self._ciphers[key_id].decrypt(nonce, sealed, header + _aad(context))
        except (InvalidTag, ValueError):
            raise InvalidCiphertext from None


def _aad(context):
    """One byte string for each context, whatever its order and its characters."""
    return json.dumps(sorted(context.items())).encode()
