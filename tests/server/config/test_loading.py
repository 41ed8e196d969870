from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.ensembles.registry import METHODS
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel
from ensemble_server.server.config.loading import load_config, parse_config

CONFIGS = Path(__file__).parents[3] / "configs"
SERVED = sorted(set(CONFIGS.glob("[!.]*.yaml")) - set(CONFIGS.glob("compare-*.yaml")))  # the latter are plans


def parsed(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "c.yaml") + ": ")  # the file is named
    return message.removeprefix(str(tmp_path / "c.yaml") + ": ")


def entry_problem(tmp_path: Path, entry: str) -> str:
    return problems(tmp_path, "models:\n  ok: {path: org/name}\n  x: " + entry)


# --- what parses ---


@pytest.mark.parametrize("file", SERVED, ids=lambda file: file.name)
def test_every_shipped_config_parses(file: Path) -> None:
    config = load_config(file)
    assert config.main_model in config.listed


def test_the_demo_holds_what_the_readme_promises() -> None:
    config = load_config(CONFIGS / "demo.yaml")
    members, ensembles = ["base", "code", "jargon", "shakespeare"], ["mix", "adaptive", "crowd", "talk", "fused"]
    assert list(config.models) == members + ensembles
    assert config.models["code"].adapter == str(CONFIGS.parent / "experts" / "code")
    assert (config.models["mix"].pool, config.models["adaptive"].pool, config.models["adaptive"].share) == (
        "arithmetic",
        "posterior",
        0.01,
    )
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)


CONTRACT = """
models:
  base:   {path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: float32}
  code:   {base: base, adapter: experts/code}
  remote: {url: "http://127.0.0.1:9000/v1", model: some-name, api_key_env: SOME_KEY}
  mix:    {method: probability_average, members: {base: 1, code: 2}, pool: arithmetic}
  crowd:  {method: crowd_vote, members: [base, code, remote], samples: 2, similarity: {embedding: 1, rouge_l_word: 1}}
  talk:   {method: exchange_of_thought, members: [base, code, remote], topology: relay, max_rounds: 5, answer: number}
  fused:  {method: answer_fusion, members: [base, code], aggregator: mix}
  best:   {method: ranking, members: [base, code], judge: mix}
  major:  {method: majority, members: [base, code], samples: 5, answer: number}
  routed: {method: routing, members: {code: {positive_prompts: [python, function]}, base: {positive_prompts: [chat]}}, top_k: 1}
server: {host: 127.0.0.1, port: 8000, api_keys_env: ENSEMBLE_API_KEYS, max_queue: 256}
engine: {kind: transformers, max_batch: 32, max_context: 4096, prefill_chunk: 512}
"""  # noqa: E501 - one entry a line, as in the design


def test_the_contracts_example_parses_up_to_methods_that_are_not_registered(tmp_path: Path) -> None:
    data = yaml.safe_load(CONTRACT)
    unknown = {
        name for name, entry in data["models"].items() if entry.get("method", "probability_average") not in METHODS
    }
    if unknown:
        message = problems(tmp_path, CONTRACT)
        for name in unknown:
            assert f"models.{name}: unknown method '{data['models'][name]['method']}'" in message
        assert message.count("unknown method") == message.count("\n") or len(unknown) == 1  # and nothing else
    data["models"] = {name: entry for name, entry in data["models"].items() if name not in unknown}
    config = parse_config(data, source=tmp_path / "c.yaml")
    assert isinstance(config.models["base"], HostedModel)
    assert isinstance(config.models["remote"], RemoteModel)
    assert isinstance(config.models["mix"], ProbabilityAverage.Config)
    assert config.models["mix"].members == {"base": 1, "code": 2}
    assert config.server.api_keys_env == "ENSEMBLE_API_KEYS"


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = parsed(tmp_path, "models: {a: {path: org/name}}")
    for block, key in [(config, "server"), (config.server, "port"), (config.models["a"], "path")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, key, None)


