"""What `/metrics` tells of ensembles: who was silent and how long, and how long choosing took."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from ensemble_server.ensembles.crowd_vote import CrowdVote
from ensemble_server.ensembles.method import Services
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import CHAT, asgi_client


def crowd(name: str, *members) -> CrowdVote:
    config = CrowdVote.Config(method="crowd_vote", members=[member.name for member in members])
    return CrowdVote(name, config, {member.name: member for member in members}, Services())


async def test_silent_members_and_the_vote_are_timed_also_inside_ensembles(host):
    ann, bob = (ScriptedModel(name, Script(("yes",))) for name in ("ann", "bob"))
    dead = ScriptedModel("dead", Script(("x",), fails_at=0))
    inner = crowd("inner", ann, dead)
    async with asgi_client(host(outer=crowd("outer", inner, bob))) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT | {"model": "outer"})).status_code == 200
        text = (await client.get("/metrics")).text
    samples = {
        (one.name, *sorted(one.labels.values())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert samples["ensemble:member_silence_seconds_count", "dead", "inner"] == 1
    assert samples["ensemble:stage_duration_seconds_count", "outer", "vote"] == 1
    assert samples["ensemble:stage_duration_seconds_count", "inner", "vote"] == 1
    assert samples["ensemble:stage_duration_seconds_count", "answer", "outer"] == 1
