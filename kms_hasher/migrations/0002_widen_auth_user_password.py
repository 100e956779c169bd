from django.db import migrations

from kms_hasher import operations, users


class Migration(migrations.Migration):
    dependencies = [("kms_hasher", "0001_initial")]
    if users.is_stock():
        dependencies += [("auth", "0012_alter_user_first_name_max_length")]

    operations = [operations.WidenStockUserPassword(max_length=1024)]