def test_a_block_without_keys_keeps_its_defaults(tmp_path: Path) -> None:
    config = parsed(tmp_path, "models: {a: {path: org/name}}\nserver:\n  # port: 9000\n")
    assert config.server.port == 8000


def test_hidden_models_are_not_listed(tmp_path: Path) -> None:
    config = parsed(
        tmp_path,
        "models: {a: {path: org/name, listed: false}, b: {base: a}, m: {method: probability_average, members: [a, b]}}",
    )
    assert config.listed == ["b", "m"]
    assert config.main_model == "m"
    assert "every one has `listed: false`" in problems(tmp_path, "models: {a: {path: org/name, listed: false}}")


def test_keys_do_not_show_in_a_configs_repr(tmp_path: Path) -> None:
    config = parsed(tmp_path, "models: {a: {path: org/name}}\nserver: {api_keys: [sesame]}")
    assert config.server.api_keys == ("sesame",)
    assert "sesame" not in repr(config)


# --- paths ---


def test_relative_paths_start_at_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c.yaml").write_text(
        "models: {folder: {path: models/small}, hub: {path: org/name}, short: {path: gpt2}, file: {path: a/b.gguf},\n"
        "  dotted: {path: ./no/such}, home: {path: ~/m}, tuned: {base: hub, adapter: org/name}}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", "/home/me")
    models = load_config(Path("../c.yaml")).models
    assert models["folder"].path == str(tmp_path / "models" / "small")
    assert models["hub"].path == "org/name"
    assert models["short"].path == "gpt2"
    assert models["file"].path == str(tmp_path / "a" / "b.gguf")
    assert models["dotted"].path == str(tmp_path / "no" / "such")
    assert models["home"].path == "/home/me/m"
    assert models["tuned"].adapter == str(tmp_path / "org" / "name")


def test_reasoning_may_be_off_as_yaml_writes_it(tmp_path: Path) -> None:
    for written in ("off", "'off'"):  # a bare one is false in YAML 1.1
        config = parsed(tmp_path, f"models: {{a: {{path: org/name, reasoning: {written}}}}}")
        assert config.models["a"].reasoning == "off"
    assert "must be 'auto' or 'off', got True" in entry_problem(tmp_path, "{path: org/name, reasoning: on}")


def test_speculation_may_be_off_as_yaml_writes_it_and_is_refused_with_the_nearest(tmp_path: Path) -> None:
    models = "models: {a: {path: org/name}}\nengine: {speculation: %s}"
    assert parsed(tmp_path, models % "off").engine.speculation == "off"
    assert parsed(tmp_path, models % "text").engine.speculation == "text"
    refusal = problems(tmp_path, models % "texts")
    assert "engine.speculation: must be one of off, text, member, got 'texts'; did you mean 'text'?" in refusal


def test_a_chat_template_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}", encoding="utf-8")
    text = "models: {a: {path: org/name, chat_template: t.jinja}, b: {base: a, chat_template: '{{ x }}'}}"
    models = parsed(tmp_path, text).models
    assert (models["a"].chat_template, models["b"].chat_template) == ("{{ messages }}", "{{ x }}")
    assert "models.x.chat_template: the template file 'no.jinja' cannot be read" in entry_problem(
        tmp_path, "{path: org/name, chat_template: no.jinja}"
    )


@pytest.mark.parametrize("name", ["nine.j2", "t.txt", "template", "t.jinja2", "folder/t.tmpl"])
def test_a_template_file_may_have_any_ending_and_its_name_is_never_the_template(tmp_path: Path, name: str) -> None:
    entry = f"{{path: org/name, chat_template: {name}}}"
    assert f"models.x.chat_template: the template file '{name}' cannot be read" in entry_problem(tmp_path, entry)
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_text("{{ messages }}", encoding="utf-8")
    assert parsed(tmp_path, f"models: {{x: {entry}}}").models["x"].chat_template == "{{ messages }}"


