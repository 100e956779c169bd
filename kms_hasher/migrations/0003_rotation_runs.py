import django.core.serializers.json
import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("kms_hasher", "0002_widen_auth_user_password"),
    ]

    operations = [
        migrations.RenameModel("Rotation", "RotationRun"),
        migrations.AlterModelOptions(
            name="rotationrun",
            options={
                "ordering": ["-started_at", "-pk"],
                "permissions": [
                    ("control_rotationrun", "Can pause, resume and cancel rotation runs")
                ],
                "verbose_name": "rotation run",
                "verbose_name_plural": "rotation runs",
            },
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="calls",
            field=models.BigIntegerField(
                default=0,
                help_text="Calls to KMS, those made again included.",
                verbose_name="calls",
            ),
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="owner",
            field=models.CharField(
                blank=True,
                help_text="The process that opens the sweeps: host, process id and a token.",
                max_length=255,
                verbose_name="conducted by",
            ),
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="plan",
            field=models.JSONField(
                blank=True,
                default=dict,
                encoder=django.core.serializers.json.DjangoJSONEncoder,
                help_text="What was to be done and how, for every process that works on it.",
                verbose_name="plan",
            ),
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="rate",
            field=models.FloatField(
                blank=True,
                help_text="Calls to KMS per second at the most, over all processes.",
                null=True,
                verbose_name="rate cap",
            ),
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="sweep",
            field=models.PositiveIntegerField(default=0, verbose_name="sweep"),
        ),
        migrations.AddField(
            model_name="rotationrun",
            name="total",
            field=models.BigIntegerField(default=0, verbose_name="rows expected"),
        ),
        migrations.AlterField(
            model_name="rotationrun",
            name="state",
            field=models.CharField(
                choices=[
                    ("running", "running"),
                    ("paused", "paused"),
                    ("finished", "finished"),
                    ("failed", "failed"),
                    ("interrupted", "interrupted"),
                    ("cancelled", "cancelled"),
                ],
                default="running",
                max_length=16,
                verbose_name="state",
            ),
        ),
        migrations.CreateModel(
            name="RotationShard",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("sweep", models.PositiveIntegerField(verbose_name="sweep")),
                ("number", models.PositiveIntegerField(verbose_name="number")),
                ("database", models.CharField(max_length=255, verbose_name="database")),
                ("column", models.CharField(max_length=255, verbose_name="column")),
                ("after", models.TextField(blank=True, verbose_name="after key")),
                ("upto", models.TextField(blank=True, verbose_name="up to key")),
                ("cursor", models.TextField(blank=True, verbose_name="done up to key")),
                (
                    "state",
                    models.CharField(
                        choices=[
                            ("waiting", "waiting"),
                            ("working", "being worked on"),
                            ("done", "done"),
                            ("failed", "failed"),
                        ],
                        default="waiting",
                        max_length=16,
                        verbose_name="state",
                    ),
                ),
                (
                    "owner",
                    models.CharField(blank=True, max_length=255, verbose_name="worked on by"),
                ),
                (
                    "updated_at",
                    models.DateTimeField(
                        blank=True, null=True, verbose_name="last sign of life"
                    ),
                ),
                ("looked", models.BigIntegerField(default=0, verbose_name="looked at")),
                ("rewritten", models.BigIntegerField(default=0, verbose_name="rewritten")),
                ("overtaken", models.BigIntegerField(default=0, verbose_name="overtaken")),
                ("failed", models.BigIntegerField(default=0, verbose_name="bad rows")),
                ("calls", models.BigIntegerField(default=0, verbose_name="calls")),
                (
                    "bad",
                    models.JSONField(blank=True, default=list, verbose_name="bad rows, named"),
                ),
                (
                    "sources",
                    models.JSONField(blank=True, default=list, verbose_name="key refs left"),
                ),
                ("error", models.TextField(blank=True, verbose_name="error")),
                (
                    "run",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="shards",
                        to="kms_hasher.rotationrun",
                        verbose_name="run",
                    ),
                ),
            ],
            options={
                "verbose_name": "shard",
                "verbose_name_plural": "shards",
                "ordering": ["run", "sweep", "number"],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("run", "sweep", "number"), name="kms_shard_once_a_sweep"
                    )
                ],
            },
        ),
    ]
