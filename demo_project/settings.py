"""
Settings of the demonstration: SQLite and the local provider, unless the environment says
otherwise. Nothing here is fit for production but the shape of KMS_HASHER.

DATABASE_URL    postgres://user:password@host/name, mysql://...      SQLite in DEMO_DIR
KMS_PROVIDER    aws or local                                         local
KMS_KEY         alias, key id or ARN                                 alias/django-passwords
AWS_DEFAULT_REGION ...  as everywhere with AWS                               -
DEBUG, SECRET_KEY, ALLOWED_HOSTS                                     on, a fixed one, localhost
DEMO_DIR        where the database and the key file are kept         this checkout
"""

from pathlib import Path

import environ

env = environ.Env()

DEMO_DIR = Path(env("DEMO_DIR", default=str(Path(__file__).resolve().parent.parent)))

DEBUG = env.bool("DEBUG", default=True)
SECRET_KEY = env("SECRET_KEY", default="for the demonstration only, and public")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1"])

INSTALLED_APPS = [
    "demo_project",
    "kms_hasher",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "demo_project.middleware.content_security_policy",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "kms_hasher.middleware.KMSUnavailableMiddleware",
]
AUTHENTICATION_BACKENDS = ["kms_hasher.backends.KMSModelBackend"]
ROOT_URLCONF = "demo_project.urls"
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
DATABASES = {"default": env.db("DATABASE_URL", default=f"sqlite:///{DEMO_DIR}/demo.sqlite3")}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "UTC"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"
EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"

PASSWORD_HASHERS = [
    "kms_hasher.hashers.KMSArgon2PasswordHasher",
    # To read the hashes that were there before, until wrap_passwords has sealed them.
    "django.contrib.auth.hashers.Argon2PasswordHasher",
]

# The audit's lines would otherwise stand between the pages' own on the terminal.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {
        "audit": {"class": "logging.FileHandler", "filename": DEMO_DIR / "demo-audit.log"},
    },
    "loggers": {
        "kms_hasher.audit": {"handlers": ["audit"], "level": "INFO", "propagate": False},
    },
}

KMS_HASHER = {
    "KEY": env("KMS_KEY", default="alias/django-passwords"),
    "PROVIDER": env("KMS_PROVIDER", default="local"),
}
if KMS_HASHER["PROVIDER"] == "local":
    KMS_HASHER["OPTIONS"] = {"path": str(DEMO_DIR / "demo-keys.json")}