# --- environment ---


def test_variables_expand_in_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    config = parsed(
        tmp_path,
        "models: {a: {path: '${UNSET:-org}/name', system_prompt: '$${PORT} costs $5 {${EMPTY}}${EMPTY:-e}'}}\n"
        "server: {port: '${PORT}', api_keys: ['${UNSET:-k1}']}",
    )
    assert config.models["a"].path == "org/name"
    assert config.models["a"].system_prompt == "${PORT} costs $5 {}e"
    assert config.server.port == 9001
    assert config.server.api_keys == ("k1",)


def test_a_missing_variable_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    assert "server.cors_origins[1]: the environment variable UNSET is not set" in problems(
        tmp_path, "models: {a: {path: org/name}}\nserver: {cors_origins: [a, 'b${UNSET}']}"
    )
    assert "models.x.path: '${no name}' must be ${NAME}" in entry_problem(tmp_path, "{path: '${no name}'}")


# --- what is refused ---


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    message = problems(
        tmp_path,
        "models:\n"
        "  a: {path: org/name, dtyp: float32}\n"
        "  m: {method: probability_average, members: [a, b], pool: mean}\n"
        "  v: {method: probability_averag, members: [a]}\n"
        "  a: {path: other/name, dtype: float64}\n"
        "server: {port: high}\n"
        "servr: {}\n",
    )
    assert message.splitlines()[0] == "7 problems"
    for part in [
        "line 5: key 'a' is given twice (first in line 2)",
        "unknown key 'servr'; did you mean 'server'? (known: batch, embedding, engine, models, server)",
        "models.a.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'float64'; did you mean 'float",
        "models.m.pool: must be 'arithmetic', 'geometric' or 'posterior', got 'mean'",
        "models.v: unknown method 'probability_averag'; did you mean 'probability_average'?",
        "server.port: must be a valid integer, unable to parse string as an integer, got 'high'",
        "models.m: refers to an unknown model 'b'",
    ]:
        assert part in message


