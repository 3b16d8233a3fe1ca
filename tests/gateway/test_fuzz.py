"""Whatever a body holds, the answer is an answer or an error of the sender's: never a 500, never a hang."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.client import AsyncClient
from tests.client.pool import Pool, speaking
from tests.gateway.bodies import MODELS, bodies
from tests.support.fake_client import words

JSON = {"content-type": "application/json"}

fuzzed = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(params=["fake", "real"])
def running(request, serve, run_dir):
    """A gateway with the fake client, and one with the real one, which checks more."""
    if request.param == "fake":
        yield serve(lambda call, choice: words("a b c"))
        return
    pool = Pool(run_dir)
    pool.start_broker()
    pool.start_group(speaking("abc"))
    yield serve(client=lambda: AsyncClient(pool.endpoint, retries=0))
    pool.close()


@pytest.mark.parametrize("path", list(MODELS))
def test_any_body(running, path):
    seen = set()

    @settings(fuzzed, max_examples=100)
    @given(bodies(path))
    def send(body):
        response = running.http.post(path, content=json.dumps(body), headers=JSON)
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code == 200:
            assert response.text.endswith("[DONE]\n\n") or response.json()
        else:
            assert response.json()["error"]["message"]

    send()
    assert {200, 400} <= seen
    assert all(call.ended in ("finished", "closed") for call in running.fake.calls)


def test_any_bytes(serve):
    running = serve()

    @settings(fuzzed, max_examples=100)
    @given(st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]",:0123456789eE+-.\\utrfalsn ', max_size=40)))
    def send(body):
        content = body if isinstance(body, bytes) else body.encode()
        response = running.http.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code == 400, response.text

    send()
