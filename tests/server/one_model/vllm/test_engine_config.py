"""What an ensemble changes in vLLM's config, and what it refuses. No engine is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from ensemble_server.server.one_model.vllm.backbones import member_config
from ensemble_server.server.one_model.vllm.engine_config import WORKER, EnsembleEngineConfig
from tests.server.one_model.vllm.engines import exported

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(members, tmp_path_factory):
    return exported(members, tmp_path_factory.mktemp("ensemble") / "out", members=["llama", "deep"])


def config_of(folder, **settings):
    """vLLM's config for `folder`, made as `vllm serve` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), max_model_len=128, **settings).create_engine_config()


def test_a_directory_needs_no_flags(folder):
    config = config_of(folder)
    assert config.model_config.architecture == "EnsembleForCausalLM"
    assert config.model_config.get_vocab_size() == 320
    assert config.parallel_config.worker_cls == WORKER


def test_processors_of_the_user_stay_listed(folder):
    config = config_of(folder, logits_processors=["mine:Processor"])
    assert config.model_config.logits_processors[0] == "mine:Processor"
    assert len(config.model_config.logits_processors) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls mine.Worker"),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "[Pp]ipeline parallelism is not supported",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(settings, message, folder):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        config_of(folder, **settings)


def test_members_of_one_shape_have_compile_caches_of_their_own(folder, members):
    """vLLM would give both the code that was compiled for the first."""
    config = config_of(folder)
    llama, twin = (member_config(config, members[name], f"backbone_{name}") for name in ("llama", "twin"))
    again = member_config(config, members["llama"], "backbone_llama")
    assert llama.compute_hash() == again.compute_hash() != twin.compute_hash()


def test_draft_heads_are_refused_by_name(folder):
    config = config_of(folder)
    config.speculative_config = SimpleNamespace(method="eagle3")
    with pytest.raises(ValueError, match="'eagle3' reads the hidden states of one model"):
        EnsembleEngineConfig.verify_and_update_config(config)
