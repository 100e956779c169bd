"""The servers that some tests need: where they are, and whether they answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib import import_module
from urllib.parse import urlsplit

SQLITE = "sqlite://:memory:"

# Their URLs; each variable names another.
POSTGRESQL = os.environ.get(
    "KMS_HASHER_POSTGRESQL_URL", "postgres://postgres@127.0.0.1:5432/kms_hasher"
)
MARIADB = os.environ.get("KMS_HASHER_MARIADB_URL", "mysql://root@127.0.0.1:3306/kms_hasher")
BROKERS = {
    "redis": os.environ.get("KMS_HASHER_REDIS_URL", "redis://127.0.0.1:6379/0"),
    "rabbitmq": os.environ.get(
        "KMS_HASHER_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"
    ),
}


def connect(url: str) -> None:
    """Connect to a server and hang up. Raises what its driver raises."""
    parts = urlsplit(url)
    if parts.scheme == "postgres":
        import_module("psycopg").connect(url, dbname="postgres", connect_timeout=3).close()
    elif parts.scheme == "mysql":
        import_module("MySQLdb").connect(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 3306,
            user=parts.username or "root",
            password=parts.password or "",
            connect_timeout=3,
        ).close()
    else:
        address = (str(parts.hostname), parts.port or 0)
        socket.create_connection(address, timeout=3).close()


def missing() -> Iterator[str]:
    """Yield the name of each server that does not answer, with the reason."""
    for name, url in {"PostgreSQL": POSTGRESQL, "MariaDB": MARIADB, **BROKERS}.items():
        try:
            connect(url)
        except Exception as error:  # noqa: BLE001  # each driver has errors of its own
            yield f"{name} ({str(error).strip() or type(error).__name__})"
