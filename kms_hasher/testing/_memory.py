"""A provider that keeps its keys in memory."""

from __future__ import annotations

import contextlib
import datetime
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping

from kms_hasher.exceptions import ConfigurationError, KMSError
from kms_hasher.providers import _rules, _software
from kms_hasher.providers._keys import Keys, StoredKey
from kms_hasher.providers._service import SoftwareProvider
from kms_hasher.providers.base import SYMMETRIC_DEFAULT

#: What keys of a spec are for, if not for encryption.
_USAGES = {"HMAC_256": "GENERATE_VERIFY_MAC"}

#: The keys made for aliases in this process, by account, Region, alias and spec.
_made: dict[tuple[str, str, str, str], StoredKey] = {}


class InMemoryProvider(SoftwareProvider):
    """
    AWS KMS on keys in memory, for tests. It is as strict as the local provider.

    `aliases` names aliases to be there from the start, each with a key of its own: a
    sequence of names, or a mapping from names to key specs, as in
    `{"alias/tests": "SYMMETRIC_DEFAULT", "alias/mac": "HMAC_256", "alias/rsa": "RSA_2048"}`.
    These keys are made once in a process: every instance with the same alias, spec, account
    and Region begins with the same key, enabled, so that what one has sealed the next can
    open. All else, such as a state, a moved alias or a key made later, is the instance's
    own. `account` (12 digits) and `region` only form the ARNs. `clock` returns the current
    time, aware; a test may replace it.

    Raises `ConfigurationError` for a name that is no alias, or an unknown spec.
    """

    def __init__(
        self,
        *,
        aliases: Iterable[str] | Mapping[str, str] = (),
        account: str = "000000000000",
        region: str = "local-1",
    ) -> None:
        store = _Memory()
        super().__init__(store, account=account, region=region)
        if isinstance(aliases, str):
            raise ConfigurationError(f"'aliases' is {aliases!r}: give a list of aliases.")
        if not isinstance(aliases, Mapping):
            aliases = dict.fromkeys(aliases, SYMMETRIC_DEFAULT)
        with store.change() as keys:
            for alias, spec in aliases.items():
                key = _key_of(account, region, alias, spec)
                keys.keys[key.id], keys.aliases[alias] = key, key.id


class _Memory:
    """Keys that a reader takes no lock for: each change puts new ones in their place."""

    def __init__(self) -> None:
        self._keys = Keys()
        self._lock = threading.Lock()

    def read(self) -> Keys:
        return self._keys

    @contextlib.contextmanager
    def change(self) -> Iterator[Keys]:
        with self._lock:
            keys = Keys(dict(self._keys.keys), dict(self._keys.aliases))
            yield keys
            self._keys = keys


def _key_of(account: str, region: str, alias: str, spec: str) -> StoredKey:
    usage = _USAGES.get(spec, "ENCRYPT_DECRYPT")
    try:
        _rules.check_alias(alias)
        _rules.check_spec(spec, usage)
    except KMSError as error:
        raise ConfigurationError(
            f"'aliases' holds {alias!r}, {spec!r}: {error.message}"
        ) from None
    place = (account, region, alias, spec)
    if place not in _made:
        key = StoredKey(
            id=str(uuid.uuid4()),
            spec=spec,
            usage=usage,
            materials=(_software.new_material(spec),),
            created_at=datetime.datetime.now(datetime.timezone.utc),
            policy=_rules.default_policy(account),
        )
        # One step: whichever thread came first, all have the same key.
        _made.setdefault(place, key)
    return _made[place]
