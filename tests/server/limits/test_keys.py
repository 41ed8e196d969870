from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.blocks import KeyLimits, ServerConfig
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.limits.accounts import Accounts
from ensemble_server.server.limits.keys import keys_of, owner_of_key
from ensemble_server.server.metrics import Metrics

MODELS = {"far": {"url": "http://127.0.0.1:9/v1"}, "near": {"url": "http://127.0.0.1:9/v1"}}


def server(**keys) -> ServerConfig:
    return ServerConfig.model_validate(keys)


def parsed(**keys):
    return parse_config({"models": MODELS, "server": keys}, source=Path("config.yaml")).server


def test_keys_have_the_names_that_the_config_gives_them_or_numbers(monkeypatch):
    monkeypatch.setenv("SOME_KEYS", "b,c")
    monkeypatch.setenv("NIGHTLY", "n")
    config = server(api_keys=("a",), api_keys_env="SOME_KEYS", keys={"nightly": {"key_env": "NIGHTLY"}})
    assert [key.name for key in keys_of(config)] == ["nightly", "key-1", "key-2", "key-3"]


def test_a_key_of_its_own_name_that_stands_in_the_list_too_is_one_key():
    config = server(api_keys=("a", "a"), keys={"team": {"key": "a", "requests_per_minute": 5}})
    [key] = keys_of(config)
    assert (key.name, key.limits.requests_per_minute) == ("team", 5)


def test_what_a_key_does_not_say_the_common_limits_say_and_null_is_no_limit():
    common = {"requests_per_minute": 60, "tokens_per_minute": 1000}
    config = server(limits=common, api_keys=("b",), keys={"a": {"key": "a", "tokens_per_minute": None}})
    named, other = keys_of(config)
    assert (named.limits.requests_per_minute, named.limits.tokens_per_minute) == (60, None)
    assert other.limits == KeyLimits(requests_per_minute=60, tokens_per_minute=1000)


def test_a_digest_stands_for_its_key(monkeypatch):
    digest = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
    accounts = Accounts(server(keys={"team": {"key": digest}}), Metrics())
    found = accounts.of_key("secret")
    assert found is not None
    assert (found[0], found[1].name) == (owner_of_key("secret"), "team")
    assert accounts.of_key(digest) is None


def test_whose_batch_it_is_is_known_after_a_restart():
    digest = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
    config = server(api_keys=("plain",), keys={"team": {"key": digest, "requests_per_minute": 5}})
    accounts = Accounts(config, Metrics())
    assert accounts.of_batch(owner_of_key("secret"), "team").name == "team"
    assert accounts.of_batch(owner_of_key("plain"), "").name == "key-1", "a batch of a version that kept no names"
    assert accounts.of_batch(owner_of_key("gone"), "gone").name == "everyone"
    accounts.of_key("secret")
    assert accounts.of_batch(owner_of_key("secret"), "renamed").name == "team"


def test_what_is_wrong_with_keys_is_said_by_name_and_no_key_is_printed(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"server\.keys\.a\.key_env names NOT_SET, which is not set"):
        keys_of(server(keys={"a": {"key_env": "NOT_SET"}}))
    with pytest.raises(ConfigError, match="'a' and 'b' are one key") as told:
        keys_of(server(keys={"a": {"key": "planted"}, "b": {"key": "planted"}}))
    assert "planted" not in str(told.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"a": {}}, "server.keys.a: needs exactly one of `key` and `key_env`"),
        ({"a": {"key": "planted", "key_env": "X"}}, "server.keys.a: needs exactly one of `key` and `key_env`"),
        ({"a": {"key": "planted", "models": ["nearr"]}}, "server.keys.a.models: there is no model 'nearr'; did you"),
        ({"a": {"key": "planted", "request_per_minute": 3}}, "did you mean 'requests_per_minute'?"),
        ({"a": {"key": "planted", "requests_per_minute": 0}}, "server.keys.a.requests_per_minute"),
        ({"a b": {"key": "planted"}}, "server.keys: the name 'a b' must be printable, without spaces"),
        ({"a": "planted"}, "server.keys.a: must be a map of keys"),
    ],
)
def test_a_wrong_entry_is_told_with_its_place(keys, said):
    with pytest.raises(ConfigError) as told:
        parsed(keys=keys)
    assert said in str(told.value)


def test_a_config_that_is_right_loads():
    config = parsed(limits={"models": ["near"]}, keys={"a": {"key": "k", "models": ["far", "near"]}})
    assert config.keys["a"].models == ("far", "near")
    assert "k'" not in repr(config.keys)
