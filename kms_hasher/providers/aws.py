"""
AWS KMS. This is the only module that imports boto3's library, and only at the first call.

Credentials, profile and Region come from where every program on AWS takes them; the
endpoint can be redirected with `AWS_ENDPOINT_URL_KMS`. botocore's defaults are unfit for a
login (60 s, then 60 s more), so timeouts, attempts and pool are always set here.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kms_hasher import __version__
from kms_hasher.encoding import ARN
from kms_hasher.exceptions import (
    ConfigurationError,
    InvalidRequest,
    KMSCredentialsError,
    KMSError,
    KMSHasherError,
    MalformedHash,
)
from kms_hasher.providers.aws_errors import Answer, translate
from kms_hasher.providers.aws_operations import Operations
from kms_hasher.providers.base import OPERATIONS

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.config import Config
    from botocore.session import Session

#: At level DEBUG they write whole bodies, or their SHA-256: whoever can compute an Encrypt's
#: but for the digest could try passwords against that, without a call to KMS.
NOSY_LOGGERS = ("botocore.auth", "botocore.endpoint", "botocore.parsers")

_ROLE = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/\S+\Z")
_SESSION_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{2,64}\Z")


class _Trace:
    """What is noted while one call runs: the id of every attempt that got an answer."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.answered = False


_trace: ContextVar[_Trace | None] = ContextVar("kms_hasher_aws_trace", default=None)


def _note_answer(response_dict: Mapping[str, Any], **_: Any) -> None:
    """Run for every HTTP response, before botocore parses it: it keeps only the last id."""
    if trace := _trace.get():
        trace.answered = True
        if request_id := response_dict["headers"].get("x-amzn-requestid"):
            trace.request_ids.append(request_id)


def _not_ours(_: logging.LogRecord) -> bool:
    """A filter for `NOSY_LOGGERS`: nothing of our own calls."""
    return _trace.get() is None


class _Process:
    """
    What one process holds. A client shared across a fork hands out other calls' answers.

    `inherited` is kept, unused: closing or collecting a parent's pool in the child may wait
    for ever for a lock that another thread held at the fork.
    """

    def __init__(self, inherited: _Process | None = None) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.session: Session | None = None
        self.clients: dict[str, BaseClient] = {}
        self.inherited = inherited


