"""
The ways to seal a digest. A value sealed in one is never tried in another.

Each mode is a small class with the methods of `base.Mode`, named in `settings` by its key in
`MODES` and in the stored string by its `code`.
"""

from __future__ import annotations

from collections.abc import Mapping

from kms_hasher import encoding
from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.modes.base import Mode
from kms_hasher.modes.direct import Direct
from kms_hasher.modes.envelope import Envelope
from kms_hasher.modes.mac import Mac, MacInDirect
from kms_hasher.modes.public_key import PublicKey

MODES: Mapping[str, Mode] = {
    "direct": Direct(),
    "public_key": PublicKey(),
    "envelope": Envelope(),
    "mac": Mac(),
    "mac_in_direct": MacInDirect(),
}
#: Characters in the password column of Django's user model.
STOCK_WIDTH = 128

_BY_CODE = {mode.code: mode for mode in MODES.values()}
_NAMES = {mode.code: name for name, mode in MODES.items()}


def by_name(name: str) -> Mode:
    """Return the mode that the settings name. Raises `ConfigurationError`."""
    try:
        return MODES[name]
    except KeyError:
        raise ConfigurationError(
            f"KMS_HASHER['MODE'] is {name!r}: use {' or '.join(map(repr, MODES))}."
        ) from None


def by_code(code: str) -> Mode:
    """Return the mode that a stored string names. Raises `MalformedHash`."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise MalformedHash("the hash is sealed in a mode this version does not know") from None


def is_known(code: str) -> bool:
    """Return whether stored strings may name such a mode."""
    return code in _BY_CODE


def name_of(code: str) -> str:
    """Return the name, in settings, of the mode with this code; the code if there is none."""
    return _NAMES.get(code, code)


def rewraps(code: str, spec: str) -> bool:
    """
    Return whether ReEncrypt brings values of a mode under a key of this spec.

    True of a mode that is not known, so that its rows are told as bad.
    """
    mode = _BY_CODE.get(code)
    return mode is None or (mode.rewraps and mode.spec == spec.partition("_")[0])


def converts(code: str, name: str) -> bool:
    """
    Return whether values in the mode with this code can be brought into the mode of this name
    without a password; False where they are in it.
    """
    source, target = _BY_CODE.get(code), by_name(name)
    return (
        source is not None and source is not target and source.core in ("digest", target.core)
    )


def width(name: str) -> int:
    """
    Return the characters that a column needs for the values of a mode of this name.

    Django's own column holds 128, which is enough for two of the modes.
    """
    return STOCK_WIDTH if by_name(name).fits_stock else encoding.MAX_LENGTH
