"""
URLs are parsed so that no part of a password becomes anything else.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncflow.urls import UnclearUrl, masked, split_url

PASSWORDS = st.text(st.characters(exclude_categories=()), min_size=1, max_size=30)


def test_a_url_is_taken_apart_and_decoded() -> None:
    """
    All parts of a URL are returned, decoded.
    """
    parts = split_url("postgresql://me:s3%40%2Fc:t@a:1,[::1]:2,%2Frun%2Fpg/my%20db?x=1&y=a%26b")

    assert ("postgresql", "me", "s3@/c:t", "my db") == (
        parts.scheme,
        parts.user,
        parts.password,
        parts.path,
    )
    assert (("a", 1), ("::1", 2), ("/run/pg", None)) == parts.hosts
    assert {"x": "1", "y": "a&b"} == parts.parameters


@pytest.mark.parametrize(
    ("url", "user", "password"),
    [
        ("amqp://host", None, None),
        ("amqp://me@host", "me", None),
        ("amqp://me:@host", "me", ""),
        ("amqp://:pw@host", "", "pw"),
    ],
)
def test_user_and_password_may_be_missing(url: str, user: str | None, password: str | None) -> None:
    """
    User and password are optional; an empty one differs from none.
    """
    parts = split_url(url)

    assert (user, password) == (parts.user, parts.password)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "postgresql:host",
        "postgresql://me:a@b@host/db",
        "postgresql://me:a/b@host/db",
        "postgresql://me:a?b@host/db",
        "postgresql://me:a#b@host/db",
        "postgresql://me:a[b@host/db",
        "postgresql://me:a]b@host/db",
        "postgresql://me:a%b@host/db",
        "postgresql://me:a%00b@host/db",
        "postgresql://me:a%ffb@host/db",
        "postgresql://me:a b@host/db",
        "postgresql://me:a\tb@host/db",
        "postgresql://me:a\udcffb@host/db",
        "postgresql://me:a\uff20b@host/db",  # A fullwidth @, which some programs read as one.
        "postgresql://me:ab@host:port/db",
        "postgresql://me:ab@host:0/db",
        "postgresql://me:ab@host:65536/db",
        "postgresql://me:ab@::1/db",
        "postgresql://me:ab@host/db?password",
    ],
)
def test_a_url_that_is_not_beyond_doubt_is_refused(url: str) -> None:
    """
    An ambiguous URL is refused, and the error contains none of its parts.
    """
    with pytest.raises(UnclearUrl) as refusal:
        split_url(url)

    assert "" == str(refusal.value)
    assert refusal.value.__cause__ is None


@given(password=PASSWORDS)
@example(password="a@b:geheim/d")
@example(password="p@ss/w")
@example(password="x?sslmode=1&")
@example(password="%41")
def test_whatever_the_password_the_other_parts_are_what_they_are(password: str) -> None:
    """
    Whatever unescaped characters a password has, either it is read correctly, or the URL is
    refused.
    """
    try:
        parts = split_url(f"postgresql://me:{password}@host:5432/db?x=1")
    except UnclearUrl:
        return

    assert ("me", (("host", 5432),), "db", {"x": "1"}) == (
        parts.user,
        parts.hosts,
        parts.path,
        parts.parameters,
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:s3cret@host:5432/db?x=1", "postgresql://me:***@host:5432/db?x=1"),
        ("postgresql://me:s3:c@a:1,b:2/db", "postgresql://me:***@a:1,b:2/db"),
        ("postgresql://me:@host/db", "postgresql://me:***@host/db"),
        ("postgresql:///db?password=s3cret&a=b", "postgresql:///db?password=***&a=b"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("amqps://host/%2f", "amqps://host/%2f"),
        ("postgresql://host/db?sslpassword=s3cret", "postgresql://host/db?sslpassword=***"),
        ("amqp://me:s3@cret@host/", "amqp://***"),
        ("amqp://me:s3#cret@host/", "amqp://***"),
        ("amqp://me:s3/cret@host", "amqp://***"),
        ("amqp://me:s3?cret@host", "amqp://***"),
        ("me:s3cret@host", "***"),
    ],
)
def test_a_url_can_be_shown_without_its_password(url: str, expected: str) -> None:
    """
    Only the password is hidden, unless it is unclear where it ends.
    """
    assert expected == masked(url)
