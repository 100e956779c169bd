"""
What a user model needs so that sealed passwords fit and re-wrapping logs nobody out.

A custom user model takes `KMSUserMixin`. On the stock `auth.User` the same is done from
outside: `widen` and our migration for the column, `adapt` for the methods.

Django hangs sessions and password reset links on the whole password column. Here they hang
on `encoding.stable_part` of it, which is drawn anew with every password and which sealing,
re-wrapping and moving to another key leave alone.
"""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.hashers import (
    acheck_password,
    check_password,
    get_hasher,
    make_password,
)
from django.contrib.auth.tokens import PasswordResetTokenGenerator
from django.core.exceptions import FieldDoesNotExist
from django.core.validators import MaxLengthValidator
from django.db import Error, connections, models, router
from django.utils.crypto import salted_hmac
from django.utils.translation import gettext_lazy as _
from django.views.decorators.debug import sensitive_variables

from kms_hasher import conf, encoding, modes
from kms_hasher.columns import Column, savepoint
from kms_hasher.exceptions import ConfigurationError, InvalidCiphertext, KMSHasherError

logger = logging.getLogger("kms_hasher")

TOO_NARROW = (
    "A password stays as it is at a login: %s holds %d characters, and its new hash has %d. "
    "Migrate, or run widen_password_column."
)

#: Keys the HMAC that sessions hold; another than Django's, so that the two never meet.
SESSION_KEY_SALT = "kms_hasher.users.KMSUserMixin.get_session_auth_hash"

_django_make_hash_value = PasswordResetTokenGenerator._make_hash_value


class KMSUserMixin(models.Model):
    """
    The password field and the session hashes of a user model with sealed passwords.

    It stands first: `class User(KMSUserMixin, AbstractUser)`, or before
    `AbstractBaseUser`. The field is that of `AbstractBaseUser`, but wide enough; the
    project's own `makemigrations` widens the column.
    """

    password = models.CharField(_("password"), max_length=encoding.MAX_LENGTH)
    # Keeps its place among the columns of the table and the fields of forms.
    password.creation_counter = AbstractBaseUser._meta.get_field("password").creation_counter

    class Meta:
        abstract = True

    @sensitive_variables("raw_password")
    def check_password(self, raw_password: str | None) -> bool:
        """
        Return whether the password is right, and bring its hash up to date if it is.

        As Django's, but an upgrade that cannot be sealed fails no login, and one that comes
        late overwrites no password that was changed meanwhile. Raises `KMSError` if the
        hash is sealed and KMS cannot tell.
        """
        setter = functools.partial(upgrade, self)
        matches = check_password(raw_password, self.password, setter)
        if matches and may_move(self) and raw_password is not None:
            move(self, raw_password)
        return matches

    @sensitive_variables("raw_password")
    async def acheck_password(self, raw_password: str | None) -> bool:
        """See `check_password`."""

        @sensitive_variables("raw_password")
        async def setter(raw_password: str) -> None:
            await sync_to_async(upgrade)(self, raw_password)

        matches = await acheck_password(raw_password, self.password, setter)
        if matches and may_move(self) and raw_password is not None:
            await sync_to_async(move)(self, raw_password)
        return matches

    def _get_session_auth_hash(self, secret: str | bytes | None = None) -> str:
        return salted_hmac(
            SESSION_KEY_SALT,
            encoding.stable_part(self.password),
            secret=secret,
            algorithm="sha256",
        ).hexdigest()

    def get_session_auth_fallback_hash(self) -> Iterator[str]:
        """
        Yield the hashes of older sessions, which Django accepts and upgrades.

        First under each of `SECRET_KEY_FALLBACKS`, then as Django itself makes them: the
        sessions that were opened before this app was installed.
        """
        for fallback in settings.SECRET_KEY_FALLBACKS:
            yield self._get_session_auth_hash(secret=fallback)
        for secret in (None, *settings.SECRET_KEY_FALLBACKS):
            yield _django_session_hash(self, secret=secret)


# A model without a Meta of its own takes that of its first base which has one: that shall
# be AbstractUser's, with its names, as it is without the mixin.
del KMSUserMixin.Meta

_django_session_hash: Callable[..., str] = AbstractBaseUser._get_session_auth_hash  # type: ignore[attr-defined]


@sensitive_variables("raw_password")
def upgrade(user: Any, raw_password: str) -> None:
    """
    Hash a password that has just been found right anew, and store it.

    Where KMS cannot seal it, or the password has been changed since it was read, nothing
    is done: the login has succeeded already.
    """
    old = user.password
    try:
        new = make_password(raw_password)
        _prove(new)
    except KMSHasherError as error:
        logger.error("The hash of a password could not be brought up to date: %s", error)
        return
    _swap(user, old, new)