def test_an_unknown_key_comes_with_the_nearest_and_all_known(tmp_path: Path) -> None:
    assert entry_problem(tmp_path, "{method: probability_average, members: [ok], shar: 0.1}") == (
        "unknown key 'models.x.shar'; did you mean 'share'? "
        "(known: gate, listed, members, method, pool, share, vocabulary, when)"
    )


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("{path: org/name, url: 'http://h/v1'}", "`url` makes it a remote model and `path` makes it a hosted model"),
        ("{method: probability_average, members: [ok], path: p}", "`method` makes it an ensemble and `path` makes"),
        (
            "{members: [ok]}",
            "must have one of `path` or `base` (hosted), `url` (remote), `method` (ensemble); its keys are",
        ),
        ("{}", "its keys are: none"),
        ("org/name", "must be a map of keys such as {path: ...}, got str"),
        ("{method: [a]}", "`method` must be the name of a method, got list"),
        ("{path: org/name, base: ok}", "needs exactly one of `path`"),
        ("{path: org/name, adapter: a}", "`adapter` goes with `base`"),
        ("{path: org/name, delta: a}", "`delta` goes with `base`"),
        ("{base: x, adapter: a, delta: b}", "has an `adapter` and a `delta`"),
        ("{path: ''}", "models.x.path: must have at least 1 character"),
        ("{path: org/name, device: gpu}", "models.x.device: must be auto, cpu, cuda"),
        ("{base: ok, dtype: float32}", "`dtype` belongs to the entry with the weights, 'ok'"),
        ("{base: x, adapter: a}", "models.x.base: 'x' must be an entry with `path`"),
        ("{base: okay}", "models.x.base: there is no model 'okay'; did you mean 'ok'?"),
        ("{url: 'ftp://h/v1'}", "models.x.url: must be an http(s) address"),
        ("{url: 'http://h:x/v1'}", "models.x.url: must be an http(s) address"),
        ("{url: 'http://h/v1', api_key_env: sk-123}", "must be the name of an environment variable"),
        ("{url: 'http://h/v1', timeout_s: .inf}", "models.x.timeout_s: must be a finite number"),
        ("{method: probability_average}", "models.x.members: is required"),
        (
            "{method: probability_average, members: ok}",
            "members: must be a list of names, or a map from names to weights",
        ),
        ("{method: probability_average, members: [ok, null]}", "members: must be a list of names, or a map"),
        ("{method: probability_average, members: [ok, ok]}", "the same member is listed twice"),
        ("{method: probability_average, members: {ok: -1}}", "takes no negative weight"),
        ("{method: probability_average, members: {ok: .nan}}", "models.x.members.ok: must be a finite number"),
        ("{method: probability_average, members: [okk]}", "refers to an unknown model 'okk'; did you mean 'ok'?"),
        ("{method: probability_average, members: [x]}", "an ensemble cannot contain itself: x -> x"),
    ],
)
def test_a_wrong_entry_is_explained(tmp_path: Path, entry: str, part: str) -> None:
    message = entry_problem(tmp_path, entry)
    assert part in message
    assert "x" in message.split(":")[0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must be a map with the key `models`"),
        ("- a", "must be a map with the key `models`"),
        ("server: {}", "models: must map at least one name to a model"),
        ("models: {1: {path: org/name}}", "the name 1 is read as int, put it in quotes"),
        ("models: {on: {path: org/name}}", "the name True is read as bool, put it in quotes"),
        ("models: {'a b': {path: org/name}}", "must be printable, without spaces"),
        ("models: {a: {path: org/name}}\nserver: 3", "server: must be a map of keys, got 3"),
        ("models: {a: {path: org/name}}\nserver: []", "server: must be a map of keys, got []"),
        (
            "models: {a: {path: org/name}}\nserver: {cors_origins: x}",
            "cors_origins: must be a list such as [one, another]",
        ),
        ("models: {a: {path: org/name}}\nserver: {cors_origins: [x.org]}", "must be origins as browsers send them"),
        ("models: {a: {path: org/name}}\nserver: {cors_origins: ['http://me:pw@x']}", "@x'"),
        ("models: {a: {path: org/name}}\nserver: {cors_origins: ['http://x/app']}", "must be origins as browsers send"),
        ("models: {a: {path: org/name}}\nserver: {cors_origins: ['http://*.x']}", "must be origins as browsers send"),
        ("models: {a: {path: org/name}}\nserver: {cors_origins: ['null']}", "every page that hides its own"),
        (
            "models: {a: {path: org/name}}\nengine: {kind: vlm}",
            "engine.kind: must be one of transformers, vllm, got 'vlm'; did you mean 'vllm'",
        ),
        ("models: {a: {path: org/name}}\nsource: x", "unknown key 'source'"),
        ("models: {a: [}", "line 1, column 14: not valid YAML: while parsing"),
        ("models: &m {a: *m}", "found unconstructable recursive node"),
        ("models: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("models: !!bool maybe", "not valid YAML: KeyError"),
        ("[" * 1200, "nested too deeply"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, part: str) -> None:
    assert part in problems(tmp_path, text)


def test_origins_are_kept_as_browsers_write_them(tmp_path: Path) -> None:
    text = "['HTTP://LocalHost:5173/', 'https://x.org:443', 'http://[::1]:3000', 'app://here', '*']"
    config = parsed(tmp_path, f"models: {{a: {{path: org/name}}}}\nserver: {{cors_origins: {text}}}")
    assert config.server.cors_origins == (
        "http://localhost:5173", "https://x.org", "http://[::1]:3000", "app://here", "*",
    )  # fmt: skip


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"models: \xe4")
    with pytest.raises(ConfigError, match=r"latin\.yaml: must be UTF-8 text, byte 8 is not"):
        load_config(tmp_path / "latin.yaml")


def test_an_anchor_may_be_merged_and_overridden(tmp_path: Path) -> None:
    text = "models: {a: &a {path: org/name, dtype: float32}, b: {<<: *a, dtype: bfloat16}, c: *a}"
    models = parsed(tmp_path, text).models
    assert [models[name].dtype for name in "abc"] == ["float32", "bfloat16", "float32"]


# --- nesting ---


def average(*members: str) -> dict[str, object]:
    return {"method": "probability_average", "members": list(members)}


def test_a_reference_cycle_is_shown(tmp_path: Path) -> None:
    models = {
        "a": average("b"),
        "b": average("c", "ok"),
        "c": average("a"),
        "d": average("d"),
        "ok": {"path": "org/name"},
    }
    message = problems(tmp_path, yaml.safe_dump({"models": models}))
    assert any(cycle in message for cycle in ["a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"])
    assert "d -> d" in message


def test_depth_is_bounded(tmp_path: Path) -> None:
    models: dict[str, object] = {"m0": {"path": "org/name"}}
    models |= {f"m{depth}": average(f"m{depth - 1}") for depth in range(1, 5)}
    assert parse_config({"models": models}, source=tmp_path / "c.yaml").models["m4"]
    models["m5"] = average("m4")
    assert "models.m5: is 5 ensembles deep, server.max_depth is 4" in problems(
        tmp_path, yaml.safe_dump({"models": models})
    )
    assert parse_config({"models": models, "server": {"max_depth": 5}}, source=tmp_path / "c.yaml")


def test_fan_out_is_bounded_and_counts_repeats(tmp_path: Path) -> None:
    models = {"a": {"path": "org/name"}, "b": {"base": "a"}, "two": average("a", "b"), "four": average("two", "a", "b")}
    assert parse_config({"models": models, "server": {"max_fan_out": 4}}, source=tmp_path / "c.yaml")
    message = problems(tmp_path, yaml.safe_dump({"models": models, "server": {"max_fan_out": 3}}))
    assert message == "models.four: reaches 4 members, server.max_fan_out is 3"


# --- whatever comes ---

KEYS = st.sampled_from(
    ["models", "server", "engine", "method", "members", "path", "base", "url", "a", "b", "pool", "port"]
)
YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["probability_average", "a", "b", "${A}", "${A:-a}"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(st.sampled_from("ab") | st.text(max_size=3), YAML_VALUES, max_size=4), rest=YAML_VALUES)
def test_any_value_gives_a_config_or_a_config_error(tmp_path: Path, entries: dict, rest: object) -> None:
    for data in [rest, {"models": entries}, {"models": entries, "server": rest, "engine": rest, "embedding": rest}]:
        try:
            assert isinstance(parse_config(data, source=tmp_path / "c.yaml"), Config)
        except ConfigError as exc:
            assert len(str(exc)) < 20_000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abm:{}[],&*!?|>-#'\"%@`~<.=0 \n\t\\x", max_size=60))
@example(text="!!timestamp foo")
@example(text="!!int x")
@example(text="? [a]\n: b")
@example(text="? {a: b}\n: c")
@example(text="2024-13-45")
@example(text="\x00")
def test_any_text_gives_a_config_or_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):  # none of these has a model with a path
        load_config(tmp_path / "any.yaml")


def test_a_bomb_of_aliases_is_refused_in_no_time(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{depth}: &l{depth} [{', '.join([f'*l{depth - 1}'] * 10)}]" for depth in range(1, 15)]
    assert len(problems(tmp_path, "\n".join([*lines, "models: *l14", "server: *l14"]))) < 10_000


def test_loading_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from ensemble_server.server.config.loading import load_config; "
        f"load_config(Path({str(CONFIGS / 'demo.yaml')!r})); "
        "print([name for name in ('torch', 'transformers', 'peft', 'sentence_transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent, check=True)
    assert run.stdout.strip() == "[]"
