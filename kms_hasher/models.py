"""
What people and plans need to know of keys: which there were, and what was done with them.

No login reads or needs any of these tables: a stored hash names its key itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.utils import translation
from django.utils.translation import gettext_lazy as _

from kms_hasher import signals
from kms_hasher.fields import BoundedTime, Details, Number, printable


def in_english(row: models.Model) -> str:
    """
    Return what a row is called, for logs, mails and commands.

    Those who search them look for the same words, whatever language a site or a reader has.
    """
    with translation.override(None):
        return str(row)


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
    fingerprint = models.CharField(
        _("fingerprint"),
        max_length=64,
        blank=True,
        help_text=_("Of an RSA key: the SHA-256 of its public half, as SubjectPublicKeyInfo."),
    )
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


class DataKey(models.Model):
    """
    A data key of the mode `envelope`, wrapped by a KMS key: see `data_keys`.

    Its primary key is the number that stored passwords name it by.
    """

    sealed = models.TextField(
        _("wrapped key"), help_text=_("A stored string like those of passwords.")
    )
    made_at = models.DateTimeField(_("made at"))
    uses = models.PositiveIntegerField(
        _("uses"), default=0, help_text=_("Passwords that it was taken for.")
    )
    retired_at = models.DateTimeField(_("retired at"), null=True, blank=True)

    class Meta:
        verbose_name = _("data key")
        verbose_name_plural = _("data keys")
        ordering = ["-pk"]

    def __str__(self) -> str:
        return str(self.pk)

    @property
    def number(self) -> int:
        number: int = self.pk
        return number


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
        TO_MODE = "to-mode", _("move to a mode")
        NEW_DATA_KEYS = "new-data-keys", _("new data keys")

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
    started_at = BoundedTime(_("started at"))
    updated_at = BoundedTime(_("last sign of life"))
    finished_at = BoundedTime(_("finished at"), null=True, blank=True)
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

    hour = BoundedTime(_("hour"), help_text=_("Its beginning."))
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
        permissions = [
            ("export_auditevent", "Can export events"),
            ("reconcile_auditevent", "Can see and resolve what comparisons found"),
        ]
        indexes = [
            models.Index(fields=["time"], name="kms_event_time"),
            models.Index(fields=["key_ref", "time", "outcome"], name="kms_event_key"),
            models.Index(fields=["outcome", "time", "key_ref"], name="kms_event_outcome_key"),
            models.Index(fields=["operation", "time"], name="kms_event_operation"),
            models.Index(fields=["purpose", "time"], name="kms_event_purpose"),
            models.Index(fields=["sub"], name="kms_event_sub"),
        ]

    def __str__(self) -> str:
        return f"{self.operation} {self.get_outcome_display()}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            raise TypeError("The audit is append-only: events are never changed.")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("The audit is append-only: events are never deleted.")


class AuditSeal(models.Model):
    """
    The seal of a segment of the audit: of all events with ids above `after_id` and up to
    `last_id`, and of those in `late`.

    See `kms_hasher.audit.seals`. All fields but `leaves` enter the hash that is anchored in
    KMS or that the next seal carries on.
    """

    sequence = models.PositiveBigIntegerField(_("sequence"), unique=True)
    version = models.PositiveSmallIntegerField(
        _("version"), help_text=_("Which fields of the events are sealed, and how.")
    )
    sealed_at = models.DateTimeField(_("sealed at"))
    after_id = models.BigIntegerField(_("after event"))
    last_id = models.BigIntegerField(_("up to event"))
    late = models.TextField(
        _("late events"), blank=True, help_text=_("Events of older segments, admitted later.")
    )
    count = models.PositiveBigIntegerField(_("events"))
    first_time = models.DateTimeField(_("earliest time"), null=True, blank=True)
    last_time = models.DateTimeField(_("latest time"), null=True, blank=True)
    root = models.CharField(_("Merkle root"), max_length=64)
    leaves_hash = models.CharField(max_length=64, editable=False)
    previous = models.CharField(_("hash of the seal before"), max_length=64)
    pruned = models.PositiveBigIntegerField(
        _("pruned up to"), default=0, help_text=_("When this seal was made.")
    )
    pruning = models.CharField(max_length=64, blank=True, editable=False)
    anchors = models.JSONField(_("anchors"), default=dict)
    # Nine bytes for each event, which tell what event differs; given up after pruning.
    leaves = models.BinaryField()
    # Of the last segment that was pruned alone: all up to it were.
    pruned_at = models.DateTimeField(_("pruned at"), null=True, blank=True)
    pruning_anchors = models.JSONField(_("anchors of the pruning"), default=dict, blank=True)

    class Meta:
        verbose_name = _("seal")
        verbose_name_plural = _("seals")
        ordering = ["-sequence"]

    def __str__(self) -> str:
        return str(self.sequence)


class AuditFinding(models.Model):
    """Something about the audit that a person should look at."""

    class Kind(models.TextChoices):
        UNKNOWN_CALL = "unknown-call", _("call this application never made")
        UNKNOWN_CHANGE = "unknown-change", _("change of a key this application never made")
        NOT_IN_TRAIL = "not-in-trail", _("events that CloudTrail lacks")
        RATE = "rate", _("more decrypts than usual")
        RETIRED_KEY = "retired-key", _("use of a retired key")
        TAMPERED = "tampered", _("burst of tampered values")
        BREAKER = "breaker", _("circuit breaker opened")
        SEALING_OVERDUE = "sealing-overdue", _("sealing overdue")

    class Severity(models.TextChoices):
        WARNING = "warning", _("warning")
        CRITICAL = "critical", _("critical")

    kind = models.CharField(_("kind"), max_length=32, choices=Kind.choices)
    severity = models.CharField(_("severity"), max_length=16, choices=Severity.choices)
    dedup_key = models.CharField(
        max_length=64, unique=True, editable=False, help_text=_("The same for the same thing.")
    )
    subject = models.TextField(_("subject"))
    key_ref = models.CharField(_("key ref"), max_length=30, blank=True)
    first_seen = BoundedTime(_("first seen"))
    last_seen = BoundedTime(_("last seen"))
    count = Number(_("count"), default=1)
    details = Details(_("details"), default=dict, blank=True)
    acknowledged_at = BoundedTime(_("acknowledged at"), null=True, blank=True)
    acknowledged_by = models.CharField(_("acknowledged by"), max_length=255, blank=True)
    resolved_at = BoundedTime(
        _("resolved at"),
        null=True,
        blank=True,
        help_text=_("When it was explained by what came later."),
    )
    alarmed_at = BoundedTime(null=True, blank=True, editable=False)
    mailed_at = BoundedTime(null=True, blank=True, editable=False)

    class Meta:
        verbose_name = _("finding")
        verbose_name_plural = _("findings")
        ordering = ["-last_seen", "-pk"]
        indexes = [models.Index(fields=["last_seen"], name="kms_finding_time")]
        permissions = [("acknowledge_auditfinding", "Can acknowledge findings")]

    def __str__(self) -> str:
        return printable(f"{self.get_kind_display()}: {self.subject}")

    @property
    def is_open(self) -> bool:
        return self.acknowledged_at is None and self.resolved_at is None


class AuditEvidence(models.Model):
    """One call or event that a finding stands on; a call stands for one finding only."""

    finding = models.ForeignKey(
        AuditFinding,
        on_delete=models.CASCADE,
        related_name="evidence",
        verbose_name=_("finding"),
    )
    reference = models.CharField(
        _("reference"),
        max_length=255,
        unique=True,
        help_text=_("CloudTrail's eventID, or the number of an event here."),
    )
    time = BoundedTime(_("time"))
    operation = models.CharField(_("operation"), max_length=64)
    request_id = models.CharField(_("request id"), max_length=320, blank=True)
    error_code = models.CharField(_("error code"), max_length=320, blank=True)
    sub = models.CharField(_("stored password"), max_length=64, blank=True)
    caller = models.CharField(_("caller"), max_length=320, blank=True)
    source_ip = models.CharField(_("source address"), max_length=320, blank=True)
    user_agent = models.CharField(_("user agent"), max_length=320, blank=True)
    holder = models.TextField(  # noqa: DJ001  # NULL until somebody has looked
        _("account"),
        null=True,
        blank=True,
        help_text=_("Whose stored password it is: column and primary key. Empty if nobody's."),
    )
    explained_at = BoundedTime(_("explained at"), null=True, blank=True)

    class Meta:
        verbose_name = _("evidence")
        verbose_name_plural = _("evidence")
        ordering = ["time", "pk"]
        indexes = [models.Index(fields=["sub"], name="kms_evidence_sub")]

    def __str__(self) -> str:
        return self.reference


class TrailFile(models.Model):
    """A file of CloudTrail that need not be read again."""

    digest = models.CharField(
        max_length=64, unique=True, editable=False, help_text=_("SHA-256 of its path.")
    )
    path = models.TextField(_("path"))
    size = models.BigIntegerField(_("size"))
    modified = models.BigIntegerField(_("modified, in ns"))

    class Meta:
        verbose_name = _("CloudTrail file")
        verbose_name_plural = _("CloudTrail files")

    def __str__(self) -> str:
        return self.path


class TrailMark(models.Model):
    """Up to when the events of a Region have been looked for in CloudTrail."""

    region = models.CharField(_("Region"), max_length=64, unique=True)
    until = BoundedTime(_("until"))
    updated_at = BoundedTime(_("updated at"), auto_now=True)

    class Meta:
        verbose_name = _("CloudTrail mark")
        verbose_name_plural = _("CloudTrail marks")

    def __str__(self) -> str:
        return f"{self.region} {self.until:%Y-%m-%d %H:%M}"
