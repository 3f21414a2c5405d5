"""Settings of vLLM: each flag and keyword has its effect, asks for what is done anyway, or is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest

from sempre.engine import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from sempre.engine.arguments import FrontendConfig, field_types, parse_arguments
from sempre.engine.cli import serve as serve_command
from sempre.engine.cli.parser import CommandParser
from sempre.engine.frontend.frontend import Frontend
from sempre.engine.server.body import parse_model
from sempre.engine.server.config import ServerConfig, server_config
from sempre.engine.server.logs import set_up_logging
from sempre.engine.server.parameters import apply_server_defaults
from sempre.engine.server.requests import CompletionRequest, StreamOptions
from sempre.engine.structured_outputs import structured_outputs_defaults, with_defaults
from sempre.engine.vllm_settings import VLLM_KEYWORDS, VLLM_SERVER_SETTINGS, check_vllm_settings
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError, RequestError

ACCEPTED = [(name, value) for name, values in VLLM_KEYWORDS.items() for value in values]
SERVER_ACCEPTED = [(name, value) for name, values in VLLM_SERVER_SETTINGS.items() for value in values]

# a switch says yes or no, and no queue is endless
FLAGS = [
    (name, value)
    for name, value in [*ACCEPTED, *SERVER_ACCEPTED]
    if value is not None
    or (
        not any(isinstance(other, bool) for other in (VLLM_KEYWORDS | VLLM_SERVER_SETTINGS)[name])
        and name != "max_num_queued_reqs"
    )
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"a": 1, "rope": {"theta": 2, "type": "x"}}')
    (tmp_path / "model" / "weights").write_text("w")
    return tmp_path / "model"


def settings_of(*arguments: str) -> dict[str, Any]:
    """What `sempre serve tiny ARGUMENTS` is started with."""
    parser = CommandParser(prog="sempre serve")
    serve_command.add_flags(parser)
    return serve_command._settings(parser.parse(["tiny", *arguments])).values


def as_flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list) and value:
        return [flag, *value]
    return [flag, value if isinstance(value, str) else json.dumps(value)]


@pytest.mark.parametrize(("name", "value"), ACCEPTED, ids=[f"{name}={value}" for name, value in ACCEPTED])
def test_a_keyword_that_asks_for_what_is_done_anyway_changes_nothing(folder: Path, name: str, value: object) -> None:
    assert parse_arguments(folder, {name: value}) == parse_arguments(folder, {})


@pytest.mark.parametrize("name", VLLM_KEYWORDS)
def test_a_keyword_that_asks_for_more_is_refused_by_name(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}.*is not supported by this engine") as caught:
        parse_arguments(folder, {name: "something else"})
    assert caught.value.parameter == name


@pytest.mark.parametrize(("name", "value"), FLAGS, ids=[f"{name}={value}" for name, value in FLAGS])
def test_the_flag_is_the_keyword(name: str, value: object) -> None:
    found = settings_of(*as_flag(name, value))
    assert found[name] == value
    check_vllm_settings(found)
    assert name in serve_command._ENGINE_SETTINGS or name in {*VLLM_SERVER_SETTINGS, *field_types(ServerConfig)}


@pytest.mark.parametrize("name", VLLM_SERVER_SETTINGS)
def test_a_flag_of_the_server_that_asks_for_more_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}.*is not supported by this engine") as caught:
        check_vllm_settings({name: "something else"})
    assert caught.value.parameter == name


def test_no_setting_is_in_two_tables() -> None:
    own = {*field_types(ServerConfig), *(n for n in serve_command._ENGINE_SETTINGS if n not in VLLM_KEYWORDS)}
    assert not set(VLLM_SERVER_SETTINGS) & (own | set(VLLM_KEYWORDS))
    # the server's own flags of these names come first
    ours = {"enable_log_requests", "enable_sleep_mode", "max_num_queued_reqs", "reasoning_parser", "shutdown_timeout"}
    assert set(VLLM_KEYWORDS) & own == ours


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--served-model-name", "a", "b", "--port", "1"], {"served_model_name": ["a", "b"]}),
        (["--served-model-name", "a", "--served-model-name", "b"], {"served_model_name": ["a", "b"]}),
        (["--api-key", "a", "b"], {"api_key": ["a", "b"]}),
        (["--dtype", "half"], {"dtype": "half"}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "-1"], {"max_model_len": -1}),
        (["--max-model-len", "2k"], {"max_model_len": 2000}),
        (["--hf-overrides", '{"a": 1}'], {"hf_overrides": {"a": 1}}),
        (["--override-generation-config", '{"top_k": 3}'], {"override_generation_config": {"top_k": 3}}),
        (["--default-chat-template-kwargs", '{"a": false}'], {"default_chat_template_kwargs": {"a": False}}),
        (
            ["--structured-outputs-config.backend", "guidance", "--structured_outputs_config.disable_any_whitespace"],
            {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}},
        ),
        (
            ["--structured-outputs-config", '{"backend": "auto"}', "--structured-outputs-config.disable-fallback=true"],
            {"structured_outputs_config": {"backend": "auto", "disable_fallback": True}},
        ),
        (["--middleware", "a.B", "--middleware", "c.d"], {"middleware": ["a.B", "c.d"]}),
        (["--stream-interval", "5"], {"stream_interval": 5}),
        (["--uvicorn-log-level", "debug"], {"uvicorn_log_level": "debug"}),
        (["--download-dir", "/d", "--tokenizer-revision", "r"], {"download_dir": "/d", "tokenizer_revision": "r"}),
    ],
)
def test_flags_with_an_effect(arguments: list[str], found: dict[str, Any]) -> None:
    settings = settings_of(*arguments)
    assert {name: settings[name] for name in found} == found


def test_other_names_of_a_value(folder: Path) -> None:
    for given, meant in (("half", "float16"), ("float", "float32"), ("auto", "auto")):
        assert parse_arguments(folder, {"dtype": given}).engine.dtype == meant
    for given in ("auto", -1, None):
        assert parse_arguments(folder, {"max_model_len": given}).engine.max_model_len is None
    with pytest.raises(ConfigError, match="max_model_len must be at least 1, got -2"):
        parse_arguments(folder, {"max_model_len": -2})


def test_hf_overrides_are_another_config_beside_the_same_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "cache"))
    path = _path(folder, {"rope": {"theta": 3}, "b": None})
    assert json.loads((path / "config.json").read_text()) == {"a": 1, "rope": {"theta": 3, "type": "x"}, "b": None}
    assert (path / "weights").read_text() == "w"
    assert _path(folder, {"b": None, "rope": {"theta": 3}}) == path
    assert _path(folder, {"b": 1}) != path
    assert _path(folder, {}) == folder
    assert json.loads((folder / "config.json").read_text())["rope"]["theta"] == 2


def _path(folder: Path, overrides: dict[str, Any]) -> Path:
    return Path(parse_arguments(folder, {"hf_overrides": overrides}).engine.model_path)


def test_code_of_a_checkpoint_is_refused_where_there_is_some(folder: Path) -> None:
    assert parse_arguments(folder, {"trust_remote_code": True}).engine == parse_arguments(folder, {}).engine
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    assert parse_arguments(folder, {"trust_remote_code": False})
    with pytest.raises(ConfigError, match=r"trust_remote_code=True: .*tokenizer_config.json names code"):
        parse_arguments(folder, {"trust_remote_code": True})


def test_what_is_fetched_from_the_hub_goes_where_it_is_told_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **keywords: Any) -> str:
        asked.append({"name": name, **keywords})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    keywords = {"revision": "r1", "download_dir": "/there", "tokenizer": "o/t", "tokenizer_revision": "r2"}
    found = parse_arguments("o/m", keywords, progress=False)
    assert [(a["name"], a["revision"], a["cache_dir"]) for a in asked] == [
        ("o/m", "r1", "/there"),
        ("o/t", "r2", "/there"),
    ]
    assert "*.safetensors" not in asked[1]["allow_patterns"]
    assert found.frontend.tokenizer == str(folder)
    parse_arguments("o/m", {"tokenizer_revision": "r3"}, progress=False)
    assert [(a["name"], a["revision"]) for a in asked[2:]] == [("o/m", None), ("o/m", "r3")]
    for refused in ({"tokenizer_revision": "r"}, {"tokenizer": "nowhere"}):
        with pytest.raises(ConfigError, match="tokenizer"):
            parse_arguments(folder, refused)
    with pytest.raises(ConfigError, match="download_dir is for hub ids"):
        parse_arguments("smollm2-135m", {"download_dir": "/there"})


def test_defaults_of_sampling_parameters() -> None:
    given = {"top_k": 3, "max_new_tokens": 9}
    for mode in ("auto", "vllm"):
        keywords = {"override_generation_config": given, "generation_config": mode}
        assert Frontend(parse_arguments("tiny", keywords)).default_sampling_params.top_k == 3
    for wrong, text in (
        ({"top_kk": 1}, "'top_kk' is not a default.*Did you mean 'top_k'"),
        ({"top_p": 7}, "top_p: top_p"),
    ):
        with pytest.raises(ConfigError, match=text):
            Frontend(parse_arguments("tiny", {"override_generation_config": wrong}))


def test_defaults_of_template_variables() -> None:
    keywords = {"chat_template": "{{ a }}{{ b }}", "default_chat_template_kwargs": {"a": "x", "b": "y"}}
    frontend = Frontend(parse_arguments("tiny", keywords))
    message = [{"role": "user", "content": "hi"}]
    assert frontend.render_chat(message).get("prompt") == "xy"
    assert frontend.render_chat(message, chat_template_kwargs={"b": "z"}).get("prompt") == "xz"


def test_defaults_of_forms() -> None:
    defaults = structured_outputs_defaults({"backend": "guidance", "disable_any_whitespace": True})
    assert defaults == {"disable_any_whitespace": True}
    form = with_defaults(StructuredOutputsParams(json={"type": "object"}), defaults)
    assert form.disable_any_whitespace is True
    assert with_defaults(StructuredOutputsParams(regex="a"), defaults) == StructuredOutputsParams(regex="a")
    both = {"disable_any_whitespace": True, "disable_additional_properties": True}
    for own in (
        {"disable_any_whitespace": False, "disable_additional_properties": False},
        {"disable_any_whitespace": False, "disable_additional_properties": False, "whitespace_pattern": " "},
    ):
        said = StructuredOutputsParams(json_object=True, **own)  # type: ignore[arg-type]
        assert with_defaults(said, both) == said
    compact = StructuredOutputsParams(json_object=True, disable_any_whitespace=True)
    assert with_defaults(compact, {"whitespace_pattern": " "}) == compact
    for wrong in ({"backend": "nothing"}, {"enable_in_reasoning": True}, {"disable_any_whitespace": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            structured_outputs_defaults(wrong)
    with pytest.raises(ConfigError, match=r"no member 'bakend'\. Did you mean 'backend'"):
        structured_outputs_defaults({"bakend": "auto"})


@pytest.mark.parametrize("backend", ["xgrammar", "outlines", "lm-format-enforcer"])
def test_a_form_is_kept_whoever_was_to_read_it(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    assert structured_outputs_defaults({"backend": backend}) == {}
    assert f"backend='{backend}': this engine reads all forms with guidance" in caplog.text


def test_fields_that_the_server_decides() -> None:
    config = server_config({"enable_force_include_usage": True, "return_tokens_as_token_ids": True})
    all_along = StreamOptions(include_usage=True, continuous_usage_stats=True)
    asked = b'{"prompt": "a", "stream": true, "stream_options": {"include_usage": false}}'
    for body, usage in (
        (b'{"prompt": "a", "stream": true}', all_along),
        (asked, all_along),
        (b'{"prompt": "a"}', None),
    ):
        request = parse_model(body, CompletionRequest)
        apply_server_defaults(request, config)
        assert request.return_tokens_as_token_ids is True
        assert request.stream_options == usage
        untouched = parse_model(body, CompletionRequest)
        apply_server_defaults(untouched, server_config({}))
        assert untouched == parse_model(body, CompletionRequest)


class Stamp:
    """Middleware as a class."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["stamped"] = True
        await self.app(scope, receive, send)