class AWSProvider(Operations):
    """
    AWS KMS through botocore. The keywords are `KMS_HASHER["OPTIONS"]`.

    region              where keys named by id or alias are; a key's ARN has its own.
                        Default: the environment's or profile's.
    profile             name of a profile in AWS's configuration files.
    role_arn            role to assume through STS, renewed before it expires.
    role_session_name   the name its sessions have in CloudTrail.
    connect_timeout     seconds, for each attempt.
    read_timeout        seconds without an answer, for each attempt.
    attempts            how often a call is tried in all. Before another attempt botocore
                        waits up to 0.05 s, or up to 1 s when throttled.
    max_pool_connections  at least the number of threads.

    Raises `ConfigurationError` for an option that cannot work, and at the first call when
    AWS's own configuration cannot. Operations that answer with no ARN give back the key as
    it was named.
    """

    def __init__(
        self,
        *,
        region: str | None = None,
        profile: str | None = None,
        role_arn: str | None = None,
        role_session_name: str = "kms_hasher",
        connect_timeout: float = 1.0,
        read_timeout: float = 2.0,
        attempts: int = 2,
        max_pool_connections: int = 32,
    ) -> None:
        for name, text in {"region": region, "profile": profile, "role_arn": role_arn}.items():
            _check(name, text is None or (isinstance(text, str) and text != ""), "a name")
        _check("role_arn", role_arn is None or _ROLE.match(role_arn), "the ARN of an IAM role")
        _check(
            "role_session_name",
            isinstance(role_session_name, str) and _SESSION_NAME.match(role_session_name),
            "2 to 64 letters, digits or _+=,.@-",
        )
        for name, seconds in {
            "connect_timeout": connect_timeout,
            "read_timeout": read_timeout,
        }.items():
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            _check(name, number and 0 < seconds <= 3600, "a positive number of seconds")
        for name, count in {
            "attempts": attempts,
            "max_pool_connections": max_pool_connections,
        }.items():
            _check(name, type(count) is int and count > 0, "a whole number above 0")
        self._region, self._profile = region, profile
        self._role_arn, self._role_session_name = role_arn, role_session_name
        self._pinned: dict[str, Any] = {
            "connect_timeout": connect_timeout,
            "read_timeout": read_timeout,
            # Never "adaptive", which may delay any call.
            "retries": {"mode": "standard", "total_max_attempts": attempts},
            "max_pool_connections": max_pool_connections,
            "tcp_keepalive": True,
        }
        self._process = _Process()

    def close(self) -> None:
        """Drop the session and its connections; the next call makes new ones."""
        process, self._process = self._process, _Process()
        if process.pid != os.getpid():
            self._process.inherited = process
            return
        for client in list(process.clients.values()):
            client.close()

    def _call(self, method: str, key: str, *others: str, **params: Any) -> Answer:
        operation = OPERATIONS[method]
        trace = _Trace()
        token = _trace.set(trace)
        failure: KMSHasherError
        try:
            client = self._client_for(key, *others)
            data = getattr(client, method)(**params)
            return Answer(data, operation, key, tuple(trace.request_ids))
        except KMSHasherError as error:
            failure = error
            if isinstance(failure, KMSError):
                failure.operation, failure.key = operation, key
        except Exception as error:  # noqa: BLE001  # whatever botocore comes upon
            failure = translate(
                error,
                operation=operation,
                key=key,
                request_ids=trace.request_ids,
                answered=trace.answered,
            )
        finally:
            _trace.reset(token)
        raise failure  # out here, so that botocore's error is not its context

    def _client_for(self, *keys: str) -> BaseClient:
        """Return the client of the Region that all `keys` are in."""
        first, *rest = (self._client(_region(key)) for key in keys)
        if any(client.meta.region_name != first.meta.region_name for client in rest):
            raise InvalidRequest("KMS works within one Region, and these keys are in two.")
        return first

    def _client(self, region: str) -> BaseClient:
        """Return this process's client for a Region; "" is the configured one."""
        process = self._process
        if process.pid != os.getpid():
            process = self._process = _Process(inherited=process)
        client = process.clients.get(region)
        if client is None:
            with process.lock:
                client = process.clients.get(region) or self._connect(process, region)
        return client

    def _connect(self, process: _Process, region: str) -> BaseClient:
        import boto3
        import botocore
        from botocore.config import Config
        from botocore.session import Session

        python = platform.python_version()
        config = Config(
            # Given whole: botocore would build its own twice for every call.
            user_agent=f"kms_hasher/{__version__} botocore/{botocore.__version__} "
            f"python/{python}",
            **self._pinned,
        )
        session = process.session or Session(profile=self._profile)
        home = self._region or session.get_config_variable("region")
        name = region or home
        if not name:
            raise ConfigurationError(
                "There is no AWS Region: set AWS_DEFAULT_REGION, the region of the profile, or "
                "KMS_HASHER['OPTIONS']['region'], or give KMS_HASHER['KEY'] as an ARN."
            )
        if process.session is None:
            for logger in NOSY_LOGGERS:
                logging.getLogger(logger).addFilter(_not_ours)
            if self._role_arn:
                self._assume_role(session, config, home or name, self._role_arn)
            process.session = session
        # A client made without credentials would never look for them again.
        if session.get_credentials() is None:
            raise KMSCredentialsError(code="NoCredentialsError")
        client = process.clients.get(name)
        if client is None:
            made = boto3.Session(botocore_session=session)
            client = made.client("kms", region_name=name, config=config)
            client.meta.events.register("before-parse.kms", _note_answer)
            process.clients[name] = client
        process.clients[region] = client
        return client

    def _assume_role(
        self, session: Session, config: Config, region: str, role_arn: str
    ) -> None:
        """Let `session` have the role's credentials, got with those it had."""
        from botocore.credentials import (
            AssumeRoleCredentialFetcher,
            DeferredRefreshableCredentials,
        )

        source = session.get_component("credential_provider").load_credentials()
        if source is None:
            raise KMSCredentialsError(code="NoCredentialsError")
        fetcher = AssumeRoleCredentialFetcher(
            functools.partial(session.create_client, region_name=region, config=config),
            source,
            role_arn,
            extra_args={"RoleSessionName": self._role_session_name},
        )
        role = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
        session.register_component(
            "credential_provider", SimpleNamespace(load_credentials=lambda: role)
        )


def _check(option: str, fine: object, wanted: str) -> None:
    if not fine:
        raise ConfigurationError(f"KMS_HASHER['OPTIONS'][{option!r}] must be {wanted}.")


def _region(key: str) -> str:
    """Return the Region that a key's or alias's ARN names, "" for other names."""
    if not key.startswith("arn:"):
        return ""
    try:
        return ARN.parse(key).region
    except MalformedHash as error:
        raise InvalidRequest(f"It is {error}.", code="InvalidArnException") from None
