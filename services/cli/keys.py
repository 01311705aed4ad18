"""`arbitrage keys new`: makes an API key, shows it once, and says what the server's file needs."""

from __future__ import annotations

import secrets

from services.cli.console import Terminal
from services.cli.failures import BadInput
from services.rpc.api_keys import KeyEntry, digest_of

# Says what it is to whoever finds one, and to scanners that look for keys in repositories.
_PREFIX = "arbitrage_"
_KEY_BYTES = 32


def new_key(tenant: str, terminal: Terminal) -> int:
    """Shows a new key and its entry. The key is nowhere else and cannot be shown again.

    Raises:
        BadInput: the tenant cannot be one.
    """
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    try:
        entry = KeyEntry(
            id=f"{tenant}-{secrets.token_hex(4)}", sha256=digest_of(key), tenant=tenant
        )
    except ValueError:
        raise BadInput(
            f"--tenant: expected up to 55 letters, digits and ._@/-, got {tenant!r}"
        ) from None
    # Apart from each other, so that `>> keys.toml` appends the entry and never the key.
    terminal.note(f"The key, shown this once; give it to {tenant}: {key}")
    terminal.note("The entry for the file that ARBITRAGE_API_KEYS_FILE names:")
    terminal.show(
        f'[[keys]]\nid = "{entry.id}"\ntenant = "{entry.tenant}"\nsha256 = "{entry.sha256}"'
    )
    return 0
