"""
Rewriting stored passwords: under another key, sealed, or back to Django's own hashes.

plan      what is to be done, found out without changing anything
estimate  what that takes: calls, money, time, quota, disk, locks
rotate    a plan carried out: the key, the alias, then every row
seal      stock hashes sealed in place, and the way back
engine    walks the rows of all columns; what is done to a row is a `Job`
jobs      re-wrap, new material, wrap, unwrap
keys      makes keys, moves the alias, disables keys that no row needs
workers   threads, retries and the rate limit
runs      the `RotationRun` row of a run
status    what `kms_status` tells

Nothing here prints or parses arguments: a run is a generator of `engine.Progress`.
"""
