"""`manage.py demo`: the whole story of kms_hasher in half a minute, on this machine alone."""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import Argon2PasswordHasher, check_password, make_password
from django.contrib.auth.tokens import default_token_generator
from django.core.management import BaseCommand, CommandError, call_command
from django.test import Client
from django.urls import reverse
from django.utils.crypto import get_random_string

from kms_hasher import conf, encoding, keyring
from kms_hasher.exceptions import KeyNotFound, KMSError
from kms_hasher.models import AliasPeriod, AuditEvent, RotationRun
from kms_hasher.providers.local import LocalProvider

USERS = 12
COMMON = ["123456", "password", "qwerty", "letmein", "sunshine", "football", "iloveyou"]
WEAK = "sunshine"


class Command(BaseCommand):
    help = (
        "Shows what kms_hasher does: makes users, signs in, steals the site's own database "
        "and fails to crack it, rotates the key while a session stays signed in, and leaves "
        "an admin account. With the default settings nothing leaves this machine."
    )

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument(
            "--serve", action="store_true", help="then serve the site on this machine"
        )
        parser.add_argument(
            "--port",
            type=int,
            default=8000,
            metavar="PORT",
            help="port for --serve (default: 8000)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        started = time.monotonic()
        self.step("Preparing the database and the key")
        call_command("migrate", verbosity=0)
        self.prepare_key()
        users = self.make_users()
        client = self.sign_in(users[0])
        token = default_token_generator.make_token(users[1])
        self.steal()
        self.rotate(users, client, token)
        password = self.leave_admin()
        self.summary(time.monotonic() - started)
        address = f"127.0.0.1:{options['port']}"
        how = "" if options["serve"] else "  once you run `manage.py runserver`"
        self.stdout.write(f"\nAdmin: http://{address}/admin/{how}")
        self.stdout.write(f"       user admin, password {password}")
        if options["serve"]:
            call_command("runserver", address, use_reloader=False)

    # --- the steps ------------------------------------------------------------------

    def prepare_key(self) -> None:
        settings_ = conf.get()
        try:
            key = keyring.kms("status").describe_key(settings_.key)
        except KeyNotFound:
            call_command("rotate_kms_key", new_key=True, settle=0, stdout=io.StringIO())
            key = keyring.kms("status").describe_key(settings_.key)
        except KMSError as error:
            raise CommandError(f"The key cannot be used: {error}") from None
        self.say(f"{settings_.key} → {key.key_arn}")

    def make_users(self) -> list[Any]:
        self.step(f"Making {USERS} users, each with the weak password {WEAK!r}")
        model = get_user_model()
        model.objects.filter(username__startswith="demo-").delete()
        users = []
        for number in range(1, USERS + 1):
            name = f"demo-{number:02}"
            users.append(model.objects.create_user(name, f"{name}@example.com", WEAK))
        self.say(f"Stored for {users[0]}:")
        self.say(f"  {users[0].password[:76]}…")
        return users

    def sign_in(self, user: Any) -> Client:
        self.step("Signing in")
        client = _client()
        self.require(_post_login(client, user, WEAK), f"{user} signs in")
        self.require(not _post_login(_client(), user, "wrong"), "a wrong password is refused")
        return client

    def steal(self) -> None:
        self.step("Stealing the database")
        stolen = list(
            get_user_model()
            .objects.filter(username__startswith="demo-")
            .values_list("username", "password")
        )
        self.say(f"{len(stolen)} rows copied, and a list of {len(COMMON)} common passwords.")

        stock = make_password(WEAK, hasher=Argon2PasswordHasher())
        guessed = next((guess for guess in COMMON if check_password(guess, stock)), None)
        self.require(guessed == WEAK, f"the same password in stock Django: it is {guessed!r}")

        name, row = stolen[0]
        sealed = encoding.parse(row)
        # What the thief can compute of a guess is its digest; what he holds is not one.
        salt = sealed.header.salt.decode()
        hashes = [Argon2PasswordHasher().encode(guess, salt) for guess in COMMON]
        hits = [text for text in hashes if encoding.parse_stock(text)[1] in sealed.sealed]
        self.require(not hits, f"the row of {name}: no guess can be compared with it")
        self.require(not self.opens_elsewhere(sealed), "a KMS of his own cannot open it")

    def opens_elsewhere(self, sealed: encoding.SealedHash) -> bool:
        context = keyring.context_of(sealed.header)
        with tempfile.TemporaryDirectory() as folder:
            thief = LocalProvider(Path(folder) / "keys.json", allow_without_debug=True)
            own = thief.create_key()
            try:
                thief.decrypt(own.key_arn, sealed.sealed, context)
            except KMSError:
                return False
        return True

    def rotate(self, users: list[Any], client: Client, token: str) -> None:
        self.step("Rotating the key, with a session open and a reset link in the post")
        call_command(
            "rotate_kms_key",
            new_key=True,
            disable_old=True,
            settle=0,
            stdout=self.stdout,
            stderr=self.stderr,
        )
        before = users[0].password
        for user in users:
            user.refresh_from_db()
        self.require(users[0].password != before, "every row is sealed by the new key")
        self.require(client.get(reverse("home")).status_code == 200, "the session is signed in")
        self.require(
            default_token_generator.check_token(users[1], token), "the reset link still works"
        )
        self.require(_post_login(_client(), users[2], WEAK), "the passwords are the same")

    def leave_admin(self) -> str:
        password = get_random_string(12)
        model = get_user_model()
        admin, _ = model.objects.get_or_create(
            username="admin", defaults={"is_staff": True, "is_superuser": True}
        )
        admin.set_password(password)
        admin.save()
        return password

    def summary(self, seconds: float) -> None:
        self.step("What happened")
        calls: dict[tuple[str, str], int] = {}
        for operation, outcome in AuditEvent.objects.values_list("operation", "outcome"):
            calls[operation, outcome] = calls.get((operation, outcome), 0) + 1
        self.say("Calls to KMS, each one an event in the audit:")
        for (operation, outcome), number in sorted(calls.items()):
            self.say(f"  {operation:<22} {outcome:<10} {number:>6}")
        self.say("What the alias pointed to:")
        for period in AliasPeriod.objects.select_related("key").order_by("since", "pk"):
            until = f"{period.until:%H:%M:%S}" if period.until else "now"
            self.say(f"  {period.key}  {period.since:%Y-%m-%d %H:%M:%S} to {until}")
        rotation = RotationRun.objects.order_by("-pk").first()
        if rotation:
            self.say(f"Last rotation: {rotation.rewritten} rows, {rotation.failed} bad.")
        self.say(f"Done in {seconds:.0f} seconds.")

    # --- talking --------------------------------------------------------------------

    def step(self, text: str) -> None:
        self.stdout.write(self.style.MIGRATE_HEADING(f"\n{text}"))

    def say(self, text: str) -> None:
        self.stdout.write(f"  {text}")

    def require(self, truth: bool, claim: str) -> None:
        """Print a claim that has just been tried, or end the demo if it did not hold."""
        if not truth:
            raise CommandError(f"This did not hold: {claim}")
        self.stdout.write(self.style.SUCCESS("  ✓ ") + claim)


def _client() -> Client:
    return Client(SERVER_NAME=(settings.ALLOWED_HOSTS or ["localhost"])[0])


def _post_login(client: Client, user: Any, password: str) -> bool:
    answer = client.post(
        reverse("login"), {"username": user.get_username(), "password": password}
    )
    return answer.status_code == 302
