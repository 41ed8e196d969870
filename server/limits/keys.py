"""The keys of a config: where they stand, what each is called, and what it may do."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.blocks import KeyLimits, NamedKey, ServerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """`name`: what it is called wherever it is spoken of. `digest`: its SHA-256. `owner`: as which things belong to it
    (`owner_of_key`); None where the config has the digest alone, until it is used."""

    name: str
    digest: bytes
    limits: KeyLimits
    owner: str | None


def keys_of(config: ServerConfig) -> list[Key]:
    """All keys, each once: those of `server.keys` by their names, others as key-1, key-2, ... in their order.

    Raises `ConfigError` for a named key that is not there, and for one key under two names.
    """
    keys: dict[bytes, Key] = {}
    for name, entry in config.keys.items():
        text = _text_of(name, entry)
        key = Key(name, key_digest(text), effective_limits(entry, config.limits), _owner(text))
        if (other := keys.setdefault(key.digest, key)) is not key:
            raise ConfigError(f"server.keys: {other.name!r} and {name!r} are one key; give each its own")
    for number, text in enumerate(configured_keys(config), start=1):
        digest = key_digest(text)
        keys.setdefault(digest, Key(f"key-{number}", digest, config.limits, _owner(text)))
    return list(keys.values())


def configured_keys(config: ServerConfig) -> list[str]:
    """Keys without names: of the config and of the environment variable it names."""
    keys = list(config.api_keys)
    if config.api_keys_env is not None:
        from_environment = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",") if key.strip()]
        if not from_environment and not keys and not config.keys:
            logger.warning("%s holds no key: the server is open to everyone who can reach it", config.api_keys_env)
        keys += from_environment
    return keys


def effective_limits(entry: NamedKey, common: KeyLimits) -> KeyLimits:
    """What a key's own entry says, and what `server.limits` says where it says nothing."""
    own = {name: getattr(entry, name) for name in KeyLimits.model_fields if name in entry.model_fields_set}
    return common.model_copy(update=own)


def key_digest(key: str) -> bytes:
    """The SHA-256 of a key. A config may give that alone: "sha256:" and 64 hex digits."""
    digits = _digits(key)
    return hashlib.sha256(key.encode()).digest() if digits is None else bytes.fromhex(digits)


def owner_of_key(key: str) -> str:
    """As whose things are kept that belong to a key: a digest, another than the one that a config may hold."""
    return hashlib.sha256(b"owner:" + key.encode("latin-1")).hexdigest()


def _text_of(name: str, entry: NamedKey) -> str:
    if entry.key is not None:
        return entry.key
    assert entry.key_env is not None, "an entry has one of both"
    if not (text := os.environ.get(entry.key_env, "").strip()):
        raise ConfigError(f"server.keys.{name}.key_env names {entry.key_env}, which is not set")
    return text


def _owner(text: str) -> str | None:
    """A key is sent as latin-1 of its UTF-8: that is what its owner was always made of."""
    return None if _digits(text) is not None else owner_of_key(text.encode().decode("latin-1"))


def _digits(key: str) -> str | None:
    kind, _, digits = key.partition(":")
    return digits if kind == "sha256" and re.fullmatch(r"[0-9a-f]{64}", digits) else None
