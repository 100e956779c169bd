from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [
        ("kms_hasher", "0008_event_permissions"),
    ]

    operations = [
        migrations.AlterModelOptions(
            name="auditevent",
            options={
                "ordering": ["-time", "-pk"],
                "permissions": [
                    ("export_auditevent", "Can export events"),
                    ("reconcile_auditevent", "Can see and resolve what comparisons found"),
                ],
                "verbose_name": "event",
                "verbose_name_plural": "events",
            },
        ),
    ]
