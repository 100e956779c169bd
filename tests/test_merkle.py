"""The Merkle tree hash of RFC 6962, against the vectors of Certificate Transparency."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest

from kms_hasher.audit import merkle

# The reference implementation's: each root is of the leaves up to the one beside it.
VECTORS = [
    ("", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"),
    ("00", "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"),
    ("10", "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"),
    ("2021", "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"),
    ("3031", "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4"),
    ("40414243", "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"),
    ("5051525354555657", "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"),
    (
        "606162636465666768696a6b6c6d6e6f",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ),
]


def by_the_rfc(leaves: list[bytes]) -> bytes:
    """MTH as section 2.1 defines it."""
    if not leaves:
        return sha256().digest()
    if len(leaves) == 1:
        return sha256(b"\0" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return sha256(b"\1" + by_the_rfc(leaves[:split]) + by_the_rfc(leaves[split:])).digest()


def grown(leaves: list[bytes]) -> merkle.Tree:
    tree = merkle.Tree()
    for leaf in leaves:
        tree.append(leaf)
    return tree


def test_an_empty_tree_has_the_hash_of_nothing() -> None:
    expected = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert merkle.Tree().root().hex() == expected


def test_the_known_roots_as_the_tree_grows() -> None:
    tree = merkle.Tree()
    for number, (leaf, root) in enumerate(VECTORS, 1):
        tree.append(bytes.fromhex(leaf))
        assert (tree.size, tree.root().hex()) == (number, root)


@pytest.mark.parametrize("number", [*range(35), 63, 64, 65, 127, 1000])
def test_every_size_is_as_the_rfc_defines_it(number: int) -> None:
    leaves = [random.randbytes(random.randrange(9)) for _ in range(number)]
    assert grown(leaves).root() == by_the_rfc(leaves)


def test_a_leaf_is_told_from_a_node() -> None:
    left, right = merkle.Tree().append(b"a"), merkle.Tree().append(b"b")
    assert grown([b"a", b"b"]).root() != grown([left + right]).root()


def test_append_returns_the_hash_of_the_leaf() -> None:
    tree = grown([b"a"])
    assert tree.append(b"b") == sha256(b"\0b").digest()


def test_one_hash_is_held_for_each_bit_of_the_size() -> None:
    tree = merkle.Tree()
    for number in range(100_000):
        tree.append(b"%d" % number)
    assert len(tree._roots) == bin(100_000).count("1")
