"""Our signer against botocore's, and the requests that are left to botocore's."""

from __future__ import annotations

import time
from datetime import datetime, timezone

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from kms_hasher.providers._sigv4 import Signer, host_of, is_plain

TYPE = "application/x-amz-json-1.1"

names = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=1, max_size=40)
secrets = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)
credentials = st.builds(
    ReadOnlyCredentials,
    names,
    secrets | st.text(min_size=1),
    st.none() | secrets | st.just(" a  b "),
)
hosts = st.from_regex(r"[a-zA-Z][a-zA-Z0-9-]{0,20}(\.[a-z]{2,8}){0,3}", fullmatch=True)
hosts |= st.sampled_from(["127.0.0.1", "[::1]", "[fd00:ec2::23]", "user@example.org"])
ports = st.just("") | st.sampled_from([":80", ":443"]) | st.integers(1, 65535).map(":{}".format)
paths = st.lists(st.from_regex(r"[A-Za-z0-9_~-]{1,8}", fullmatch=True), max_size=3)
urls = st.builds(
    lambda scheme, host, port, parts: (
        f"{scheme}://{host}{port}/" + "".join(map("{}/".format, parts))
    ),
    st.sampled_from(["http", "https"]),
    hosts,
    ports,
    paths,
)
regions = st.from_regex(r"[a-z]{2}(-[a-z]{3,8}){1,2}-[1-9]", fullmatch=True)
timestamps = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1)).map(
    lambda moment: moment.strftime("%Y%m%dT%H%M%SZ")
)


def by_botocore(frozen, url, region, target, body, timestamp):
    """Return the headers that botocore adds to such a request, at that time."""
    headers = {"Content-Type": TYPE, "User-Agent": "anybody", "X-Amz-Target": target}
    request = AWSRequest(method="POST", url=url, data=body, headers=headers)
    request.context["timestamp"] = timestamp
    signer = SigV4Auth(frozen, "kms", region)
    signer._modify_request_before_signing(request)  # add_auth, but for its clock
    text = signer.string_to_sign(request, signer.canonical_request(request))
    signer._inject_signature_to_request(request, signer.signature(text, request))
    del request.headers["User-Agent"]
    assert signer.headers_to_sign(request)["host"] == host_of(url)
    return dict(request.headers.items())


@given(
    url=urls,
    region=regions,
    requests=st.lists(
        st.tuples(
            credentials,
            st.from_regex(r"[A-Za-z.]{1,40}", fullmatch=True),
            st.binary(min_size=1),
            timestamps,
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_it_signs_as_botocore_does(url, region, requests):
    signer = Signer(url, region)
    for frozen, target, body, timestamp in requests:
        for _ in range(2):  # with the key at hand, too
            signed = signer.headers(frozen, target, body, timestamp)
            assert signed == by_botocore(frozen, url, region, target, body, timestamp)


def test_the_time_is_now():
    frozen = ReadOnlyCredentials("AKIA", "secret", None)
    before = int(time.time())
    signed = Signer("https://kms.example.org/", "eu-central-1").headers(frozen, "T.X", b"{}")
    moment = datetime.strptime(signed["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
    # The clock of whole seconds may be some milliseconds late.
    assert before - 1 <= moment.replace(tzinfo=timezone.utc).timestamp() <= time.time()


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://kms.eu-central-1.amazonaws.com/", True),
        ("https://kms.eu-central-1.amazonaws.com", True),
        ("http://localhost:4566/kms/", True),
        ("http://localhost:4566/a/../b/", False),
        ("http://localhost:4566//", False),
        ("http://localhost:4566/a%20b/", False),
        ("http://localhost:4566/a b/", False),
        ("http://localhost:4566/?a=b/", False),
        ("http://localhost:4566/ä/", False),
    ],
)
def test_urls_that_are_signed_as_they_are(url, plain):
    assert is_plain(url) is plain
