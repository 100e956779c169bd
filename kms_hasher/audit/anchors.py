"""
What ties a seal to KMS, where whoever owns the database cannot reach: one Encrypt whose
encryption context stands in CloudTrail, and a MAC by an HMAC key that never leaves KMS, of the
seal and of the ciphertext that Encrypt gave.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from hashlib import sha256

from kms_hasher import conf, encoding, keyring
from kms_hasher.audit import canonical
from kms_hasher.encoding import ARN
from kms_hasher.exceptions import (
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KeyUnusable,
    KMSAccessDenied,
    KMSBadResponse,
    MalformedHash,
)
from kms_hasher.models import AuditSeal

NO_MAC = "it has no MAC, though AUDIT_SEAL_KEY names a key"
NO_ANCHOR = "it has no anchor that could be checked"
WRONG_FORM = "its anchors are not of the form in which they are made"
WRONG_MAC = "KMS does not give its MAC for what it says"
OTHER_KEY = (
    "its MAC names the key {key}, and AUDIT_SEAL_KEY leads to another; a former key belongs "
    "into PREVIOUS_KEYS"
)
WRONG_CONTEXT = "KMS did not encrypt it under the context of what it says"
STRANGE_KEY = (
    "its ciphertext names the key {key}, which cannot be used and to which neither KEY nor "
    "AUDIT_CONTEXT_KEY leads; a former key belongs into PREVIOUS_KEYS"
)

#: Bytes of a ciphertext that KMS takes.
MAX_CIPHERTEXT = 6144

_FORMS = ({"context_key", "ciphertext"}, {"context_key", "ciphertext", "mac_key", "mac"})

# What else an HMAC key may be asked for never begins like this.
_MESSAGE = b"kms_hasher audit anchor 1\0"


def of_seal(seal: AuditSeal) -> dict[str, str]:
    """Return new anchors of a seal, by one or two calls to KMS. Raises `KMSError`."""
    return _make(canonical.seal_digest(seal), _seal_context(seal))


def of_pruning(seal: AuditSeal) -> dict[str, str]:
    """Return new anchors of the statement that all up to the seal was pruned."""
    return _make(canonical.pruning_digest(seal), _pruning_context(seal))


def check_seal(seal: AuditSeal, **options: bool) -> str:
    """
    Return what is wrong with the anchors of a seal, or "".

    With `strict` (the default) there must be a MAC if there is a key for it, by that key or one
    of `PREVIOUS_KEYS`; without, any key in the same account will do, which suffices for a seal
    that a checked one follows. Without `both`, a good MAC suffices, which is of the ciphertext
    as well. Raises `KMSError` if KMS cannot tell.
    """
    digest, context = canonical.seal_digest(seal), _seal_context(seal)
    return _check(digest, context, seal.anchors, **options)


def check_pruning(seal: AuditSeal) -> str:
    """Return what is wrong with the anchors of a pruning, or ""; raises as `check_seal`."""
    digest, context = canonical.pruning_digest(seal), _pruning_context(seal)
    return _check(digest, context, seal.pruning_anchors)


def _seal_context(seal: AuditSeal) -> dict[str, str]:
    return _context(
        "audit-seal",
        sequence=str(seal.sequence),
        count=str(seal.count),
        root=seal.root,
        seal=canonical.seal_digest(seal).hex(),
    )


def _pruning_context(seal: AuditSeal) -> dict[str, str]:
    digest = canonical.seal_digest(seal).hex()
    return _context("audit-pruning", sequence=str(seal.sequence), seal=digest)


def _context(use: str, **values: str) -> dict[str, str]:
    context = {"application": "kms_hasher", "use": use, **values}
    if deployment := conf.get().deployment:
        context["deployment"] = deployment
    return context


def _make(digest: bytes, context: Mapping[str, str]) -> dict[str, str]:
    settings, kms = conf.get(), keyring.kms("seal")
    sealed = kms.encrypt(settings.audit_context_key or settings.key, digest, context)
    ciphertext = base64.b64encode(sealed.ciphertext).decode()
    found = {"context_key": _ref(sealed.key_arn), "ciphertext": ciphertext}
    if settings.audit_seal_key:
        made = kms.generate_mac(settings.audit_seal_key, _message(digest, found))
        found.update(mac_key=_ref(made.key_arn), mac=made.mac.hex())
    return found


def _message(digest: bytes, found: Mapping[str, str]) -> bytes:
    """Return what the MAC is made of: the other anchor too, which a sealer does not check."""
    sealed = canonical.frame(digest, found["context_key"], found["ciphertext"])
    return _MESSAGE + sha256(sealed).digest()


def _check(
    digest: bytes,
    context: Mapping[str, str],
    anchors: object,
    *,
    strict: bool = True,
    both: bool = True,
) -> str:
    found: Mapping[str, str] = anchors if isinstance(anchors, Mapping) else {}
    has_key = bool(conf.get().audit_seal_key)
    if not found:
        return NO_MAC if has_key and strict else NO_ANCHOR
    # The next seal would vouch for whatever was added or taken away.
    if found.keys() not in _FORMS or not all(isinstance(each, str) for each in found.values()):
        return WRONG_FORM
    if has_key and "mac" in found:
        problem = _check_mac(digest, found, strict)
        if problem or not both:
            return problem
        strict = False  # the key that it names is vouched for, and may be gone since
    elif has_key and strict:
        return NO_MAC
    return _check_ciphertext(digest, context, found, strict)


def _check_mac(digest: bytes, found: Mapping[str, str], strict: bool) -> str:
    settings = conf.get()
    name = settings.audit_seal_key
    try:
        key_id = encoding.key_id(found["mac_key"])
        message = _message(digest, found)
    except ValueError:
        return WRONG_MAC
    if not strict:
        name = _named(name, key_id)
    for arn in settings.previous_keys:
        if arn.endswith(f":key/{key_id}"):
            name = arn
    try:
        made = keyring.kms("verify").generate_mac(name, message)
    except InvalidRequest:  # it names a key that makes no MACs
        if name == settings.audit_seal_key:
            raise
        return WRONG_MAC
    if _ref(made.key_arn) != found["mac_key"]:
        return OTHER_KEY.format(key=key_id)
    # As text: bytes can be written in several ways.
    return "" if _same(made.mac.hex(), found["mac"]) else WRONG_MAC


def _check_ciphertext(
    digest: bytes, context: Mapping[str, str], found: Mapping[str, str], strict: bool
) -> str:
    settings = conf.get()
    try:
        key_id = encoding.key_id(found["context_key"])
        ciphertext = base64.b64decode(found["ciphertext"], validate=True)
    except ValueError:
        return WRONG_CONTEXT
    if not 0 < len(ciphertext) <= MAX_CIPHERTEXT or not _same(
        base64.b64encode(ciphertext).decode(), found["ciphertext"]
    ):
        return WRONG_CONTEXT
    key = _named(settings.audit_context_key or settings.key, key_id)
    try:
        opened = keyring.kms("verify").decrypt(key, ciphertext, context)
    except KeyNotFound:
        if not strict:  # it may have been deleted since
            raise
        return WRONG_CONTEXT
    except (KeyUnusable, KMSAccessDenied):
        if not strict or _is_led_to(key_id):
            raise
        return STRANGE_KEY.format(key=key_id)
    except (InvalidCiphertext, InvalidRequest):  # it, or the key, was put in another's place
        return WRONG_CONTEXT
    return "" if hmac.compare_digest(opened.plaintext, digest) else WRONG_CONTEXT


def _is_led_to(key_id: str) -> bool:
    """
    Return whether the settings lead to a key, of an alias as KMS says where it points to.

    The key history does not count: whoever can name a key in a seal can write there, too.
    """
    settings = conf.get()
    if any(arn.endswith(f":key/{key_id}") for arn in settings.previous_keys):
        return True
    for name in filter(None, (settings.key, settings.audit_context_key)):
        is_alias = "alias/" in name
        arn = keyring.kms("verify").describe_key(name).key_arn if is_alias else name
        if arn.rpartition(":key/")[2] == key_id:
            return True
    return False


def _same(one: str, other: str) -> bool:
    one_, other_ = (each.encode(errors="surrogatepass") for each in (one, other))
    return hmac.compare_digest(one_, other_)


def _named(setting: str, key_id: str) -> str:
    """Return how to ask for a key id: account and Region are the settings', as for hashes."""
    if setting == conf.get().key:
        return conf.get().key_for(key_id)
    return ARN.parse(setting).with_key(key_id) if setting.startswith("arn:") else key_id


def _ref(arn: str) -> str:
    try:
        return encoding.key_ref(arn)
    except MalformedHash:
        raise KMSBadResponse("the answer names no key") from None
