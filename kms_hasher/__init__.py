"""Password hashes sealed by AWS KMS, for Django."""

__version__ = "0.1.0"
