"""The services that hold keys: AWS KMS, a local file, or a class of the site's own."""

from __future__ import annotations

from django.utils.module_loading import import_string

from kms_hasher.conf import Conf
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.providers.base import Provider

# By dotted path, so that naming one provider never imports another's libraries.
BUILT_IN = {
    "aws": "kms_hasher.providers.aws.AWSProvider",
    "local": "kms_hasher.providers.local.LocalProvider",
}


def create(conf: Conf) -> Provider:
    """
    Return a new provider as the settings describe it.

    Raises `ConfigurationError` if there is no such provider or it refuses its options.
    """
    try:
        cls = import_string(BUILT_IN.get(conf.provider, conf.provider))
    except ImportError as error:
        raise ConfigurationError(
            f"KMS_HASHER['PROVIDER'] is {conf.provider!r}: use "
            f"{', '.join(map(repr, BUILT_IN))} or the dotted path of a class ({error})."
        ) from error
    try:
        provider: Provider = cls(**conf.options)
    except TypeError as error:
        raise ConfigurationError(
            f"KMS_HASHER['OPTIONS'] does not fit the provider {conf.provider!r}: {error}."
        ) from error
    return provider
