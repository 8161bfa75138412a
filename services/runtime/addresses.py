"""Hosts as they stand before a port."""

from __future__ import annotations


def bracketed(host: str) -> str:
    """Returns a host with the brackets that an IPv6 address needs before a port; they may be there already."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