async def stamp(request: Any, call_next: Any) -> Any:
    """Middleware as a function."""
    response = await call_next(request)
    response.headers["x-stamp"] = "1"
    return response


def test_middleware_wraps_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    from sempre.engine.server.middleware import wrapped

    monkeypatch.setitem(sys.modules, "stamps", sys.modules[__name__])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse(str(scope.get("stamped")))(scope, receive, send)

    names = server_config({"middleware": ["stamps.Stamp", "stamps.stamp"]}).middleware
    answer = TestClient(wrapped(app, names)).get("/")
    assert (answer.text, answer.headers["x-stamp"]) == ("True", "1")
    for wrong in ("stamps.ACCEPTED", "stamps.nothing", "no_such_module.x"):
        with pytest.raises(ConfigError, match=f"middleware '{wrong}'"):
            server_config({"middleware": [wrong]})


def test_the_library_s_log_level() -> None:
    names = ("sempre", "uvicorn")
    kept = [(logging.getLogger(n), logging.getLogger(n).handlers, logging.getLogger(n).level) for n in names]
    propagate = [logging.getLogger(name).propagate for name in names]
    try:
        for given, level in (("trace", 5), ("error", logging.ERROR), ("warning", logging.WARNING)):
            set_up_logging(
                "text", debug=False, uvicorn_level=server_config({"uvicorn_log_level": given}).uvicorn_log_level
            )
            assert logging.getLogger("uvicorn").level == level
    finally:
        for (logger, handlers, level), way in zip(kept, propagate, strict=True):
            logger.handlers, logger.propagate = handlers, way
            logger.setLevel(level)


