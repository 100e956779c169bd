"""
`KMSUnavailableMiddleware`: 503 where a password could not be checked or sealed.

Without it, an outage of KMS is Django's plain error 500. It is never a wrong password.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils.deprecation import MiddlewareMixin
from django.utils.translation import gettext as _

from kms_hasher import breaker
from kms_hasher.exceptions import KMSError

logger = logging.getLogger("kms_hasher")

#: Seconds a client is asked to wait, where no breaker knows better.
RETRY_AFTER = 10


class KMSUnavailableMiddleware(MiddlewareMixin):
    """
    Answers 503 with Retry-After where a view ends in a `KMSError`.

    The page is the template `kms_hasher/unavailable.html`; clients that ask for JSON get
    `{"error": "service_unavailable", ...}`. Nothing about the error itself is told.
    """

    sync_capable = async_capable = True

    def process_exception(self, request: HttpRequest, exception: Exception) -> Any:
        if not isinstance(exception, KMSError):
            return None
        # Without the traceback, which would show the password in frames that are not ours.
        logger.error("503 for %r: %s", request.path, exception)
        # Django mails each 5xx to ADMINS, with what was posted.
        request.sensitive_post_parameters = "__ALL__"  # type: ignore[attr-defined]
        seconds = math.ceil(breaker.retry_after()) or RETRY_AFTER
        text = _("Signing in is not possible right now. Nothing is wrong with your password.")
        response: HttpResponse
        if _wants_json(request):
            content = {"error": "service_unavailable", "detail": text, "retry_after": seconds}
            response = JsonResponse(content, status=503)
        else:
            response = render(
                request,
                "kms_hasher/unavailable.html",
                {"text": text, "seconds": seconds},
                status=503,
            )
        response.headers["Retry-After"] = str(seconds)
        response.headers["Cache-Control"] = "no-store"
        return response


def _wants_json(request: HttpRequest) -> bool:
    if request.content_type == "application/json":
        return True
    return not request.accepts("text/html") and request.accepts("application/json")
