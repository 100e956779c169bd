"""
The Merkle tree hash of RFC 6962, section 2.1, over leaves that come one after the other.

It holds one hash for each bit of the number of leaves, however many there are. A leaf and an
inner node are hashed with different prefixes, so that neither can pass for the other.
"""

from __future__ import annotations

from hashlib import sha256

#: Bytes of a hash.
SIZE = 32

_LEAF, _NODE = b"\0", b"\1"


class Tree:
    """A tree that grows to the right."""

    def __init__(self) -> None:
        self.size = 0
        # The roots of the full subtrees, the largest first: one for each bit set in `size`.
        self._roots: list[bytes] = []

    def append(self, leaf: bytes) -> bytes:
        """Add a leaf; return its hash."""
        added = found = sha256(_LEAF + leaf).digest()
        roots, size = self._roots, self.size
        while size & 1:  # the last full subtree is as large as what has been gathered
            found = sha256(_NODE + roots.pop() + found).digest()
            size >>= 1
        roots.append(found)
        self.size += 1
        return added

    def root(self) -> bytes:
        """Return the tree hash of the leaves so far; more may follow."""
        if not self._roots:
            return sha256().digest()
        *others, found = self._roots
        for each in reversed(others):
            found = sha256(_NODE + each + found).digest()
        return found
