"""
Rewriting stored passwords: under another key, sealed, or back to Django's own hashes.

plan         what is to be done, found out without changing anything
estimate     what that takes: calls, money, time, quota, disk, locks
permissions  whether it is allowed, tried by DryRun
rotate       a plan carried out: the key, the alias, then every row
seal         stock hashes sealed in place, and the way back
runs         the `RotationRun` row of a run: recorded, gone on with, paused, cancelled
sweeps       a run from its first sweep to its last, by whoever works on it
shards       the parts of a sweep: bounded, claimed, kept
engine       walks the rows of a shard; what is done to a row is a `Job`
jobs         re-wrap, new material, wrap, unwrap
workers      calls in flight, retries
pace         the rate, and how many in flight
processes    workers on this machine
distribute   workers on any machine, by `celery` or `tasks`
database     time limits and replicas
keys         makes keys, moves the alias, disables keys that no row needs
verify       counts rows by key and opens them again
status       what `kms_status` tells

Nothing here prints or parses arguments: a run is a generator of `sweeps.Progress`.
"""