def test_without_a_tokenizer_there_are_only_token_ids() -> None:
    prompt = {"prompt_token_ids": [1, 5, 9]}
    params = SamplingParams(max_tokens=6, seed=1, logprobs=1)
    settings: dict[str, Any] = {"multiprocessing": False, "num_threads": 1, "max_model_len": 64}
    with LLM("tiny", **settings) as llm:
        expected = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    with LLM("tiny", skip_tokenizer_init=True, stream_interval=4, **settings) as llm:
        found = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert (found.token_ids, found.text, found.seed) == (expected.token_ids, "", 1)
        assert [{k: v.logprob for k, v in row.items()} for row in found.logprobs or []] == [
            {k: v.logprob for k, v in row.items()} for row in expected.logprobs or []
        ]
        for refused in ("text", {"prompt_token_ids": [1]}):
            with pytest.raises(RequestError, match="skip_tokenizer_init"):
                llm.generate(refused, SamplingParams(max_tokens=2, stop=["x"]), use_tqdm=False)
        # the first token at once, then four at a time, and the rest with the end
        deltas = SamplingParams(max_tokens=6, seed=1, output_kind=RequestOutputKind.DELTA)
        pieces = [output.outputs[0].token_ids for output in llm.stream(prompt, deltas)]
        assert [len(piece) for piece in pieces] == [1, 4, 1]
        assert [token for piece in pieces for token in piece] == expected.token_ids
        # a request may ask for more
        for interval, lengths in ((2, [1, 4, 1]), (5, [1, 5]), (100, [1, 5])):
            deltas.stream_interval = interval
            found_lengths = [len(output.outputs[0].token_ids) for output in llm.stream(prompt, deltas)]
            assert found_lengths == lengths


