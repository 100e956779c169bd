"""What happens after a login: a password under an old key comes under the present one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from django.contrib.auth.signals import user_logged_in
from django.db import Error, connections, router, transaction

from kms_hasher import conf, encoding
from kms_hasher.columns import Column
from kms_hasher.exceptions import KMSHasherError, MalformedHash
from kms_hasher.models import AliasPeriod

logger = logging.getLogger("kms_hasher")


def connect() -> None:
    """Begin to listen. Called once, when Django is ready; harmless if called again."""
    user_logged_in.connect(rewrap, dispatch_uid="kms_hasher.rewrap")


def rewrap(sender: Any, user: Any, **kwargs: Any) -> None:
    """
    Bring the user's password under the key the alias points to, as far as was seen.

    The salt stays, so other sessions stay. Whatever goes wrong, the login has succeeded: it
    is logged, and the password stays as it was. Costs one query, and one ReEncrypt where
    the key is another. Does nothing where sessions hang on the whole column.
    """
    from kms_hasher import history, keyring, modes  # at the first login, not at the start

    try:
        settings = conf.get()
        old = getattr(user, "password", None) or ""
        if not settings.rewrap_on_login or not old.startswith(encoding.PREFIX):
            return
        stored = encoding.parse(old)
        if not settings.alias or not modes.rewraps(
            stored.mode, modes.by_name(settings.mode).spec
        ):
            return
        with _savepoint(router.db_for_read(AliasPeriod)):
            period = history.current_period(settings.alias)
        present, *of_mac = stored.key_ref.split(".")
        if period is None or period.key.ref == present:
            return
        if not _keeps_sessions(user, stored, ".".join([period.key.ref, *of_mac])):
            return
        new = str(keyring.rewrap(stored, settings.key, purpose="login")[0])
        model = type(user)
        database = router.db_for_write(model, instance=user)
        column = Column(model, model._meta.get_field("password"), database)
        with _savepoint(database):
            swapped = column.swap(user.pk, old, new)
        if swapped:
            user.password = new
    except MalformedHash:
        return
    except (KMSHasherError, Error) as error:
        text = str(error) if isinstance(error, KMSHasherError) else type(error).__name__
        logger.warning("A password could not be re-wrapped after a login: %s", text)


def _keeps_sessions(user: Any, stored: encoding.SealedHash, ref: str) -> bool:
    """Return whether another key leaves alone what the session just opened hangs on."""
    other = copy.copy(user)
    other.password = str(dataclasses.replace(stored, key_ref=ref))
    return bool(other.get_session_auth_hash() == user.get_session_auth_hash())


@contextlib.contextmanager
def _savepoint(database: str) -> Iterator[None]:
    """Keep a statement that fails from spoiling the transaction that the login may be in."""
    if connections[database].in_atomic_block:
        with transaction.atomic(using=database):
            yield
    else:
        yield
