"""
What a mode's calls to KMS are, and whether they are allowed: tried by DryRun where KMS has it
for the call, else made and dropped. Nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kms_hasher import conf, encoding, keyring, modes
from kms_hasher.encoding import SealedHash
from kms_hasher.exceptions import DryRunOperation, KMSAccessDenied, KMSError, MalformedHash
from kms_hasher.modes.base import Access
from kms_hasher.modes.public_key import load_der
from kms_hasher.providers.base import RSAES_OAEP_SHA_256
from kms_hasher.rotation.plan import Plan

ALLOWED, DENIED, NOT_CHECKED = "allowed", "denied", "not checked"
NOT_TOLD = "cannot be told"

CONTEXT = {"application": "kms_hasher", "use": "status"}
PROBE = 32

_RSA = {"source_algorithm": RSAES_OAEP_SHA_256, "algorithm": RSAES_OAEP_SHA_256}


class Trial:
    """
    The calls that a site makes in the mode of the settings, one after the other.

    `arn` is of the key that KEY leads to. `answers` holds, by operation, what came of each;
    `errors` what KMS said where that tells nothing.
    """

    def __init__(self, arn: str, purpose: str = "status") -> None:
        self.answers: dict[str, str] = {}
        self.errors: dict[str, KMSError] = {}
        self._arn, self._kms, self._settings = arn, keyring.kms(purpose), conf.get()
        self._context = dict(CONTEXT)
        if self._settings.deployment:
            self._context["deployment"] = self._settings.deployment

    def run(self) -> Trial:
        """Try them all. Raises nothing that KMS answers."""
        mode = self._settings.mode
        if mode == "public_key":
            self._public_key()
        if mode == "envelope":
            self._data_key()
        if mode == "mac":
            self._mac(self._settings.key)
        if mode == "mac_in_direct":
            self._mac(self._settings.mac_key)
        if mode in ("direct", "mac_in_direct"):
            self._encrypt()
        return self

    def _encrypt(self) -> None:
        key, probe = self._settings.key, os.urandom(PROBE)
        self._attempt(
            "Encrypt", lambda: self._kms.encrypt(key, probe, self._context, dry_run=True)
        )
        made = None
        if self.answers["Encrypt"] == ALLOWED:
            made = self._attempt(
                "Encrypt", lambda: self._kms.encrypt(key, probe, self._context)
            )
        self._open(made and made.ciphertext)

    def _data_key(self) -> None:
        key = self._settings.key
        made = self._attempt(
            "GenerateDataKey", lambda: self._kms.generate_data_key(key, self._context, PROBE)
        )
        self._open(made and made.ciphertext)

    def _open(self, blob: bytes | None) -> None:
        kms, arn = self._kms, self._arn
        if not blob:
            self.answers.update(Decrypt=NOT_CHECKED, ReEncrypt=NOT_CHECKED)
            return
        self._attempt("Decrypt", lambda: kms.decrypt(arn, blob, self._context, dry_run=True))
        self._attempt(
            "ReEncrypt",
            lambda: kms.re_encrypt(arn, blob, self._context, arn, self._context, dry_run=True),
        )

    def _mac(self, key: str) -> None:
        self._attempt("GenerateMac", lambda: self._kms.generate_mac(key, os.urandom(PROBE)))

    def _public_key(self) -> None:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        kms, arn = self._kms, self._arn
        half = self._attempt("GetPublicKey", lambda: kms.get_public_key(self._settings.key))
        if half is None:
            self.answers.update(Decrypt=NOT_CHECKED, ReEncrypt=NOT_CHECKED)
            return
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        blob = load_der(half.der).encrypt(os.urandom(PROBE), oaep)
        self._attempt(
            "Decrypt",
            lambda: kms.decrypt(arn, blob, {}, algorithm=RSAES_OAEP_SHA_256, dry_run=True),
        )
        self._attempt(
            "ReEncrypt", lambda: kms.re_encrypt(arn, blob, {}, arn, {}, **_RSA, dry_run=True)
        )

    def _attempt(self, operation: str, call: Callable[[], Any]) -> Any:
        """Note what comes of a call; return what it gives, if anything."""
        self.answers[operation] = NOT_CHECKED
        try:
            given = call()  # moto and others ignore DryRun: it is allowed, and done
        except DryRunOperation:
            given = None
        except KMSAccessDenied:
            self.answers[operation] = DENIED
            return None
        except KMSError as error:
            self.errors[operation] = error
            return None
        self.answers[operation] = ALLOWED
        return given


def try_rows(planned: Plan) -> dict[str, str]:
    """
    Return, by the ref of each key that rows are to leave, whether what a run does to them is
    allowed: ReEncrypt, or Decrypt where they are opened.

    A stored row of each is tried towards the target, or where that is not made yet towards
    the present key, whose policy it will have. Raises nothing that KMS answers.
    """
    target = planned.target or planned.present
    found: dict[str, str] = {}
    for column, rows in planned.rows_by_column().items():
        for ref in rows:
            if not ref or ref in found or target is None:
                continue
            name = column.field.attname
            sealed = {f"{name}__startswith": encoding.PREFIX, f"{name}__contains": ref}
            for (value,) in column.rows.filter(**sealed).values_list(name)[:1]:
                found[ref] = _try(value, target.key_arn if planned.rewraps else "")
    return found


def _try(value: str, target: str) -> str:
    try:
        if not _call(encoding.parse(value), target):
            return NOT_CHECKED
    except DryRunOperation:
        return ALLOWED
    except KMSAccessDenied:
        return DENIED
    except (KMSError, MalformedHash) as error:
        return f"{NOT_TOLD}: {error}"
    return ALLOWED  # a service that ignores DryRun has done it; the answer is dropped


def _call(stored: SealedHash, target: str) -> bool:
    """Make the call by DryRun; return False where none is needed to open the row."""
    mode = modes.by_code(stored.mode)
    access = Access(
        stored.header, conf.get(), lambda sub, _: _DryRun(keyring.kms("rotate", sub))
    )
    if target:
        mode.rewrap(access, stored, target)
        return True
    opener = mode.opener(access, stored)
    opener.call()
    return bool(opener.key)


class _DryRun:
    """A provider whose every call is a DryRun."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._provider, name)
        return lambda *args, **kwargs: method(*args, **kwargs, dry_run=True)
