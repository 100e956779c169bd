"""
AWS KMS. boto3's library is imported here and in `aws_http` alone, and only at the first call.

Credentials, profile and Region come from where every program on AWS takes them; the
endpoint can be redirected with `AWS_ENDPOINT_URL_KMS`. botocore's defaults are unfit for a
login (60 s, then 60 s more), so timeouts, attempts and pool are always set here.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kms_hasher import __version__
from kms_hasher.encoding import ARN
from kms_hasher.exceptions import (
    ConfigurationError,
    InvalidRequest,
    KMSCredentialsError,
    MalformedHash,
)
from kms_hasher.providers.aws_errors import Answer, translate
from kms_hasher.providers.aws_operations import Operations
from kms_hasher.providers.base import OPERATIONS

if TYPE_CHECKING:
    from botocore.config import Config
    from botocore.session import Session

    from kms_hasher.providers.aws_http import Endpoint

_ROLE = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/\S+\Z")
_SESSION_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{2,64}\Z")


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
        self.endpoints: dict[str, Endpoint] = {}
        self.inherited = inherited


class AWSProvider(Operations):
    """
    AWS KMS. The keywords are `KMS_HASHER["OPTIONS"]`.

    region              where keys named by id or alias are; a key's ARN has its own.
                        Default: the environment's or profile's.
    profile             name of a profile in AWS's configuration files.
    role_arn            role to assume through STS, renewed before it expires.
    role_session_name   the name its sessions have in CloudTrail.
    connect_timeout     seconds, for each attempt.
    read_timeout        seconds without an answer, for each attempt.
    attempts            how often a call is tried in all, while KMS cannot answer. Before
                        another attempt it waits up to 0.05 s, or up to 1 s when throttled.
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
        self._timeouts, self._attempts = (connect_timeout, read_timeout), attempts
        self._max_pool_connections = max_pool_connections
        self._process = _Process()

    def close(self) -> None:
        """Drop the session and its connections; the next call makes new ones."""
        process, self._process = self._process, _Process()
        if process.pid != os.getpid():
            self._process.inherited = process
            return
        for endpoint in list(process.endpoints.values()):
            endpoint.close()

    def _call(self, method: str, key: str, *others: str, **params: Any) -> Answer:
        operation = OPERATIONS[method]
        try:
            return self._endpoint_for(key, *others).call(operation, key, params)
        except Exception as error:  # noqa: BLE001  # whatever botocore comes upon
            failure = translate(error, operation=operation, key=key)
        raise failure  # out here, so that botocore's error is not its context

    async def _acall(self, method: str, key: str, *others: str, **params: Any) -> Answer:
        operation = OPERATIONS[method]
        try:
            return await self._endpoint_for(key, *others).acall(operation, key, params)
        except Exception as error:  # noqa: BLE001
            failure = translate(error, operation=operation, key=key)
        raise failure

    async def aclose(self) -> None:
        """Drop the connections of the running event loop, before it ends."""
        for endpoint in self._process.endpoints.values():
            endpoint.close_loop()

    def _endpoint_for(self, *keys: str) -> Endpoint:
        """Return KMS in the Region that all `keys` are in."""
        first, *rest = (self._endpoint(_region(key)) for key in keys)
        if any(endpoint.region != first.region for endpoint in rest):
            raise InvalidRequest("KMS works within one Region, and these keys are in two.")
        return first

    def _endpoint(self, region: str) -> Endpoint:
        """Return this process's way to a Region; "" is the configured one."""
        process = self._process
        if process.pid != os.getpid():
            process = self._process = _Process(inherited=process)
        endpoint = process.endpoints.get(region)
        if endpoint is None:
            with process.lock:
                endpoint = process.endpoints.get(region) or self._connect(process, region)
        return endpoint

    def lookup_events(
        self, region: str, start: datetime.datetime, end: datetime.datetime
    ) -> Iterator[object]:
        """Yield CloudTrail's records of KMS, see `aws_trail.lookup`. Raises `KMSError`."""
        import boto3
        from botocore.config import Config

        from kms_hasher.providers import aws_trail

        try:
            name = self._endpoint(region).region
            client = boto3.Session(botocore_session=self._process.session).client(
                "cloudtrail", region_name=name, config=Config(retries={"mode": "standard"})
            )
        except Exception as error:  # noqa: BLE001
            failure = translate(error, operation=aws_trail.OPERATION, key="")
        else:
            return aws_trail.lookup(client, start, end)
        raise failure

    def _connect(self, process: _Process, region: str) -> Endpoint:
        import boto3
        import botocore
        from botocore.config import Config
        from botocore.session import Session

        from kms_hasher.providers.aws_http import Endpoint

        user_agent = (
            f"kms_hasher/{__version__} botocore/{botocore.__version__} "
            f"python/{platform.python_version()}"
        )
        config = Config(
            user_agent=user_agent,
            connect_timeout=self._timeouts[0],
            read_timeout=self._timeouts[1],
            # Never "adaptive", which may delay any call.
            retries={"mode": "standard", "total_max_attempts": self._attempts},
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
            if self._role_arn:
                self._assume_role(session, config, home or name, self._role_arn)
            process.session = session
        # A session that once found no credentials would never look for them again.
        credentials = session.get_credentials()
        if credentials is None:
            raise KMSCredentialsError(code="NoCredentialsError")
        endpoint = process.endpoints.get(name)
        if endpoint is None:
            made = boto3.Session(botocore_session=session)
            endpoint = process.endpoints[name] = Endpoint(
                session,
                credentials,
                made.client("kms", region_name=name, config=config),
                user_agent=user_agent,
                timeouts=self._timeouts,
                attempts=self._attempts,
                max_pool_connections=self._max_pool_connections,
            )
        process.endpoints[region] = endpoint
        return endpoint

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