@pytest.mark.parametrize(
    "variables",
    [
        {"SEMPRE_PORT": "tcp://10.0.0.1:8000"},
        {
            "SEMPRE_SERVICE_HOST": "10.0.0.1",
            "SEMPRE_SERVICE_PORT": "8000",
            "SEMPRE_SERVICE_PORT_HTTP": "8000",
            "SEMPRE_PORT": "tcp://10.0.0.1:8000",
            "SEMPRE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "SEMPRE_PORT_8000_TCP_PROTO": "tcp",
            "SEMPRE_PORT_8000_TCP_PORT": "8000",
            "SEMPRE_PORT_8000_TCP_ADDR": "10.0.0.1",
            "SEMPRE_CHAT_PORT": "udp://10.0.0.2:53",
        },
    ],
)
def test_what_kubernetes_sets_beside_a_service_is_left_aside_in_one_line(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "port" not in settings_of()
    (record,) = caplog.records
    assert "Kubernetes" in record.message
    assert all(name in record.message for name in variables)


def test_a_port_of_ours_is_read_and_a_wrong_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_PORT", "8123")
    assert settings_of()["port"] == 8123
    monkeypatch.setenv("SEMPRE_PORT", "http")
    with pytest.raises(ConfigError, match="SEMPRE_PORT: 'http' is refused"):
        settings_of()


NEUTRAL_NONE = [
    (config, field.name)
    for config in (EngineConfig, FrontendConfig)
    for field in msgspec.structs.fields(config)
    if field.name not in ("model", "model_path", "weights_path", "seed")
]


@pytest.mark.parametrize(("config", "name"), NEUTRAL_NONE)
def test_none_is_as_good_as_left_out(folder: Path, config: type[msgspec.Struct], name: str) -> None:
    assert parse_arguments(folder, {name: None}) == parse_arguments(folder, {})


def test_none_is_no_seed_of_an_engine(folder: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        parse_arguments(folder, {"seed": None})


def test_a_number_is_the_same_as_an_integer_and_as_a_float_and_no_flag(folder: Path) -> None:
    assert parse_arguments(folder, {"cpu_offload_gb": 0.0}) == parse_arguments(folder, {})
    for name, value in (("cpu_offload_gb", False), ("enable_lora", 0), ("pipeline_parallel_size", True)):
        with pytest.raises(ConfigError, match=name):
            parse_arguments(folder, {name: value})


@pytest.mark.parametrize("model", ["ngram", "[ngram]"])
def test_a_lookup_may_be_named_as_a_model(folder: Path, model: str) -> None:
    given = {"model": model, "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    expected = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    for fields in (given, {**given, "method": "ngram"}):
        found = parse_arguments(folder, {"speculative_config": fields})
        assert found == parse_arguments(folder, {"speculative_config": expected})
