"""
System checks: what would make logins fail or leave passwords unsealed, said in time.

    E001  KMS_HASHER cannot be used as it is
    E002  the provider cannot be made from OPTIONS, or its key file cannot be read
    E003  PASSWORD_FIELDS names what is not a password column
    E004  KMS_HASHER["DATABASES"] names what is not in DATABASES
    E005  there is no user model with a password field
    E006  a password field is too short
    E007  a password column in the database is too short (--database)
    E008  stored passwords need a hasher that PASSWORD_HASHERS lacks (--database)
    E009  PASSWORD_HASHERS cannot be loaded
    E010  what the first hasher makes does not fit the 128 characters that its mode promises
    E011  PUBLIC_KEY is not an RSA public key
    I001  the mode cannot be left without passwords
    W001  new passwords are not sealed
    W002  sessions of the custom user model end when passwords are re-wrapped
    W003  Django has changed what this package replaces
    W004  there is no AWS Region
    W005  the local provider is used, or one for tests (--deploy)
    W006  a password column is too short until a waiting migration is applied (--database)
    W007  Django's ModelBackend tells unknown users from known ones by what they cost
    W008  the audit cannot be sealed, as KEY is not symmetric

None of them calls KMS or imports AWS's library, and none raises for a setting, whatever
it holds. `manage.py check --tag kms_hasher --tag database --database default` runs them
and Django's own of databases.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.hashers import get_hashers
from django.core import checks
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured
from django.db import connections, models

from kms_hasher import columns, conf, encoding, lengths, users
from kms_hasher.columns import Column
from kms_hasher.exceptions import ConfigurationError, KeyNotFound, KMSError, MalformedHash

TAG = "kms_hasher"

LOCAL = ("local", "kms_hasher.providers.local.LocalProvider")

#: Where providers are that are for tests alone.
TESTING = "kms_hasher.testing."

#: So many stored passwords are looked at for the name of the hasher that is missing.
SAMPLE = 20


def register() -> None:
    """Make Django run the checks. Called once, when the apps are ready."""
    for check in (
        check_settings,
        check_user_model,
        check_hashers,
        check_django,
        check_backends,
    ):
        checks.register(check, TAG)
    # Without our tag: Django 6.1 would ask every database for a `--tag kms_hasher` alone.
    checks.register(check_database, checks.Tags.database)
    checks.register(check_deployment, TAG, checks.Tags.security, deploy=True)


# --- settings -----------------------------------------------------------------------


def check_settings(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    from kms_hasher import modes  # not before: most starts run no checks

    try:
        settings = conf.get()
        modes.by_name(settings.mode)
    except ConfigurationError as error:
        return [
            checks.Error(
                str(error),
                hint="Correct KMS_HASHER in the settings. Until then no password can be "
                "sealed, and sealed ones cannot be checked; all others can.",
                id="kms_hasher.E001",
            )
        ]
    return [
        *_provider(settings),
        *_names(settings),
        *_region(settings),
        *_public_key(settings),
        *_one_way(settings),
        *_sealing(settings),
    ]


def _public_key(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    if settings.mode != "public_key" or not settings.public_key:
        return
    from kms_hasher.modes import public_key

    try:
        public_key.load(settings.public_key)
    except ConfigurationError as error:
        yield checks.Error(
            str(error),
            hint="Write it by `aws kms get-public-key`, or take PUBLIC_KEY out: then KMS is "
            "asked for it.",
            id="kms_hasher.E011",
        )


def _one_way(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    from kms_hasher import modes

    if modes.by_name(settings.mode).core != "mac":
        return
    yield checks.Info(
        f"The mode {settings.mode!r} cannot be left without passwords: what is stored gives no "
        "digest back.",
        hint="Each user who signs in or sets a password moves to another mode; nobody else can "
        "be moved. Silence this once it is what you want.",
        id="kms_hasher.I001",
    )


def _sealing(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    from kms_hasher import modes
    from kms_hasher.modes.base import SYMMETRIC

    if not settings.audit_seal_key or settings.audit_context_key:
        return
    if modes.by_name(settings.mode).spec != SYMMETRIC:
        yield checks.Warning(
            f"The audit cannot be sealed: in the mode {settings.mode!r} KEY is not symmetric, "
            "and carries no encryption context.",
            hint="Let KMS_HASHER['AUDIT_CONTEXT_KEY'] name a symmetric key.",
            id="kms_hasher.W008",
        )


def _provider(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    from kms_hasher import providers

    try:
        provider = providers.create(settings)
        if settings.provider in LOCAL:
            provider.describe_key(settings.key)  # reads the key file and nothing else
    except KeyNotFound:
        pass  # not made yet
    except Exception as error:  # noqa: BLE001  # a provider of the site's own may raise any
        name = "" if isinstance(error, ConfigurationError) else f"{type(error).__name__}: "
        text = error.message if isinstance(error, KMSError) else str(error)
        yield checks.Error(
            f"The provider {settings.provider!r} cannot be used. {name}{text}",
            hint="Correct KMS_HASHER['PROVIDER'] or KMS_HASHER['OPTIONS'].",
            id="kms_hasher.E002",
        )


def _names(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    if unknown := sorted(set(settings.databases) - set(connections)):
        yield checks.Error(
            f"KMS_HASHER['DATABASES'] names {unknown}, which DATABASES does not have.",
            hint="Take them out, or add them to DATABASES.",
            id="kms_hasher.E004",
        )
    if _user_model() is not None:
        try:
            columns.fields()
        except ConfigurationError as error:
            yield checks.Error(
                str(error),
                hint="Correct or remove the entry; its passwords are neither counted nor "
                "re-wrapped, and their key may be thought unused.",
                id="kms_hasher.E003",
            )


def _region(settings: conf.Conf) -> Iterator[checks.CheckMessage]:
    """Warn only where it is certain: a profile in AWS's files is not looked into."""
    if settings.provider != "aws" or settings.home or settings.options.get("region"):
        return
    files = {
        "AWS_CONFIG_FILE": "~/.aws/config",
        "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    }
    paths = (Path(os.environ.get(name, path)) for name, path in files.items())
    if not os.environ.get("AWS_DEFAULT_REGION") and not any(map(_may_exist, paths)):
        yield checks.Warning(
            "There is no AWS Region in which to look for the key.",
            hint="Give KMS_HASHER['KEY'] as an ARN, or set KMS_HASHER['OPTIONS']['region'] "
            "or AWS_DEFAULT_REGION. AWS's library for Python does not read AWS_REGION.",
            id="kms_hasher.W004",
        )


def _needed_width() -> int:
    """Return the characters that values of the mode need; the most, if it is not known."""
    from kms_hasher import modes

    try:
        return modes.width(conf.get().mode)
    except ConfigurationError:  # E001
        return encoding.MAX_LENGTH


def _may_exist(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError):  # out of reach, or there is no home directory
        return False


def check_deployment(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    try:
        provider = conf.get().provider
    except ConfigurationError:
        return []
    if provider in LOCAL:
        text = "The local provider keeps the keys in a file beside what they protect."
    elif provider.startswith(TESTING):
        text = "The provider is for tests: it keeps the keys in memory, and loses them."
    else:
        return []
    return [
        checks.Warning(
            text,
            hint="Set KMS_HASHER['PROVIDER'] to \"aws\" where real passwords are stored.",
            id="kms_hasher.W005",
        )
    ]


# --- the user model and Django ------------------------------------------------------


def check_user_model(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    model = _user_model()
    if model is None:
        return [
            checks.Error(
                "There is no user model with a password field to seal.",
                hint="Add 'django.contrib.auth' to INSTALLED_APPS, or let AUTH_USER_MODEL "
                "name a model made of KMSUserMixin and AbstractBaseUser.",
                id="kms_hasher.E005",
            )
        ]
    return [*_short_fields(model), *_sessions(model)]


def _short_fields(model: type[models.Model]) -> Iterator[checks.CheckMessage]:
    try:
        fields = columns.fields()
    except ConfigurationError:  # E001 or E003
        fields = [model._meta.get_field("password")]  # type: ignore[list-item]
    needed = _needed_width()
    for field in fields:
        if field.max_length is None or field.max_length >= needed:
            continue
        if field.model is model and field.name == "password":
            hint = (
                f"Declare it `class {model.__name__}(KMSUserMixin, ...)`, with KMSUserMixin "
                "from kms_hasher.users in the first place; then run makemigrations and migrate."
            )
        else:
            hint = f"Set max_length={encoding.MAX_LENGTH}, then run makemigrations and migrate."
        yield checks.Error(
            f"{field.model._meta.label}.{field.name} holds {field.max_length} characters; "
            "a sealed password does not fit.",
            hint=hint,
            obj=field,
            id="kms_hasher.E006",
        )


def _sessions(model: type[models.Model]) -> Iterator[checks.CheckMessage]:
    # A method that is not Django's any more is the site's own, or ours.
    method = getattr(model, "_get_session_auth_hash", None)
    whole_column = method is AbstractBaseUser._get_session_auth_hash  # type: ignore[attr-defined]
    if whole_column and users.sessions_are_kept():
        yield checks.Warning(
            f"The sessions of {model._meta.label} hang on the whole password column: "
            "re-wrapping a password logs its user out everywhere.",
            hint=f"Declare it `class {model.__name__}(KMSUserMixin, ...)`, with KMSUserMixin "
            "from kms_hasher.users in the first place.",
            obj=model,
            id="kms_hasher.W002",
        )


def check_django(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    changed = users.changed_in_django() if users.sessions_are_kept() else []
    if not changed:
        return []
    return [
        checks.Warning(
            f"This Django, or another package, has changed {', '.join(changed)}, which "
            "kms_hasher replaces.",
            hint="Look for a kms_hasher release that supports this Django. Until then "
            "KMS_HASHER['STABLE_SESSIONS'] = False leaves Django as it is; then re-wrapping "
            "ends sessions and password reset links.",
            id="kms_hasher.W003",
        )
    ]


def check_hashers(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    try:
        names = [hasher.algorithm or "" for hasher in get_hashers()]
    except (ImportError, ImproperlyConfigured, AttributeError, TypeError) as error:
        return [
            checks.Error(
                f"PASSWORD_HASHERS cannot be loaded: {error}",
                hint="Correct the setting: each entry is the dotted path of a hasher's class.",
                id="kms_hasher.E009",
            )
        ]
    if names and names[0].startswith(encoding.PREFIX):
        return [*_length()]
    return [
        checks.Warning(
            "New passwords are not sealed: the first of PASSWORD_HASHERS is not a hasher of "
            "kms_hasher.",
            hint="When the migrations are applied everywhere, put "
            '"kms_hasher.hashers.KMSArgon2PasswordHasher" first.',
            id="kms_hasher.W001",
        )
    ]


def _length() -> Iterator[checks.CheckMessage]:
    """Compare what the first hasher will make with the width that the mode promises."""
    from kms_hasher import modes

    try:
        mode = modes.by_name(conf.get().mode)
        length = lengths.of(get_hashers()[0], mode)
    except (ConfigurationError, AttributeError, ValueError):
        return  # E001, a hasher of the site's own, or one without its library
    if not mode.fits_stock or length <= modes.STOCK_WIDTH:
        return
    yield checks.Error(
        f"Passwords sealed in the mode {conf.get().mode!r} with these costs have {length} "
        f"characters; the mode promises no more than {modes.STOCK_WIDTH}.",
        hint='Choose costs that are written shorter, or the mode "mac", which is shorter; or '
        "take a mode with a wide column.",
        id="kms_hasher.E010",
    )


def check_backends(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    stock = "django.contrib.auth.backends.ModelBackend"
    try:
        seals = str(get_hashers()[0].algorithm).startswith(encoding.PREFIX)
    except (ImportError, ImproperlyConfigured, AttributeError, TypeError, IndexError):
        return []  # E009
    if not seals or stock not in django_settings.AUTHENTICATION_BACKENDS:
        return []
    return [
        checks.Warning(
            "With Django's ModelBackend a login with an unknown name makes another call to "
            'KMS than one with a known name, or in the mode "public_key" none, and takes '
            "another time.",
            hint='Put "kms_hasher.backends.KMSModelBackend" in its place in '
            "AUTHENTICATION_BACKENDS.",
            id="kms_hasher.W007",
        )
    ]


# --- the database -------------------------------------------------------------------


def check_database(
    app_configs: Any, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[checks.CheckMessage]:
    try:
        listed = [hasher.algorithm or "" for hasher in get_hashers()]
        found = columns.columns(databases or ()) if _user_model() is not None else []
    except (ConfigurationError, ImportError, ImproperlyConfigured, AttributeError, TypeError):
        return []  # E001, E003, E009
    messages: list[checks.CheckMessage] = []
    for column in found:
        try:
            width = users.column_width(column)
        except FieldDoesNotExist:  # a migration will add it
            continue
        wanted = column.field.max_length
        if width is None or width >= _needed_width():
            wide = column.model is get_user_model() and users.is_stock()
            wanted = width if wide else wanted  # widened in Python whatever the mode
        if width is not None and (wanted is None or width < wanted):
            messages.append(_short_column(column, width))
        messages += _missing_hashers(column, listed)
    return messages


def _short_column(column: Column, width: int) -> checks.CheckMessage:
    text = f"The column of {column} holds {width} characters in the database"
    # An Error would stop the very `migrate` that is needed: Django checks before it.
    from django.db.migrations.executor import MigrationExecutor  # takes its time

    executor = MigrationExecutor(connections[column.database])
    if executor.migration_plan(executor.loader.graph.leaf_nodes()):
        return checks.Warning(
            f"{text}, until the waiting migrations are applied.",
            hint="Run `manage.py migrate` before PASSWORD_HASHERS names a sealing hasher.",
            obj=column.model,
            id="kms_hasher.W006",
        )
    return checks.Error(
        f"{text}, its field {column.field.max_length or 'any number'}: a sealed password "
        "is refused or, worse, cut off.",
        hint="The migration that widens it was faked or undone, or applied in a mode that "
        "needs no more. Run `manage.py widen_password_column`, or alter the column by hand to "
        f"varchar({column.field.max_length or encoding.MAX_LENGTH}).",
        obj=column.model,
        id="kms_hasher.E007",
    )


def _missing_hashers(column: Column, listed: Sequence[str]) -> Iterator[checks.CheckMessage]:
    name = column.field.attname
    rows = column.rows.filter(**{f"{name}__startswith": encoding.PREFIX})
    for algorithm in (*listed, encoding.DATA_KEY):
        rows = rows.exclude(**{f"{name}__startswith": encoding.prefix_of(algorithm)})
    missing = set()
    for stored in rows.values_list(name, flat=True)[:SAMPLE]:
        try:
            missing.add(encoding.parse(stored).header.algorithm)
        except MalformedHash:
            continue  # no hasher reads it
    for algorithm in sorted(missing):
        yield checks.Error(
            f"{column} holds passwords made by the hasher {algorithm!r}, which "
            "PASSWORD_HASHERS does not list: their users cannot log in.",
            hint="Put the hasher back, not necessarily first. To leave it for good, run "
            "`manage.py unwrap_passwords` before.",
            obj=column.model,
            id="kms_hasher.E008",
        )


def _user_model() -> type[models.Model] | None:
    """Return the user model, if there is one and it has a password field."""
    try:
        model = get_user_model()
        field = model._meta.get_field("password")
    except (ImproperlyConfigured, FieldDoesNotExist):
        return None
    return model if isinstance(field, models.CharField | models.TextField) else None
