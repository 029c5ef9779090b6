"""What every adapter checks before it lets a tokenizer decode."""

from __future__ import annotations

from vla_spec.errors import BadToken
from vla_spec.types import Int32, TokenDomain


def inside_domain(tokens: Int32, domain: TokenDomain) -> Int32:
    """The tokens themselves, int32 [m].

    Raises:
        BadToken: an id outside the domain, with its position.
    """
    outside = (tokens < 0) | (tokens >= domain.vocab_size)
    if outside.any():
        where = int(outside.argmax())
        raise BadToken(f"action tokens: id {int(tokens[where])} at position {where}; valid: 0..{domain.vocab_size - 1}")
    return tokens
