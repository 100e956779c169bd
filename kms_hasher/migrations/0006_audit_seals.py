from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("kms_hasher", "0005_audit_hours"),
    ]

    operations = [
        migrations.CreateModel(
            name="AuditSeal",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "sequence",
                    models.PositiveBigIntegerField(unique=True, verbose_name="sequence"),
                ),
                (
                    "version",
                    models.PositiveSmallIntegerField(
                        help_text="Which fields of the events are sealed, and how.",
                        verbose_name="version",
                    ),
                ),
                ("sealed_at", models.DateTimeField(verbose_name="sealed at")),
                ("after_id", models.BigIntegerField(verbose_name="after event")),
                ("last_id", models.BigIntegerField(verbose_name="up to event")),
                (
                    "late",
                    models.TextField(
                        blank=True,
                        help_text="Events of older segments, admitted later.",
                        verbose_name="late events",
                    ),
                ),
                ("count", models.PositiveBigIntegerField(verbose_name="events")),
                (
                    "first_time",
                    models.DateTimeField(blank=True, null=True, verbose_name="earliest time"),
                ),
                (
                    "last_time",
                    models.DateTimeField(blank=True, null=True, verbose_name="latest time"),
                ),
                ("root", models.CharField(max_length=64, verbose_name="Merkle root")),
                ("leaves_hash", models.CharField(editable=False, max_length=64)),
                (
                    "previous",
                    models.CharField(max_length=64, verbose_name="hash of the seal before"),
                ),
                (
                    "pruned",
                    models.PositiveBigIntegerField(
                        default=0,
                        help_text="When this seal was made.",
                        verbose_name="pruned up to",
                    ),
                ),
                ("pruning", models.CharField(blank=True, editable=False, max_length=64)),
                ("anchors", models.JSONField(default=dict, verbose_name="anchors")),
                ("leaves", models.BinaryField()),
                (
                    "pruned_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="pruned at"),
                ),
                (
                    "pruning_anchors",
                    models.JSONField(
                        blank=True, default=dict, verbose_name="anchors of the pruning"
                    ),
                ),
            ],
            options={
                "verbose_name": "seal",
                "verbose_name_plural": "seals",
                "ordering": ["-sequence"],
            },
        ),
    ]
