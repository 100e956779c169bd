from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("kms_hasher", "0004_modes"),
    ]

    operations = [
        migrations.CreateModel(
            name="AuditHour",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("hour", models.DateTimeField(help_text="Its beginning.", verbose_name="hour")),
                (
                    "key_ref",
                    models.CharField(blank=True, max_length=30, verbose_name="key ref"),
                ),
                ("operation", models.CharField(max_length=32, verbose_name="operation")),
                ("purpose", models.CharField(max_length=16, verbose_name="purpose")),
                ("outcome", models.CharField(max_length=16, verbose_name="outcome")),
                (
                    "bucket",
                    models.SmallIntegerField(
                        help_text="Of latencies, four to the doubling; -1 for no call.",
                        verbose_name="bucket",
                    ),
                ),
                ("slot", models.SmallIntegerField(verbose_name="slot")),
                ("count", models.BigIntegerField(verbose_name="count")),
            ],
            options={
                "verbose_name": "hour of events",
                "verbose_name_plural": "hours of events",
                "ordering": ["hour", "pk"],
            },
        ),
        migrations.RemoveIndex(
            model_name="auditevent",
            name="kms_event_outcome",
        ),
        migrations.AddIndex(
            model_name="auditevent",
            index=models.Index(
                fields=["outcome", "time", "key_ref"], name="kms_event_outcome_key"
            ),
        ),
        migrations.AddConstraint(
            model_name="audithour",
            constraint=models.UniqueConstraint(
                fields=("hour", "key_ref", "operation", "purpose", "outcome", "bucket", "slot"),
                name="kms_hour_once_a_slot",
            ),
        ),
    ]
