"""The accounts of a server: one per key, and one for everybody where there are no keys."""

from __future__ import annotations

import hashlib
from functools import cached_property
from hmac import compare_digest
from typing import TYPE_CHECKING

from ensemble_server.server.limits.account import Account
from ensemble_server.server.limits.keys import keys_of, owner_of_key

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import ServerConfig
    from ensemble_server.server.metrics import Metrics

EVERYONE = "everyone"  # the account of a server without keys, and of batches whose key is gone


class Accounts:
    """Made of a config; raises `ConfigError` if its keys are not what it says.

    Things belong to an owner, which is a digest of a key ("" where there are no keys). A config that has a key's own
    digest alone does not tell that owner: it is learnt when the key is first used.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        keys = keys_of(config)
        self._by_digest = {key.digest: Account(key.name, key.limits, metrics) for key in keys}
        self._by_name = {account.name: account for account in self._by_digest.values()}
        self._by_owner = {key.owner: self._by_digest[key.digest] for key in keys if key.owner is not None}
        if not keys:
            _ = self.everyone  # its metrics begin with the server

    @cached_property
    def everyone(self) -> Account:
        return Account(EVERYONE, self._config.limits, self._metrics)

    @property
    def has_keys(self) -> bool:
        return bool(self._by_digest)

    def of_key(self, key: str) -> tuple[str, Account] | None:
        """(owner, account) of a key as it was sent; None for one that is not known.

        Digests are compared, all of them, in constant time: how long it takes tells nothing about the keys.
        """
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes as they were sent
        matches = [account for known, account in self._by_digest.items() if compare_digest(digest, known)]
        if not matches:
            return None
        owner = owner_of_key(key)
        self._by_owner[owner] = matches[0]
        return owner, matches[0]

    def of_batch(self, owner: str, name: str) -> Account:
        """Whose rows these are: of the key that is called `name` or, where none is any more, of the owner's key."""
        return self._by_name.get(name) or self._by_owner.get(owner) or self.everyone
