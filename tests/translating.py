"""The tools of GNU gettext, which the tests of translations need."""

from __future__ import annotations

import shutil

#: What `makemessages` and the tests run.
TOOLS = ("xgettext", "msgmerge", "msguniq", "msgattrib", "msgfmt")


def find() -> bool:
    """Return whether all of them are there."""
    return all(map(shutil.which, TOOLS))
