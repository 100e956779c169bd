"""Settings of the test-suite; DATABASE_URL chooses the database, SQLite by default."""

import environ

env = environ.Env()

SECRET_KEY = "tests"  # not a secret
USE_TZ = True
ROOT_URLCONF = "tests.urls"

DATABASES = {"default": env.db("DATABASE_URL", default="sqlite://:memory:")}
if DATABASES["default"]["ENGINE"].endswith("mysql"):
    DATABASES["default"].setdefault("OPTIONS", {})["charset"] = "utf8mb4"
if DATABASES["default"]["ENGINE"].endswith("postgresql"):
    # A crash of the server may lose what a test has committed; a kill of a process does not.
    DATABASES["default"].setdefault("OPTIONS", {})["options"] = "-c synchronous_commit=off"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "kms_hasher",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
STATIC_URL = "static/"

# Argon2 with its default costs takes 100 MiB and a tenth of a second a time.
PASSWORD_HASHERS = [
    "tests.hashers.CheapKMSArgon2PasswordHasher",
    "tests.hashers.CheapArgon2PasswordHasher",
]

AUTHENTICATION_BACKENDS = ["kms_hasher.backends.KMSModelBackend"]

KMS_HASHER = {
    "PROVIDER": "tests.kms_memory.Provider",
    "KEY": "alias/tests",
    "AUDIT": "inline",
}
