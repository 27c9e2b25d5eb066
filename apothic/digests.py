"""Digests that name content."""

from __future__ import annotations

import hashlib
import json

__all__ = ["digest_of"]


def digest_of(value: object) -> str:
    """Give the SHA-256 hex digest of bytes, or of a JSON value in canonical form."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(value).hexdigest()
