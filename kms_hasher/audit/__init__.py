"""What became of the calls to KMS: recorded as they happen, and shown to people."""
