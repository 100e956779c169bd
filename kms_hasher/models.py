"""
What people and plans need to know of keys: which there were, and what was done with them.

No login reads or needs any of these tables: a stored hash names its key itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.utils.translation import gettext_lazy as _

from kms_hasher import signals


class Key(models.Model):
    """A KMS key that has sealed or was to seal passwords."""

    ref = models.CharField(
        _("key ref"),
        max_length=30,
        unique=True,
        help_text=_("How stored passwords name the key."),
    )
    arn = models.CharField(_("ARN"), max_length=255)
    region = models.CharField(_("Region"), max_length=32)
    account = models.CharField(_("account"), max_length=12)
    spec = models.CharField(_("spec"), max_length=32, blank=True)
    state = models.CharField(
        _("state"), max_length=32, blank=True, help_text=_("As last described by KMS.")
    )
    first_seen = models.DateTimeField(_("first seen"))
    last_seen = models.DateTimeField(
        _("last seen"), help_text=_("Give or take some minutes while the key is in use.")
    )
    rows = models.BigIntegerField(
        _("stored passwords"),
        null=True,
        blank=True,
        help_text=_("Passwords sealed by the key when they were last counted."),
    )
    rows_counted_at = models.DateTimeField(_("counted at"), null=True, blank=True)

    class Meta:
        verbose_name = _("key")
        verbose_name_plural = _("keys")
        ordering = ["-first_seen", "ref"]

    def __str__(self) -> str:
        return self.arn.rpartition("/")[2]


class AliasPeriod(models.Model):
    """What an alias pointed to, from when to when, as far as this site has seen it."""

    alias = models.CharField(_("alias"), max_length=320)
    key = models.ForeignKey(
        Key, on_delete=models.PROTECT, related_name="alias_periods", verbose_name=_("key")
    )
    since = models.DateTimeField(_("since"))
    until = models.DateTimeField(_("until"), null=True, blank=True)
    # One open period for each alias, on databases without partial indexes too: the alias
    # while the period is open, and NULL, which is never equal to NULL, when it is closed.
    open_alias = models.CharField(max_length=320, null=True, unique=True, editable=False)  # noqa: DJ001

    class Meta:
        verbose_name = _("alias period")
        verbose_name_plural = _("alias history")
        ordering = ["-since", "-pk"]

    def __str__(self) -> str:
        return f"{self.alias} → {self.key}"


class RotationRun(models.Model):
    """A run of a command that rewrites stored passwords."""

    class Kind(models.TextChoices):
        REWRAP = "rewrap", _("re-wrap")
        NEW_KEY = "new-key", _("new key")
        TO_KEY = "to-key", _("existing key")
        NEW_MATERIAL = "new-material", _("new key material")
        WRAP = "wrap", _("wrap stock hashes")
        UNWRAP = "unwrap", _("unwrap to stock hashes")

    class State(models.TextChoices):
        RUNNING = "running", _("running")
        PAUSED = "paused", _("paused")
        FINISHED = "finished", _("finished")
        FAILED = "failed", _("failed")
        INTERRUPTED = "interrupted", _("interrupted")
        CANCELLED = "cancelled", _("cancelled")

    kind = models.CharField(_("kind"), max_length=16, choices=Kind.choices)
    state = models.CharField(
        _("state"), max_length=16, choices=State.choices, default=State.RUNNING
    )
    alias = models.CharField(_("alias"), max_length=320, blank=True)
    key = models.ForeignKey(
        Key,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="rotations",
        verbose_name=_("to key"),
    )
    previous_key = models.ForeignKey(
        Key,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="+",
        verbose_name=_("previous key"),
    )
    started_at = models.DateTimeField(_("started at"))
    updated_at = models.DateTimeField(_("last sign of life"))
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    started_by = models.CharField(_("started by"), max_length=255, blank=True)
    plan = models.JSONField(
        _("plan"),
        default=dict,
        blank=True,
        encoder=DjangoJSONEncoder,
        help_text=_("What was to be done and how, for every process that works on it."),
    )
    owner = models.CharField(
        _("conducted by"),
        max_length=255,
        blank=True,
        help_text=_("The process that opens the sweeps: host, process id and a token."),
    )
    rate = models.FloatField(
        _("rate cap"),
        null=True,
        blank=True,
        help_text=_("Calls to KMS per second at the most, over all processes."),
    )
    sweep = models.PositiveIntegerField(_("sweep"), default=0)
    total = models.BigIntegerField(_("rows expected"), default=0)
    rewritten = models.BigIntegerField(_("rewritten"), default=0)
    overtaken = models.BigIntegerField(
        _("overtaken"), default=0, help_text=_("Changed by their user meanwhile; left as is.")
    )
    failed = models.BigIntegerField(
        _("bad rows"), default=0, help_text=_("Could not be rewritten; left as they were.")
    )
    calls = models.BigIntegerField(
        _("calls"), default=0, help_text=_("Calls to KMS, those made again included.")
    )
    error = models.TextField(_("error"), blank=True)

    class Meta:
        verbose_name = _("rotation run")
        verbose_name_plural = _("rotation runs")
        ordering = ["-started_at", "-pk"]
        permissions = [
            ("control_rotationrun", "Can pause, resume and cancel rotation runs"),
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.started_at:%Y-%m-%d %H:%M}"


class RotationShard(models.Model):
    """
    A part of one column that one process works on at a time, in one sweep of a run.

    `after` and `upto` bound its primary keys, as text; "" is no bound. All rows up to
    `cursor` are done.
    """

    class State(models.TextChoices):
        WAITING = "waiting", _("waiting")
        WORKING = "working", _("being worked on")
        DONE = "done", _("done")
        FAILED = "failed", _("failed")

    run = models.ForeignKey(
        RotationRun, on_delete=models.CASCADE, related_name="shards", verbose_name=_("run")
    )
    sweep = models.PositiveIntegerField(_("sweep"))
    number = models.PositiveIntegerField(_("number"))
    database = models.CharField(_("database"), max_length=255)
    column = models.CharField(_("column"), max_length=255)
    after = models.TextField(_("after key"), blank=True)
    upto = models.TextField(_("up to key"), blank=True)
    cursor = models.TextField(_("done up to key"), blank=True)
    state = models.CharField(
        _("state"), max_length=16, choices=State.choices, default=State.WAITING
    )
    owner = models.CharField(_("worked on by"), max_length=255, blank=True)
    updated_at = models.DateTimeField(_("last sign of life"), null=True, blank=True)
    looked = models.BigIntegerField(_("looked at"), default=0)
    rewritten = models.BigIntegerField(_("rewritten"), default=0)
    overtaken = models.BigIntegerField(_("overtaken"), default=0)
    failed = models.BigIntegerField(_("bad rows"), default=0)
    calls = models.BigIntegerField(_("calls"), default=0)
    bad = models.JSONField(_("bad rows, named"), default=list, blank=True)
    sources = models.JSONField(_("key refs left"), default=list, blank=True)
    error = models.TextField(_("error"), blank=True)

    class Meta:
        verbose_name = _("shard")
        verbose_name_plural = _("shards")
        ordering = ["run", "sweep", "number"]
        constraints = [
            models.UniqueConstraint(
                fields=["run", "sweep", "number"], name="kms_shard_once_a_sweep"
            )
        ]

    def __str__(self) -> str:
        return f"{self.column} {self.sweep}.{self.number}"


class AuditHour(models.Model):
    """
    How many events there were of one hour, key, operation, purpose, outcome and latency.

    Concurrent writers add to rows of different slots, so that none waits for another; what
    is read is the sum over the slots.
    """

    hour = models.DateTimeField(_("hour"), help_text=_("Its beginning."))
    key_ref = models.CharField(_("key ref"), max_length=30, blank=True)
    operation = models.CharField(_("operation"), max_length=32)
    purpose = models.CharField(_("purpose"), max_length=16)
    outcome = models.CharField(_("outcome"), max_length=16)
    bucket = models.SmallIntegerField(
        _("bucket"), help_text=_("Of latencies, four to the doubling; -1 for no call.")
    )
    slot = models.SmallIntegerField(_("slot"))
    count = models.BigIntegerField(_("count"))

    class Meta:
        verbose_name = _("hour of events")
        verbose_name_plural = _("hours of events")
        ordering = ["hour", "pk"]
        constraints = [
            models.UniqueConstraint(
                fields=[
                    "hour",
                    "key_ref",
                    "operation",
                    "purpose",
                    "outcome",
                    "bucket",
                    "slot",
                ],
                name="kms_hour_once_a_slot",
            )
        ]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H:%M} {self.operation} {self.outcome}"


class AppendOnly(models.QuerySet["AuditEvent"]):
    """Refuses what would change or remove what is recorded."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("The audit is append-only: events are never changed or deleted.")

    update = delete = bulk_update = update_or_create = _refuse

    def _prune(self) -> int:
        """Delete the events, and return how many: for `audit.retention` and nothing else."""
        return self._raw_delete(self.db)