def may_move(user: Any) -> bool:
    """Return whether `move` may have something to do, by the stored string alone."""
    if not str(user.password).startswith(encoding.PREFIX):
        return False
    try:
        mode = modes.by_name(conf.get().mode)
        return encoding.parse(user.password).mode != mode.code or mode.core == "mac"
    except KMSHasherError:
        return False


@sensitive_variables()
def move(user: Any, raw_password: str) -> None:
    """
    Bring a password that has just been found right into the present mode, or under the present
    key of a MAC: for what no run can move without the password.

    The salt stays, so sessions stay. Whatever goes wrong is logged, and the password stays as
    it was. Does nothing without REWRAP_ON_LOGIN, or where sessions hang on the whole column.
    """
    from kms_hasher import history, keyring  # takes the database, and AWS's library
    from kms_hasher.models import Key

    old, settings = user.password, conf.get()
    try:
        stored, target = encoding.parse(old), modes.by_name(settings.mode)
        if not settings.rewrap_on_login or not _keeps_sessions(user):
            return
        if stored.mode == target.code:
            alias = settings.mac_alias if settings.mode == "mac_in_direct" else settings.alias
            with savepoint(router.db_for_read(Key)):
                period = history.current_period(alias) if alias else None
            if period is None or period.key.ref == stored.key_ref.rpartition(".")[2]:
                return
        hasher: Any = get_hasher(stored.header.algorithm)
        digest = hasher._digest(raw_password, stored.header)
        new = str(keyring.seal(stored.header, digest, purpose="login"))
        _prove(new)
        _swap(user, old, new)
    except (KMSHasherError, Error) as error:
        text = str(error) if isinstance(error, KMSHasherError) else type(error).__name__
        logger.warning("A password could not be moved at a login: %s", text)


#: Pairs of KEY and PUBLIC_KEY that this process has found to belong together.
_proven: set[tuple[str, str]] = set()


def _prove(new: str) -> None:
    """
    Open what was sealed with PUBLIC_KEY, the first time: one that is not KEY's public half
    must not take the place of a hash that can be checked. Raises `KMSHasherError`.
    """
    from kms_hasher import keyring
    from kms_hasher.modes import public_key

    settings = conf.get()
    pair = settings.key, settings.public_key
    if settings.mode != "public_key" or not settings.public_key or pair in _proven:
        return
    if not new.startswith(encoding.PREFIX):
        return
    try:
        keyring.open(encoding.parse(new), purpose="login")
    except InvalidCiphertext:
        raise ConfigurationError(public_key.OTHER_HALF.format(key=settings.key)) from None
    _proven.add(pair)


def _keeps_sessions(user: Any) -> bool:
    """Return whether the user's sessions hang on what moving leaves alone."""
    own = getattr(type(user), "_get_session_auth_hash", None)
    return own is KMSUserMixin._get_session_auth_hash


def _swap(user: Any, old: str, new: str) -> None:
    """
    Store a new hash of the same password, unless it has been changed since it was read, or the
    column is too narrow: a MariaDB that is not strict would cut it.
    """
    if user.pk is not None:
        model = type(user)
        database = router.db_for_write(model, instance=user)
        column = Column(model, user._meta.get_field("password"), database)
        with savepoint(database):
            if len(new) > len(old) and not _fits(column, new):
                return
            if not column.swap(user.pk, old, new):
                return
    user.password = new


#: Widths that this process has found to be enough; columns may be widened at any time.
_widths: dict[Column, int | None] = {}


def _fits(column: Column, new: str) -> bool:
    """Return whether the column holds a hash, and log it if not."""
    width = _widths.get(column, 0)
    if width is not None and width < len(new):
        width = _widths[column] = column_width(column)
    if width is None or width >= len(new):
        return True
    logger.error(TOO_NARROW, column, width, len(new))
    return False


def _make_hash_value(
    self: PasswordResetTokenGenerator, user: AbstractBaseUser, timestamp: int
) -> str:
    """Django's method of this name, with the stable part in the place of the password."""
    login_timestamp = (
        "" if user.last_login is None else user.last_login.replace(microsecond=0, tzinfo=None)
    )
    email = getattr(user, user.get_email_field_name(), "") or ""
    stable = encoding.stable_part(user.password)
    return f"{user.pk}{stable}{login_timestamp}{timestamp}{email}"


# --- the stock user model -----------------------------------------------------------


def is_stock() -> bool:
    """Return whether Django's own user model is the site's."""
    return settings.AUTH_USER_MODEL == "auth.User"


def needs_widening() -> bool:
    """
    Return whether sealed values do not fit the 128 characters of the stock column.

    It is read by itself: a mistake in another setting must not change the tables.
    """
    raw = getattr(settings, "KMS_HASHER", {})
    mode = modes.MODES.get(str(raw.get("MODE"))) if isinstance(raw, Mapping) else None
    return mode is None or not mode.fits_stock