class AuditEvent(models.Model):
    """One call to KMS, or one stored password that was refused before KMS was asked."""

    time = models.DateTimeField(_("time"))
    operation = models.CharField(_("operation"), max_length=32)
    purpose = models.CharField(_("purpose"), max_length=16)
    outcome = models.CharField(
        _("outcome"), max_length=16, choices=[(name, _(name)) for name in signals.OUTCOMES]
    )
    error_code = models.CharField(_("error code"), max_length=64, blank=True)
    key_ref = models.CharField(
        _("key ref"), max_length=30, blank=True, help_text=_("Empty where KMS named no key.")
    )
    requested_key = models.CharField(
        _("requested key"),
        max_length=320,
        blank=True,
        help_text=_("The alias, id or ARN that the call named."),
    )
    latency_us = models.PositiveBigIntegerField(_("latency in µs"))
    request_ids = models.TextField(
        _("request ids"),
        blank=True,
        help_text=_("One for each attempt that got an answer, as CloudTrail's requestID."),
    )
    sub = models.CharField(
        _("stored password"),
        max_length=32,
        blank=True,
        help_text=_("The digest of its header, as in the encryption context."),
    )

    objects = AppendOnly.as_manager()

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        ordering = ["-time", "-pk"]
        indexes = [
            models.Index(fields=["time"], name="kms_event_time"),
            models.Index(fields=["key_ref", "time", "outcome"], name="kms_event_key"),
            models.Index(fields=["outcome", "time", "key_ref"], name="kms_event_outcome_key"),
            models.Index(fields=["operation", "time"], name="kms_event_operation"),
            models.Index(fields=["purpose", "time"], name="kms_event_purpose"),
            models.Index(fields=["sub"], name="kms_event_sub"),
        ]

    def __str__(self) -> str:
        return f"{self.operation} {self.outcome}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            raise TypeError("The audit is append-only: events are never changed.")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("The audit is append-only: events are never deleted.")