def widen(model: type[models.Model]) -> None:
    """Let the password field of a model take any sealed value, if it is too short for that."""
    field: Any = model._meta.get_field("password")
    if field.max_length is not None and field.max_length < encoding.MAX_LENGTH:
        field.max_length = encoding.MAX_LENGTH
        # A new list: the old one is shared with the abstract model's field.
        field.validators = [
            MaxLengthValidator(encoding.MAX_LENGTH) if type(old) is MaxLengthValidator else old
            for old in field.validators
        ]


def sessions_are_kept() -> bool:
    """
    Return the setting STABLE_SESSIONS.

    It is read by itself: a mistake in another setting must end no session.
    """
    raw = getattr(settings, "KMS_HASHER", {})
    return not isinstance(raw, Mapping) or raw.get("STABLE_SESSIONS") is not False


def adapt() -> None:
    """
    Give the stock user the methods of `KMSUserMixin`, and reset links their like.

    Reset links are adapted for every user model, unless a site has a token generator with
    a `_make_hash_value` of its own. Without STABLE_SESSIONS, only `check_password` is.
    """
    stock = is_stock() and apps.is_installed("django.contrib.auth")
    user: Any = apps.get_model("auth.User") if stock else None
    if stock:
        user.check_password = KMSUserMixin.check_password
        user.acheck_password = KMSUserMixin.acheck_password
    if not sessions_are_kept():
        return
    if stock:
        user._get_session_auth_hash = KMSUserMixin._get_session_auth_hash
        user.get_session_auth_fallback_hash = KMSUserMixin.get_session_auth_fallback_hash
    generator: Any = PasswordResetTokenGenerator
    generator._make_hash_value = _make_hash_value


def changed_in_django() -> list[str]:
    """
    Return the names of those methods of Django that do not do what is replaced here.

    They are run, not read: what counts is that each still gives the same value, from the
    same arguments, as in the Django releases this module was written for.
    """
    base: Any = AbstractBaseUser
    user: Any = SimpleNamespace(
        pk=7,
        password="argon2$...",  # noqa: S106  # nobody's
        email="user@example.org",
        last_login=datetime.datetime(2001, 2, 3, 4, 5, 6, 7, tzinfo=datetime.timezone.utc),
        get_email_field_name=lambda: "email",
        _get_session_auth_hash=lambda secret=None: ("hash", secret),
    )
    hashed: list[Any] = []

    class Generator(PasswordResetTokenGenerator):
        def _make_hash_value(self, user: Any, timestamp: int) -> str:
            hashed.append(user)
            return ""

    expected: dict[str, Callable[[], bool]] = {
        "AbstractBaseUser.get_session_auth_hash": lambda: (
            base.get_session_auth_hash(user) == ("hash", None)
        ),
        "AbstractBaseUser._get_session_auth_hash": lambda: all(
            base._get_session_auth_hash(user, secret=secret)
            == salted_hmac(
                "django.contrib.auth.models.AbstractBaseUser.get_session_auth_hash",
                user.password,
                secret=secret,
                algorithm="sha256",
            ).hexdigest()
            for secret in (None, "secret")
        ),
        "AbstractBaseUser.get_session_auth_fallback_hash": lambda: (
            list(base.get_session_auth_fallback_hash(user))
            == [("hash", secret) for secret in settings.SECRET_KEY_FALLBACKS]
        ),
        "PasswordResetTokenGenerator._make_hash_value": lambda: (
            _django_make_hash_value(Generator(), user, 5)
            == "7argon2$...2001-02-03 04:05:065user@example.org"
        ),
        "PasswordResetTokenGenerator.make_token": lambda: (
            bool(Generator().make_token(user)) and hashed == [user]
        ),
    }
    return [name for name, holds in expected.items() if not _without_error(holds)]


def _without_error(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except Exception:  # noqa: BLE001  # whatever a changed method raises, it has changed
        return False


# --- the real column ----------------------------------------------------------------


def column_width(column: Column) -> int | None:
    """
    Return how many characters the database has declared the column to hold.

    None stands for no limit, or one far beyond any hash, as of text types. SQLite does not
    enforce the number. Raises `FieldDoesNotExist` if the table has no such column (yet),
    and `DatabaseError` if there is no table.
    """
    connection = connections[column.database]
    with connection.cursor() as cursor:
        for info in connection.introspection.get_table_description(
            cursor, column.model._meta.db_table
        ):
            if info.name == column.field.column:
                width = info.display_size
                return width if width and 0 < width < 2**16 - 1 else None
    raise FieldDoesNotExist(f"{column} has no column in the database")
